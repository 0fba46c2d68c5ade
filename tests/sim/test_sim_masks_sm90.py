"""Test mask tensors on the Hopper kernel: any dtype, alignment and stride, and what goes wrong if a
warp's copies and reads are out of order; see test_sim_healthy.py and test_sim_plants.py."""

from __future__ import annotations

import dataclasses
import functools
import shlex

import pytest
import torch
from plant_checks import check_text, seeds_of, undocumented
from test_sim_healthy_sm90 import make_plan

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.fwd_sm90.mask import PLANTS_MASK_SM90
from flashcore.sim.replay import parse_replay

pytestmark = pytest.mark.thorough

CASE = Case(num_heads_q=4, num_heads_kv=2, seqlen_q=150, seqlen_k=117, causal="lower_right")
# Not a multiple of what is copied at once, in rows that have a multiple of it.
WIDTH = 128


@functools.cache
def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = make_inputs(case)
    return x.q, x.k, x.v


def mask_of(
    kind: str, dtype: torch.dtype, width: int = WIDTH, offset: int = 0, case: Case = CASE
) -> torch.Tensor:
    """Return a mask in a storage where every row is `width` elements, the first one `offset` behind
    its start. Elements between rows hide, or give NaN, unlike those of the mask."""
    generator = torch.Generator().manual_seed(width + offset)
    heads, rows = 4 if kind == "heads" else 1, 1 if kind == "row" else case.seqlen_q
    values = torch.randn(heads, rows, case.seqlen_k, generator=generator)
    if dtype != torch.bool:
        values[values > 1.5] = -torch.inf
    fill = True if dtype == torch.bool else torch.nan
    storage = torch.full((heads * rows * width + offset,), fill, dtype=dtype)
    # The last row ends where the storage ends.
    storage = storage[: storage.numel() - (width - case.seqlen_k)].clone()
    strides = (rows * width, width, 1)
    mask = storage.as_strided((heads, rows, case.seqlen_k), strides, offset)
    return mask.copy_(values < 0.7 if dtype == torch.bool else values)


def problem_of(mask: torch.Tensor, case: Case = CASE) -> Problem:
    q, k, v = inputs(case)
    return Problem.from_tensors(q, k, v, mask=mask, return_lse=True, **case.options())


def run(
    mask: torch.Tensor,
    seed: int,
    plan: Sm90Plan,
    plant: Plant | None = None,
    case: Case = CASE,
) -> SimulationError | str:
    """Run a case; return the alarm, or "wrong-result", or "healthy"."""
    q, k, v = inputs(case)
    out = torch.empty(1, 4, case.seqlen_q, case.head_dim_v, dtype=case.torch_dtype)
    lse = torch.empty(1, 4, case.seqlen_q)
    try:
        simulate(problem_of(mask, case), plan, q, k, v, mask, out, lse, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    errors = error_report(out, q, k, v, lse=lse, mask=mask, **case.options())
    return "healthy" if errors.ok else "wrong-result"


DTYPES = (torch.bool, torch.float16, torch.float32)
KINDS = ("rows", "heads", "row")
ALIGNMENTS = {
    "16 bytes": (128, 0),
    "4 bytes": (124, 4),
    "2 elements": (122, 2),
    "odd rows": (117, 0),
    "odd start": (128, 1),
}
# Every two of them: each alignment with each dtype and each kind, each dtype with each kind.
IN_PAIRS = [
    pytest.param(dtype, KINDS[(i + j) % 3], *place, id=f"{name}-{KINDS[(i + j) % 3]}-{dtype}")
    for i, (name, place) in enumerate(ALIGNMENTS.items())
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("dtype", "kind", "width", "offset"), IN_PAIRS)
def test_any_alignment(dtype: torch.dtype, kind: str, width: int, offset: int) -> None:
    mask = mask_of(kind, dtype, width, offset)
    one_tile = {"block_m": 128, "ping_pong": True}
    plan = make_plan(
        problem_of(mask), {"key_slices": 2, "num_stages": 4} if kind == "heads" else one_tile
    )
    assert plan.mask_is_row == (kind == "row")
    assert run(mask, 0, plan) == "healthy"


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["rows", "row"])
def test_rows_that_start_inside_of_a_packet(dtype: torch.dtype, kind: str) -> None:
    """Rows shorter than what lies of them in the first packet, that end with a key tile, or one
    element before or after it, at every place in a packet."""
    for keys in (1, 2, 7, 8, 31, 32, 33, 96):
        case = Case(num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=keys)
        for offset in range(1, 8, 2):
            mask = mask_of(kind, dtype, keys | 1, offset, case)
            plan = make_plan(problem_of(mask, case), {})
            assert plan.mask_is_shifted == (keys > 1)
            found = run(mask, offset, plan, case=case)
            assert found == "healthy", f"{keys} keys, offset {offset}:\n{found}"


def test_how_much_is_copied_at_once() -> None:
    def load_bytes(mask: torch.Tensor) -> int:
        plan = make_plan(problem_of(mask), {})
        return -plan.mask_load_bytes if plan.mask_is_shifted else plan.mask_load_bytes

    assert load_bytes(mask_of("rows", torch.bool)) == 16
    assert load_bytes(mask_of("rows", torch.bool, 124, 4)) == 4
    assert load_bytes(mask_of("rows", torch.bool, 120)) == 4  # 8, but that were one more kernel
    assert load_bytes(mask_of("rows", torch.bool, 122)) == -8  # from before the rows' starts
    assert load_bytes(mask_of("rows", torch.bool, 117)) == -8
    assert load_bytes(mask_of("rows", torch.float16, 117)) == -16
    assert load_bytes(mask_of("row", torch.bool, WIDTH, 3)) == -8
    assert load_bytes(mask_of("row", torch.float16, 117)) == 16  # nobody steps along its rows
    assert load_bytes(mask_of("rows", torch.float32, 117)) == 4


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32], ids=str)
def test_elements_of_a_row_that_are_no_neighbours(dtype: torch.dtype) -> None:
    columns = mask_of("rows", dtype)[:, : CASE.seqlen_k].mT  # 117 keys, 150 elements apart
    per_query = mask_of("rows", dtype)[..., :1]
    for mask in (columns[:, :1], per_query, per_query.expand(1, 150, CASE.seqlen_k)):
        plan = make_plan(problem_of(mask), {"block_m": 128})
        assert plan.mask_load_bytes == (4 if dtype == torch.float32 else 1)
        assert run(mask, 1, plan) == "healthy"


@functools.cache
def planted_mask() -> torch.Tensor:
    return mask_of("rows", torch.float16)


@functools.cache
def planted_shifted_mask() -> torch.Tensor:
    return mask_of("rows", torch.bool, 117, 1)


def check_plant(plant: Plant, mask: torch.Tensor) -> None:
    plan = make_plan(problem_of(mask), {"block_m": 128})
    assert run(mask, 0, plan) == "healthy"
    for seed in seeds_of(plant):
        found = run(mask, seed, plan, plant)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("name", PLANTS_MASK_SM90)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS_MASK_SM90[name]
    is_shifted = plant.plan.get("mask_is_shifted", False)
    check_plant(plant, planted_shifted_mask() if is_shifted else planted_mask())


def test_the_replay_command_repeats_the_run() -> None:
    mask = planted_shifted_mask().expand(1, 4, -1, -1)  # as the replay has it
    plan = make_plan(problem_of(mask), {"block_m": 128})
    found = run(mask, 3, plan, PLANTS_MASK_SM90["mask-front-whole"])
    assert isinstance(found, SimulationError)
    replay = parse_replay(shlex.split(found.replay)[3:])
    assert replay.plan == plan
    with pytest.raises(SimulationError) as again:
        replay.run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("name", PLANTS_MASK_SM90)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS_MASK_SM90[name])


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented(PLANTS_MASK_SM90) == []


def test_a_mask_takes_shared_memory_of_every_consumer_warp() -> None:
    plan = make_plan(problem_of(planted_mask()), {"block_m": 128, "block_n": 64})
    assert plan.mask_bytes == 2 * 4 * 16 * (64 + 8) * 2
    assert dataclasses.replace(plan, mask_is_row=True).mask_bytes == 2 * 4 * (64 + 8) * 2
    assert plan.smem_bytes - dataclasses.replace(plan, mask=None).smem_bytes == plan.mask_bytes
