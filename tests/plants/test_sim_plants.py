"""Run the planted-bug suite: mistakes in the real kernel that must be found, each by the right
check, with every seed. It tests the simulator and the error rule, as they test the kernel."""

from __future__ import annotations

import pytest
import torch
from parameters import thorough_but
from plant_checks import SOME_SEEDS, seeds_of

from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.compile.codegen import KERNELS_DIR, generate_source
from flashcore.problem import Problem
from flashcore.problem.case import Case
from flashcore.selection.select import select_plan
from flashcore.sim import PLANTS, Plant, SimulationError, simulate
from flashcore.sim.report import ALARM_KINDS

# One head, so that rows past the end are past the tensor's end; lengths that leave tails.
SHAPE = {"num_heads_q": 1, "num_heads_kv": 1, "seqlen_q": 92, "seqlen_k": 118}

# Texts of the lines that a report must name, of either side.
NAMED_LINES = {
    "pv-atomic": ("smem_atomic_add(u_smem",),
    "no-barrier": ("wmma_load_", "cp_async<"),
    "tail-oob": ("gmem_store_packet(",),
    "uninit-smem": ("wmma_load_",),
    "deadlock": ("block_sync();",),
}


def run_plant(plant: Plant | None, seed: int) -> SimulationError | str:
    """Run a plant; return the alarm, or "wrong-result", or "healthy"."""
    case = Case(**SHAPE, seed=seed)
    x = make_inputs(case)
    problem = Problem.from_tensors(x.q, x.k, x.v, return_lse=True)
    out = torch.empty(1, 1, case.seqlen_q, 64, dtype=torch.float16)
    lse = torch.empty(1, 1, case.seqlen_q)
    try:
        simulate(
            problem,
            select_plan(problem, arch=80),
            x.q,
            x.k,
            x.v,
            None,
            out,
            lse,
            seed=seed,
            plant=plant,
        )
    except SimulationError as error:
        return error
    return "healthy" if error_report(out, x.q, x.k, x.v, lse=lse).ok else "wrong-result"


def planted_line(plant: Plant, file: str, line: int) -> str:
    text = (KERNELS_DIR / file).read_text(encoding="utf-8")
    if file == plant.file:
        text = text.replace(plant.find, plant.replace)
    return text.splitlines()[line - 1]


@pytest.mark.parametrize("name", thorough_but(("pv-atomic", "no-barrier", "tail-oob"), PLANTS))
def test_a_planted_bug_is_caught_with_every_seed(name: str) -> None:
    plant = PLANTS[name]
    for seed in seeds_of(plant):
        found = run_plant(plant, seed)
        if isinstance(found, str):
            assert found == plant.caught_by, f"seed {seed}"
            continue
        assert found.kind == plant.caught_by, f"seed {seed}:\n{found}"
        assert found.seed == seed
        for agent in filter(None, (found.agent, found.other)):
            text = planted_line(plant, agent.file, agent.line)
            assert any(part in text for part in NAMED_LINES[name]), f"{agent}: {text}"


def test_without_a_plant_the_same_runs_are_healthy() -> None:
    assert {run_plant(None, seed) for seed in SOME_SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    plant = PLANTS[name]
    assert plant.name == name
    assert plant.caught_by in {*ALARM_KINDS, "wrong-result"}
    assert plant.find.count("\n") == plant.replace.count("\n")
    assert (plant.caught_by in ALARM_KINDS) == (name in NAMED_LINES)
    text = (KERNELS_DIR / plant.file).read_text(encoding="utf-8")
    assert text.count(plant.find) == 1
    assert plant.replace not in text


def test_sources_without_a_plant_have_no_trace_of_one() -> None:
    x = make_inputs(Case(**SHAPE))
    plan = select_plan(Problem.from_tensors(x.q, x.k, x.v), arch=80)
    source = generate_source(plan, "host")
    assert not any(plant.replace in source for plant in PLANTS.values())
    assert "plant" not in source
