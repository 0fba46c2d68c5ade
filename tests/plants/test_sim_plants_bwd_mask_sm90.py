"""Run the planted-bug suite of the kernel of a mask's gradient; see test_sim_plants.py."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import pytest
import torch
from gradient_rule import forward
from mask_gradients import wrong_mask_gradient
from plant_checks import check_text, undocumented

from flashcore.backends.mask_gradient import run_for_mask
from flashcore.kernels.bwd_mask_sm90.plan import select_mask_plan
from flashcore.sim import Plant, SimulationError
from flashcore.sim.plants.bwd_mask_sm90 import OF_ROWS
from flashcore.sim.plants.bwd_mask_sm90 import PLANTS_BWD_MASK_SM90 as PLANTS
from flashcore.sim.run_bwd import simulate_backward

pytestmark = pytest.mark.thorough

SEEDS = range(20)


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
    for seed in SEEDS:
        found = run_plant(plant, seed, name in OF_ROWS)
        kind = found if isinstance(found, str) else found.kind
        assert kind in (plant.caught_by, *plant.or_by), f"seed {seed}:\n{found}"


@pytest.mark.parametrize("sums_rows", [False, True])
def test_without_a_plant_the_same_runs_are_healthy(sums_rows: bool) -> None:
    assert {run_plant(None, seed, sums_rows) for seed in SEEDS} == {"healthy"}


@pytest.mark.parametrize("name", PLANTS)
def test_a_plant_changes_one_place_and_moves_no_line(name: str) -> None:
    check_text(name, PLANTS[name])


def test_the_documentation_lists_every_plant() -> None:
    page = Path(__file__).parent.parent.parent / "docs" / "backward.md"
    assert undocumented(PLANTS, page) == []
