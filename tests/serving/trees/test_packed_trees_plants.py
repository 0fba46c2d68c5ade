"""Plant bugs in how packed sequences come to their trees. They stand here, as `isolate` has no call
of packed queries with trees; see plants/test_sim_plants_trees.py for padded ones."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import pytest
import torch
from pages import Cache, make_cache
from plant_checks import SOME_SEEDS, check_text

from flashcore.checks.accuracy import error_report
from flashcore.checks.planned import with_fields
from flashcore.compile.plant import Plant, by_name
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.ops.paged_varlen import packed_pages_problem
from flashcore.problem import Problem
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs, Options
from flashcore.selection.select import select_plan
from flashcore.sim import SimulationError, simulate
from flashcore.sim.replay import parse_replay
from flashcore.sim.replay_command import replay_command

pytestmark = pytest.mark.thorough

_FILE = "tile/sequence.cuh"
PLANTS = by_name(
    Plant(
        name="packed-tree-of-the-longest",
        title="a sequence of more queries than trees have rows reads one",
        file=_FILE,
        find="num_queries > p.lengths.tree_size ? 0x7fffffff : num_keys - num_queries;",
        replace="num_keys - num_queries;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="packed-tree-whole",
        title="a tree begins as many keys before the end as it has columns, not queries",
        file=_FILE,
        find="0x7fffffff : num_keys - num_queries;",
        replace="0x7fffffff : num_keys - p.lengths.tree_size;",
        caught_by="wrong-result",
    ),
    Plant(
        name="packed-tree-of-rows",
        title="heads that are folded count as queries of a tree",
        file=_FILE,
        find="own.band.tree_begin = tree_begin(p, num_queries, own.seqlen_k);",
        replace="own.band.tree_begin = own.seqlen_k - rows_of_queries(p, num_queries);",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
        plan={"folds_heads": 2},
    ),
)
# A tree, one token, a part of a tree, and behind the trees' memory a chunk longer than them.
COUNTS, LENGTHS, SIZE = (5, 1, 3, 9), (67, 33, 300, 60), 5
TILES: dict[str, dict[str, Any]] = {
    WMMA: {"block_m": 64},
    SM90: {"block_m": 64, "block_n": 32, "num_stages": 2, "min_blocks": 1, "stream_k": False},
}


def call_of(kernel: str) -> tuple[Cache, Inputs, Problem, Plan]:
    """Return a cache, the tensors of a call, its problem and its plan."""
    x = make_cache(16, LENGTHS, seqlen_q=max(COUNTS), num_heads_q=4, num_heads_kv=2, seed=5)
    q = torch.cat([rows[:, :n].transpose(0, 1) for rows, n in zip(x.q, COUNTS, strict=True)])
    ends = torch.tensor([0, *COUNTS]).cumsum(0).int()
    drawn = torch.rand(len(COUNTS), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    tree = (drawn < 0.5) | torch.eye(SIZE, dtype=torch.bool)
    inputs = x.inputs()._replace(q=q, cu_seqlens_q=ends, max_seqlen_q=9, tree_mask=tree)
    problem = packed_pages_problem(inputs, Options.checked(False, None, None, None))
    plan = select_plan(problem, 90 if kernel == SM90 else 80, kernel=kernel)
    return x, inputs, problem, with_fields(plan, TILES[kernel])


def run(kernel: str, seed: int, plant: Plant | None, **fields: Any) -> str:
    """Run a call; return the kind of the alarm, or "wrong-result", or "healthy"."""
    x, inputs, problem, plan = call_of(kernel)
    plan = dataclasses.replace(plan, **fields)
    q, tree, ends = inputs.q, inputs.tree_mask, inputs.cu_seqlens_q
    assert tree is not None
    assert ends is not None
    out, lse = torch.empty_like(q), torch.empty(4, q.shape[0])
    others = x.others() | {"cu_seqlens_q": ends}
    tensors = as_batch(q), x.k_pages, x.v_pages, tree, out, lse
    try:
        simulate(problem, plan, *tensors, None, others, seed=seed, plant=plant)
    except SimulationError as error:
        return error.kind
    for b, (n, keys) in enumerate(zip(COUNTS, LENGTHS, strict=True)):
        rows, mask = slice(int(ends[b]), int(ends[b + 1])), torch.ones(n, keys, dtype=torch.bool)
        if n <= SIZE:
            mask[:, keys - n :] = tree[b, 0, :n, :n]
        pair = as_batch(out[rows]), as_batch(q[rows])
        report = error_report(*pair, *x.sequence(b)[1:], lse=lse[None, :, rows], mask=mask)
        if not report.ok:
            return "wrong-result"
    return "healthy"


# The portable kernel folds heads where blocks share keys alone.
PLANTED = [*((name, SM90) for name in PLANTS), *((name, WMMA) for name in list(PLANTS)[:2])]


@pytest.mark.parametrize(("name", "kernel"), PLANTED)
def test_a_planted_bug_is_caught(name: str, kernel: str) -> None:
    check_text(name, PLANTS[name])
    plant = PLANTS[name]
    found = {run(kernel, seed, plant, **plant.plan) for seed in SOME_SEEDS}
    assert found <= {plant.caught_by, *plant.or_by}


@pytest.mark.parametrize(("kernel", "folds_heads"), [(WMMA, 0), (SM90, 0), (SM90, 2)])
def test_without_a_plant_the_same_runs_are_healthy(kernel: str, folds_heads: int) -> None:
    found = {run(kernel, seed, None, folds_heads=folds_heads) for seed in SOME_SEEDS}
    assert found == {"healthy"}


@pytest.mark.parametrize("kernel", [WMMA, SM90])
def test_a_replay_has_the_same_trees(kernel: str) -> None:
    x, inputs, problem, plan = call_of(kernel)
    tree, ends = inputs.tree_mask, inputs.cu_seqlens_q
    assert tree is not None
    assert ends is not None
    named = {"q": as_batch(inputs.q), "k": x.k_pages, "v": x.v_pages, "mask": tree}
    named |= x.others() | {"cu_seqlens_q": ends}
    command = replay_command(problem, plan, named, seed=1, plant=None)
    again = parse_replay(shlex.split(command)[3:])
    assert (again.problem, again.plan) == (problem, plan)
    assert again.mask is not None
    assert torch.equal(again.mask, tree.expand_as(again.mask))
    again.run()
