"""Run the planted-bug suite of the kernel of a mask's gradient; see test_sim_plants.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from gradient_rule import forward, wrong_gradients, wrong_mask_gradient
from plant_checks import SOME_SEEDS, HealthyRuns, check_text, seeds_of, undocumented
from test_backward_sm90 import plans_of

from flashcore.backends.backward_sm90 import fused_backward, run_for_mask
from flashcore.checks.cases import make_inputs
from flashcore.kernels.bwd_mask_sm90.plan import select_mask_plan
from flashcore.kernels.bwd_sm90.tiles import BwdTile
from flashcore.problem.case import Case
from flashcore.sim import Plant, SimulationError
from flashcore.sim.plants.bwd_mask_sm90 import OF_ROWS, PLANTS_BWD_MASKED_SM90
from flashcore.sim.plants.bwd_mask_sm90 import PLANTS_BWD_MASK_SM90 as PLANTS
from flashcore.sim.plants.bwd_mask_sm90 import PLANTS_BWD_MASKED_DQ_SM90 as PLANTS_DQ
from flashcore.sim.run_bwd import simulate_backward

pytestmark = pytest.mark.thorough

MASKED = PLANTS_DQ | PLANTS_BWD_MASKED_SM90


@functools.cache
def inputs(sums_rows: bool):
    """Return a call whose blocks take several tiles: two heads of a group, a tile that no query
    sees, a row that sees nothing, and more than one chunk of columns. The mask's rows begin
    anywhere, so that a lane writes other elements than it reads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    q, k, v = (
        normal(2, 2, 150, 32).half(),
        normal(2, 1, 141, 32).half(),
        normal(2, 1, 141, 64).half(),
    )
    mask = normal(2, 1, 1, 141) if sums_rows else normal(1, 2, 150, 141)
    mask = mask.half()
    if not sums_rows:
        mask[:, :, 70] = -math.inf
    options = {"causal": "upper_left"}
    problem, out, lse = forward(q, k, v, mask, options)
    empty = lse == -math.inf
    dout = normal(*out.shape).half()
    delta = (dout.float() * out.float()).sum(-1).masked_fill(empty, 0.0)
    tensors = {
        "q": q, "k": k, "v": v, "out": out, "lse": lse, "delta": delta, "mask": mask,
        "dout": dout.masked_fill(empty[..., None], math.nan),
    }  # fmt: skip
    plan = select_mask_plan(problem, tuple(mask.shape))
    plan = dataclasses.replace(plan, num_shares=3 if sums_rows else 1)
    return problem, plan, tensors, (q, k, v, mask, dout, None, options, out)


def run_plant(plant: Plant | None, seed: int, sums_rows: bool) -> SimulationError | str:
    """Return the alarm, or "wrong-result", or "healthy"."""
    problem, plan, tensors, asked = inputs(sums_rows)

    def run(problem, plan, tensors) -> None:
        simulate_backward(problem, plan, tensors, seed=seed, plant=plant)

    found = torch.empty_like(tensors["mask"])
    try:
        run_for_mask(problem, tensors, found, run, plan)
    except SimulationError as error:
        return error
    return "wrong-result" if wrong_mask_gradient(found, *asked) else "healthy"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(plant, seed, name in OF_ROWS)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("sums_rows", [False, True])
def test_without_a_plant_the_same_runs_are_healthy(sums_rows: bool) -> None:
    assert {run_plant(None, seed, sums_rows) for seed in SOME_SEEDS} == {"healthy"}


# Tiles behind the first one, in each warp's walk, and rows that begin at multiples of 4 bytes, so
# that a lane reads what others have copied.
CASE = Case(
    batch=2, num_heads_q=2, num_heads_kv=1, seqlen_q=130, seqlen_k=150, head_dim=32, head_dim_v=32,
    mask="additive",
)  # fmt: skip
TILES = BwdTile(64, 32, 3, 2), BwdTile(32, 64, 3, 2)
HEALTHY = HealthyRuns()  # of the kernel of dq; the kernel of dk and dv comes after it


@functools.cache
def masked():
    x = make_inputs(CASE)
    problem, out, lse = forward(x.q, x.k, x.v, x.mask, CASE.options())
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
    return problem, (x.q, x.k, x.v, x.mask), out, lse, dout


def run_masked(plant: Plant | None, seed: int) -> SimulationError | str:
    """Run a plant of the kernel of dq, or of that of dk and dv; see `run_plant`."""
    problem, inputs, out, lse, dout = masked()

    def run(problem, plan, tensors) -> None:
        in_dq = plant is not None and plant.name in PLANTS_DQ
        if plan.is_dq and plant is not None and not in_dq:
            HEALTHY.simulate(CASE, problem, plan, tensors, seed)
            return
        planted = plant if plan.is_dq == in_dq else None
        simulate_backward(problem, plan, tensors, seed=seed, plant=planted)

    plans = plans_of(problem, TILES)
    try:
        found = fused_backward(problem, *inputs, out, lse, dout, None, run, plans)
    except SimulationError as error:
        return error
    wrong = wrong_gradients(found, *inputs, dout, None, CASE.options(), out)
    return "wrong-result" if wrong else "healthy"


@pytest.mark.parametrize("name", MASKED)
def test_a_bug_of_masks_is_caught_with_every_seed(name: str) -> None:
    plant = MASKED[name]
    for seed in seeds_of(plant):
        found = run_masked(plant, seed)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


def test_without_a_bug_of_masks_the_same_runs_are_healthy() -> None:
    assert {run_masked(None, seed) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS | MASKED)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, (PLANTS | MASKED)[name])


def test_the_documentation_lists_every_plant() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "backward.md"
    assert undocumented(PLANTS | MASKED, page) == []
