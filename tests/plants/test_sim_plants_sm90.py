"""Run the planted-bug suite of the Hopper kernel; see test_sim_plants.py."""

from __future__ import annotations

import dataclasses
import functools
import shlex

import pytest
import torch
from plant_checks import SOME_SEEDS, check_text, seeds_of, undocumented

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.compile.codegen import KERNELS_DIR, generate_source
from flashcore.kernels.fwd_sm90.plan import ARCH, KERNEL, O_PARTS, Sm90Plan
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.sim import Plant, SimulationError, simulate
from flashcore.sim.plants.fwd_sm90.causal import PLANTS_CAUSAL_SM90
from flashcore.sim.plants.fwd_sm90.pipeline import PLANTS_SM90
from flashcore.sim.replay import parse_replay
from flashcore.sim.report import ALARM_KINDS

pytestmark = pytest.mark.thorough

# Four row tiles for three blocks, three column chunks, four key tiles for two stages.
CASE = Case(
    num_heads_q=2,
    num_heads_kv=1,
    seqlen_q=200,
    seqlen_k=220,
    head_dim=96,
    head_dim_v=96,
    dtype="bfloat16",
)
PLAN = Sm90Plan(
    kernel=KERNEL,
    arch=ARCH,
    dtype=CASE.dtype,
    head_dim=CASE.head_dim,
    head_dim_v=CASE.head_dim_v,
    block_m=128,
    block_n=64,
    num_stages=2,
    min_blocks=1,
    ping_pong=True,
    lazy_rescale=False,
)

# Texts of the lines that a report must name, of either side.
WGMMA = ("wgmma_ss<", "wgmma_rs<")
NAMED_LINES: dict[str, tuple[str, ...]] = {
    "no-full-wait": (*WGMMA, "tma_load("),
    "no-empty-wait": (*WGMMA, "tma_load(", "mbar_arrive_expect_tx("),
    "asked-for-last": (*WGMMA, "tma_load("),
    "no-is-yes": (*WGMMA, "tma_load("),
    "early-release": (*WGMMA, "tma_load("),
    "early-q-release": (*WGMMA, "tma_load("),
    "o-part-overwritten": ("stmatrix_x4(", "tma_store("),
    "o-part-misplaced": ("stmatrix_x4(", "tma_store("),
    "no-proxy-fence": ("stmatrix_x4(", "tma_store("),
    "no-store-barrier": ("stmatrix_x4(", "tma_store("),
    "tx-too-many": ("mbar_wait(",),
    "tx-too-few": ("tma_load(",),
    "wrong-parity": ("mbar_wait(",),
    "parity-never-flips": (*WGMMA, "tma_load(", "mbar_"),
    "stage-mixed-up": (*WGMMA, "tma_load("),
    "accum-not-waited-for": ("wgmma_hold(c.out)", *WGMMA),
    "accum-written-early": ("wgmma_wait<0>", *WGMMA),
    "probs-written-early": ("wgmma_wait<0>", *WGMMA),
    "no-commit": ("wgmma_wait<0>", *WGMMA),
    "no-wgmma-fence": WGMMA,
    "exit-with-store": ("tma_store(",),
    "o-overwritten": ("stmatrix_x4(", "tma_store("),
    "no-store-commit": ("stmatrix_x4(", "tma_store("),
    "turn-count": ("named_barrier_", "mbar_wait("),
    "turn-not-handed-on": ("named_barrier_sync(ISSUE", "mbar_wait("),
    "no-init-fence": ("mbar_init(", "tma_load("),
    "no-init-barrier": ("mbar_init(", "mbar_"),
    "registers-of-three-warps": ("raise_registers<",),
    "early-consumers": ("gmem_store(p.tensors.lse", "tma_store("),
    "early-loads": ("tma_load(",),
    "q-of-another-group": (*WGMMA, "tma_load(to"),
    "q-buffers-in-step": (*WGMMA, "tma_load(", "mbar_", "smem_store(", "smem_load("),
    "coord-slots": ("smem_store(coord, NO_TILE)", "smem_store(to", "smem_load("),
    "coord-late": ("smem_store(to", "smem_load("),
    "share-not-awaited": ("smem_load(merge_smem", "smem_store(mine"),
    "share-overwritten": ("smem_load(", "smem_store(mine"),
    "share-never-taken": ("mbar_wait(",),
    "shares-on-one-ring": (*WGMMA, "tma_load(to"),
}


@functools.cache
def case_with_inputs(causal: bool) -> tuple[Problem, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = make_inputs(CASE)
    return Problem.from_tensors(x.q, x.k, x.v, causal=causal, return_lse=True), x.q, x.k, x.v


def plan_of(plant: Plant | None, causal: bool = False) -> Sm90Plan:
    plan = dataclasses.replace(PLAN, has_window_right=causal)
    return plan if plant is None else dataclasses.replace(plan, **plant.plan)


def run_plant(
    plant: Plant | None, seed: int, plan: Sm90Plan | None = None, causal: bool = False
) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    problem, q, k, v = case_with_inputs(causal)
    out = torch.empty(1, 2, CASE.seqlen_q, CASE.head_dim_v, dtype=torch.bfloat16)
    lse = torch.empty(1, 2, CASE.seqlen_q)
    plan = plan or plan_of(plant, causal)
    try:
        simulate(problem, plan, q, k, v, None, out, lse, seed=seed, plant=plant)
    except SimulationError as error:
        return error
    errors = error_report(out, q, k, v, lse=lse, causal=causal)
    return "healthy" if errors.ok else "wrong-result"


def planted_line(plant: Plant, file: str, line: int) -> str:
    text = (KERNELS_DIR / file).read_text(encoding="utf-8")
    if file == plant.file:
        text = text.replace(plant.find, plant.replace)
    lines = text.splitlines()
    return " ".join(lines[line - 1 : line + 1])  # a call may begin on one line and end on the next


@pytest.mark.parametrize("name", PLANTS_CAUSAL_SM90)
def test_a_planted_bug_under_a_right_bound_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS_CAUSAL_SM90[name]
    assert run_plant(None, 0, plan_of(plant, causal=True), causal=True) == "healthy"
    for seed in seeds_of(plant):
        found = run_plant(plant, seed, causal=True)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("name", PLANTS_SM90)
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS_SM90[name]
    for seed in seeds_of(plant):
        found = run_plant(plant, seed)
        if isinstance(found, str):
            assert found == plant.caught_by, f"seed {seed}"
            continue
        assert found.kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"
        assert found.seed == seed
        for agent in filter(None, (found.agent, found.other)):
            text = planted_line(plant, agent.file, agent.line)
            assert any(part in text for part in NAMED_LINES[name]), f"{found}: {text}"


def test_the_replay_command_repeats_the_run() -> None:
    found = run_plant(PLANTS_SM90["o-part-overwritten"], seed=3)
    assert isinstance(found, SimulationError)
    replay = parse_replay(shlex.split(found.replay)[3:])
    assert replay.plan == plan_of(PLANTS_SM90["o-part-overwritten"])
    with pytest.raises(SimulationError) as again:
        replay.run()
    assert str(again.value) == str(found)


@pytest.mark.parametrize("o_parts", O_PARTS)
def test_without_a_plant_the_same_runs_are_healthy(o_parts: int) -> None:
    plan = dataclasses.replace(PLAN, o_parts=o_parts)
    assert {run_plant(None, seed, plan) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS_SM90)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    plant = PLANTS_SM90[name]
    check_text(name, plant)
    assert (plant.caught_by in ALARM_KINDS) == (name in NAMED_LINES)


def test_sources_without_a_plant_have_no_trace_of_one() -> None:
    assert "plant" not in generate_source(PLAN, "host")


def test_the_documentation_lists_every_plant() -> None:
    assert undocumented([*PLANTS_SM90, *PLANTS_CAUSAL_SM90]) == []


@pytest.mark.parametrize("name", PLANTS_CAUSAL_SM90)
def test_so_does_one_under_a_right_bound(name: str) -> None:
    check_text(name, PLANTS_CAUSAL_SM90[name])
