"""Run the planted bugs of work that the device cuts into ranges (stream-K), in both kernels, and
those of the portable kernel's way from piece to piece; see test_sim_plants.py."""

from __future__ import annotations

import itertools
import shlex

import pytest
import torch
from plant_checks import SEEDS, SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.checks.paged_cases import PagedCase, make_paged_inputs, paged_error_report
from flashcore.checks.planned import with_fields
from flashcore.isolate.registry import Planted, find_plant
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.ops.paged import NAMES, paged_problem
from flashcore.problem.options import Inputs, Options
from flashcore.selection.select import select_plan
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.fwd_sm90.split import PLANTS_STREAM
from flashcore.sim.plants.pieces import PLANTS_PIECES_WMMA
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

ALL_PLANTS = PLANTS_STREAM | PLANTS_PIECES_WMMA
# No alarm and no wrong result: other bits than those of the order that is meant.
TURNED = Plant(
    name="stream-shares-turned",
    title="shares are added in an order that begins with the second",
    file="tile/shares.cuh",
    find="partial_row(p, block, min_i(begin + s, num_splits - 1), row[i]);",
    replace="partial_row(p, block, (begin + s + 1) % num_splits, row[i]);",
    caught_by="other-bits",
)


def run(
    planted: Planted, plant: Plant | None, seed: int, **changed: object
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return out, lse, and whether they are right."""
    case = PagedCase(**{**planted.options, **changed})  # type: ignore[arg-type]
    x = make_paged_inputs(case)
    q, k, v, table, seqlens_k = x.arguments()
    inputs = Inputs(q, k, v, seqlens_k=seqlens_k, page_table=table)
    problem = paged_problem(inputs, Options.checked(**case.options()))
    arch = 90 if planted.kernel == SM90 else SIM_ARCH
    plan = with_fields(select_plan(problem, arch, kernel=planted.kernel), planted.tile)
    out, lse = torch.empty(*q.shape[:3], case.head_dim_v, dtype=q.dtype), torch.empty(q.shape[:3])
    lengths = {name: getattr(inputs, name) for name in NAMES}
    simulate(problem, plan, q, k, v, None, out, lse, None, lengths, seed=seed, plant=plant)
    return out, lse, paged_error_report(out, lse, case, x).ok


def run_plant(
    name: str, seed: int, *, healthy: bool = False, kernel: str = SM90
) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    planted = find_plant(name, "sim", kernel)
    try:
        _, _, is_right = run(planted, None if healthy else planted.plant, seed)
    except SimulationError as error:
        return error
    return "healthy" if is_right else "wrong-result"


@pytest.mark.parametrize(
    ("name", "kernel"),
    [*itertools.product(PLANTS_STREAM, (SM90, WMMA)), *((n, WMMA) for n in PLANTS_PIECES_WMMA)],
)
def test_a_planted_bug_is_caught_with_every_seed(name: str, kernel: str) -> None:
    plant = ALL_PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(name, seed, kernel=kernel)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("kernel", [SM90, WMMA])
def test_without_a_plant_the_same_runs_are_healthy(kernel: str) -> None:
    found = {run_plant("stream-one-slot", seed, healthy=True, kernel=kernel) for seed in SOME_SEEDS}
    assert found == {"healthy"}


@pytest.mark.parametrize("kernel", [SM90, WMMA])
def test_shares_are_added_in_the_order_of_keys_whoever_adds_them(kernel: str) -> None:
    planted = find_plant("stream-one-slot", "sim", kernel)
    # Of three shares and more, whose sums differ in their last bits in another order.
    rows, heads = (64, 1) if kernel == SM90 else (20, 2)
    three_shares = {"lengths": (1070,), "seqlen_q": rows, "num_heads_q": heads, "num_heads_kv": 1}
    want, want_lse, _ = run(planted, None, 0, **three_shares)
    for seed in SEEDS:
        out, lse, _ = run(planted, None, seed, **three_shares)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)
        _, turned_lse, is_right = run(planted, TURNED, seed, **three_shares)
        assert is_right
        assert not torch.equal(turned_lse, want_lse)


def test_the_replay_command_repeats_the_run() -> None:
    found = run_plant("stream-heads-not-counted", 3)
    assert isinstance(found, SimulationError)
    with pytest.raises(SimulationError) as again:
        parse_replay(shlex.split(found.replay)[3:]).run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("name", ALL_PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, ALL_PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(ALL_PLANTS) == []
