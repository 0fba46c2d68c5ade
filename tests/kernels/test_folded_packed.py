"""Test packed queries whose heads are folded (pack-GQA on the Hopper kernel, tile/folded_rows.cuh):
a group's heads are rows of one row tile, so that decodes read their keys once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pages import check_packed, packed_over_pages
from parameters import thorough_but

import flashcore
from backends import GPU, SIM90, device_of, on_sim90
from flashcore.backends.packed import packed_problem
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.ops.paged_varlen import attention_paged_varlen
from flashcore.problem import Problem
from flashcore.problem.folding import BOX_ROWS, MAX_MEAN_QUERIES, heads_of_packed_rows
from flashcore.selection.select import select_plan

every_backend = pytest.mark.parametrize("backend", [SIM90, GPU])

# A part of a prompt, no query, no key, decodes: 64 rows hold 21 queries of 3 heads, 8 of 8.
COUNTS = (45, 0, 3, 1, 1)
LENGTHS = (70, 20, 0, 97, 64)
CASE = VarlenCase(
    lengths_q=COUNTS, lengths_k=LENGTHS, num_heads_q=6, num_heads_kv=2, head_dim=32,
    head_dim_v=40, causal="lower_right", tail=3, sinks=True,
)  # fmt: skip
CASES = [
    CASE,
    dataclasses.replace(
        CASE, num_heads_q=8, num_heads_kv=1, window=(30, 5), causal="none", softcap=5.0,
        sinks=False, dtype="bfloat16", tail=0, overrun=9,
    ),
]  # fmt: skip
MORE = [
    dataclasses.replace(CASE, num_heads_q=14, causal="none", sinks=False),
    dataclasses.replace(CASE, num_heads_q=13, num_heads_kv=1, causal="upper_left"),
    dataclasses.replace(CASE, num_heads_q=64, num_heads_kv=1),
    dataclasses.replace(CASE, num_heads_q=24, num_heads_kv=1, window=(9, 0)),
]


def problem_of(case: VarlenCase) -> Problem:
    return packed_problem(*make_varlen_inputs(case).arguments(), **case.options())


def attend_varlen(backend: str, case: VarlenCase, **options: Any) -> Any:
    """Return what attention_varlen does, and the inputs; keys are so many that heads are folded."""
    x = make_varlen_inputs(case, device_of(backend))
    return x, flashcore.attention_varlen(
        *x.arguments(), return_lse=True, backend=backend, sinks=x.sinks, **case.options(), **options
    )


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(c, marks=pytest.mark.thorough) for c in MORE)],
    ids=VarlenCase.describe,
)  # fmt: skip
@every_backend
def test_every_sequence_is_as_if_alone(
    backend: str, case: VarlenCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = on_sim90(backend, monkeypatch)
    assert select_plan(problem_of(case), 90).folds_heads == case.num_heads_q // case.num_heads_kv
    x, (out, lse) = attend_varlen(backend, case)
    report = varlen_error_report(out, lse, case, x)
    assert report is not None
    assert report.ok, f"{case.describe()}: {report}"


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(10))
def test_no_schedule_raises_an_alarm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHCORE_SIM_SEED", str(seed))
    backend = on_sim90("sim90", monkeypatch)
    for case in CASES:
        x, (out, lse) = attend_varlen(backend, dataclasses.replace(case, seed=seed))
        report = varlen_error_report(out, lse, dataclasses.replace(case, seed=seed), x)
        assert report is not None
        assert report.ok, f"{case.describe()}: {report}"


@pytest.mark.thorough
@every_backend
def test_the_largest_score_of_each_head(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one tile are of several heads, and some are nobody's."""
    backend = on_sim90(backend, monkeypatch)
    x, (_, _, most) = attend_varlen(backend, CASE, return_max_score=True)
    q, k, v, ends_q, ends_k, *longest = (t.cpu() if isinstance(t, torch.Tensor) else t
                                         for t in x.arguments())  # fmt: skip
    *_, want = flashcore.attention_varlen(
        q.double(), k.double(), v.double(), ends_q, ends_k, *longest, return_lse=True,
        return_max_score=True, backend="torch", sinks=x.sinks.cpu(), **CASE.options(),
    )  # fmt: skip
    torch.testing.assert_close(most.cpu().double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cache_dtype", thorough_but(("float8_e4m3fn",), ("", "float8_e4m3fn")))
@every_backend
def test_caches_in_pages(backend: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = on_sim90(backend, monkeypatch)
    cache, q, (out, lse) = packed_over_pages(backend, COUNTS, LENGTHS, cache_dtype=cache_dtype)
    check_packed(cache, COUNTS, q, out, lse, causal=True)


@pytest.mark.thorough
@every_backend
def test_neighbours_do_not_matter_to_batch_invariant_calls(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence alone, and before a prompt, whose rows make other tiles and other work."""
    backend = on_sim90(backend, monkeypatch)
    cache, q, (out, lse) = packed_over_pages(backend, (2, 30), (70, 40), batch_invariant=True)
    _, *of_keys = cache.arguments()
    ends = torch.tensor([0, 2], device=q.device).int()
    table, told = of_keys[2][:1], of_keys[3][:1]
    own, own_lse = attention_paged_varlen(
        q[:2], *of_keys[:2], table, told, ends, 2, return_lse=True, causal=True, backend=backend,
        batch_invariant=True,
    )  # fmt: skip
    assert torch.equal(own, out[:2])
    assert torch.equal(own_lse, lse[:, :2])


def problem_with(**changes: Any) -> Problem:
    return dataclasses.replace(problem_of(CASE), **changes)


@pytest.mark.parametrize(
    ("group", "folded"),
    [(1, 0), (2, 2), (3, 3), (5, 5), (7, 7), (8, 8), (16, 16), (32, 32), (64, 64), (71, 0),
     (128, 64), (48, 48), (72, 24), (23, 0)],
)  # fmt: skip
def test_how_many_heads_are_folded(group: int, folded: int) -> None:
    """A divisor of the group of which boxes of 64 rows are nearly full."""
    assert heads_of_packed_rows(problem_with(num_heads_q=2 * group)) == folded
    assert folded == 0 or BOX_ROWS // folded * folded >= 48


def test_which_calls_are_folded() -> None:
    few = problem_with(batch=64, total_q=64 + 2047, total_k=64 * 4096)
    assert heads_of_packed_rows(few) == 3
    # Prompts over themselves, as in training, and long parts of prompts, are computed as before.
    assert heads_of_packed_rows(dataclasses.replace(few, total_k=few.total_q)) == 0
    many = MAX_MEAN_QUERIES * 64
    assert heads_of_packed_rows(dataclasses.replace(few, total_q=many, total_k=8 * many)) == 3
    long = dataclasses.replace(few, total_q=many + 1, total_k=8 * many)
    assert heads_of_packed_rows(long) == 0
    # The neighbours do not decide where they must not.
    pages = dataclasses.replace(long, varlen="packed_pages", page_size=16, batch_invariant=True)
    assert heads_of_packed_rows(pages) == 3
    assert heads_of_packed_rows(dataclasses.replace(few, batch_invariant=True)) == 0
    # A debug gate shows rows as they were asked for, and the portable kernel folds none of these.
    assert select_plan(problem_of(CASE), 90, gate="qk").folds_heads == 0
    assert select_plan(problem_of(CASE), 80).folds_heads == 0


def test_few_rows_have_the_tile_for_reading() -> None:
    """Decodes of 64 rows or less have one consumer and two blocks an SM."""
    decodes = problem_with(
        batch=64, total_q=64, total_k=64 * 4096, seqlen_q=1, seqlen_k=4096, num_heads_q=32,
        num_heads_kv=8, head_dim=128, head_dim_v=128,
    )  # fmt: skip
    plan = select_plan(decodes, 90)
    assert isinstance(plan, Sm90Plan)
    assert (plan.block_m, plan.min_blocks, plan.folds_heads) == (64, 2, 4)


def test_tokens_beside_a_prompt_have_two_blocks_an_sm_over_small_pages() -> None:
    """One warp loads a tile's pages, and there are two (docs/ladder-decoding.md)."""
    mixed = problem_with(
        batch=64, total_q=63 + 2048, total_k=0, seqlen_q=2048, seqlen_k=4096, num_heads_q=32,
        num_heads_kv=8, head_dim=128, head_dim_v=128, varlen="packed_pages", page_size=16,
    )  # fmt: skip

    def rows_and_blocks(**changes: Any) -> tuple[int, int]:
        plan = select_plan(dataclasses.replace(mixed, **changes), 90)
        return plan.block_m, plan.min_blocks

    assert rows_and_blocks() == (64, 2)
    assert rows_and_blocks(page_size=256) == (128, 1)
    assert rows_and_blocks(total_q=63 + 8192, seqlen_q=8192) == (128, 1)
    assert rows_and_blocks(seqlen_q=33) == (128, 1)  # all alike
    assert rows_and_blocks(seqlen_q=2111) == (128, 1)  # no more than a bound


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("mean", [1, 5, 40, 500])
def test_two_consumers_at_most_share_the_registers(head_dim: int, mean: int) -> None:
    """Three spill. With 8-bit caches, windows and soft-capping 128 keys do, too."""
    problem = problem_with(
        batch=64, total_q=64 * mean, total_k=64 * 8192, seqlen_q=mean, seqlen_k=8192,
        num_heads_q=8, num_heads_kv=2, head_dim=head_dim, head_dim_v=head_dim,
    )  # fmt: skip
    plan = select_plan(problem, 90)
    assert isinstance(plan, Sm90Plan)
    assert plan.folds_heads == 4
    assert plan.num_consumers <= 2
    pages = {"varlen": "packed_pages", "page_size": 16, "total_k": 0, "load_bytes": 16}
    crowded = {"cache_dtype": "float8_e4m3fn", "softcap": 30.0, "window_left": 64, **pages}
    assert select_plan(dataclasses.replace(problem, **crowded), 90).block_n <= 64
