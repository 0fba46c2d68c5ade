"""Test few queries a head (pack-GQA): the heads of a group are rows of one, on both kernels; see
problem/folding.py."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch
from parameters import thorough_but

import flashcore
import flashcore.sim
from backends import check, check_case
from flashcore.base import env
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import make_inputs
from flashcore.problem import Problem, folding
from flashcore.problem.case import Case
from flashcore.problem.folding import MAX_QUERIES, can_fold, fold_heads, with_copied_q
from flashcore.selection.select import select_plan
from flashcore.sim import simulate

ARCHS = ["80", "90"]


def case_of(**changes: Any) -> Case:
    sizes = {"batch": 2, "num_heads_q": 6, "num_heads_kv": 2, "seqlen_q": 1, "seqlen_k": 90}
    return Case(**(sizes | {"head_dim": 32, "head_dim_v": 40} | changes))


def problem_of(case: Case) -> Problem:
    x = make_inputs(case)
    return Problem.from_tensors(x.q, x.k, x.v, mask=x.mask, return_lse=True, **case.options())


# Rows of one query see the same keys, whatever hides the others; of several, the row says which
# query it is. 22 queries of 3 heads are more rows than a tile of 64 has.
CASES = [
    case_of(),
    case_of(causal="lower_right"),
    case_of(causal="upper_left", layout="bshd"),
    case_of(window=(20, 5), tail=2),
    case_of(window=(3, 0), causal="upper_left"),
    case_of(mask="bool", softcap=5.0, layout="bshd"),
    case_of(mask="padding"),
    case_of(mask="additive", window=(60, 0)),
    case_of(num_heads_kv=1, batch=1, dtype="bfloat16", layout="bshd"),
    case_of(seqlen_q=5),
    case_of(seqlen_q=5, causal="lower_right"),
    case_of(seqlen_q=22, causal="lower_right", window=(30, 0)),
    case_of(seqlen_q=22, causal="upper_left", mask="padding"),
    case_of(seqlen_q=7, window=(40, 3), softcap=5.0),
    case_of(seqlen_q=7, seqlen_k=4, causal="lower_right"),  # queries that see no key
    case_of(seqlen_q=3, mask="bool", causal="lower_right"),
]


# A mask and a cap, another dtype, several queries; the others find what few would miss.
FEW = thorough_but([CASES[i] for i in (5, 8, 11)], CASES)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", FEW, ids=Case.describe)
def test_folded_heads_give_what_they_gave(
    monkeypatch: pytest.MonkeyPatch, case: Case, arch: str
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, arch)
    assert select_plan(problem_of(case), int(arch)).folds_heads
    check_case("sim", case)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "wmma"])
@pytest.mark.parametrize("case", CASES, ids=Case.describe)
def test_on_a_gpu_too(case: Case, backend: str) -> None:
    check_case(backend, case)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seqlen_q", thorough_but((4,), (1, 4)))
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": "lower_right"}, {"causal": "upper_left"}, {"window": (9, 2)}],
    ids=str,
)
def test_bounds_follow_each_sequences_own_length(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], seqlen_q: int, arch: str
) -> None:
    """The diagonal lies where the last of the queries, not of the rows, sees the last key."""
    monkeypatch.setenv(env.SIM_ARCH.name, arch)
    x = make_inputs(case_of(batch=3, seqlen_q=seqlen_q, head_dim_v=32))
    seqlens_k = torch.tensor([90, 0, 37], dtype=torch.int32)
    out, lse = flashcore.attention(
        x.q, x.k, x.v, seqlens_k=seqlens_k, return_lse=True, backend="sim", **options
    )
    for b, n in enumerate(seqlens_k.tolist()):
        own = slice(b, b + 1)
        if n == 0:
            assert not out[own].any()
            continue
        q, k, v = x.q[own], x.k[own, :, :n], x.v[own, :, :n]
        report = error_report(out[own], q, k, v, lse=lse[own], **options)
        assert report.ok, f"sequence {b}: {report}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("with_lengths", [False, True])
def test_q_is_copied_where_that_pays(
    monkeypatch: pytest.MonkeyPatch, with_lengths: bool, arch: str
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, arch)
    case = case_of(seqlen_q=3, layout="bshd", causal="lower_right", seed=7)
    x, problem = make_inputs(case), problem_of(case)
    assert with_copied_q(problem) is None  # 90 keys are read again in no time
    monkeypatch.setattr(folding, "COPY_PAYS_BYTES", 0)
    copied = with_copied_q(problem)
    assert copied is not None
    assert can_fold(copied)
    seen = []
    monkeypatch.setattr(
        flashcore.sim, "simulate", lambda *args, **options: seen.append(args) or simulate(*args)
    )
    lengths = torch.tensor([90, 90], dtype=torch.int32) if with_lengths else None
    options: dict[str, Any] = {"seqlens_k": lengths, "causal": True, "return_lse": True}
    out, lse = flashcore.attention(x.q, x.k, x.v, backend="sim", **options)
    assert error_report(out, x.q, x.k, x.v, lse=lse, causal=True).ok
    ((launched, plan, q, *_),) = seen
    assert plan.folds_heads
    assert q.is_contiguous()
    assert launched.q_strides == q.stride()[:3]
    text = str(flashcore.explain(x.q, x.k, x.v, backend="sim", file=io.StringIO()))
    assert "q is copied: heads that share one of k and v" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads_kv": 6},
        {"seqlen_q": 1},
        {"seqlen_q": 33},
        {"mask": "additive"},
        {"layout": "bhsd"},
    ],
    ids=str,
)
def test_q_is_copied_only_to_fold(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    monkeypatch.setattr(folding, "COPY_PAYS_BYTES", 0)
    sizes = {"seqlen_q": 3, "layout": "bshd"}
    assert with_copied_q(problem_of(case_of(**(sizes | changes)))) is None


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_every_head_has_its_own_mask(
    monkeypatch: pytest.MonkeyPatch, seqlen_q: int, arch: str
) -> None:
    monkeypatch.setenv(env.SIM_ARCH.name, arch)
    x = make_inputs(case_of(seqlen_q=seqlen_q))
    mask = torch.randn(1, 6, seqlen_q, 90).half()
    assert select_plan(Problem.from_tensors(x.q, x.k, x.v, mask=mask)).folds_heads
    check("sim", x.q, x.k, x.v, mask=mask)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_strides_describe_the_same_memory(seqlen_q: int, layout: str) -> None:
    case = case_of(seqlen_q=seqlen_q, layout=layout, tail=0 if layout == "bhsd" else 2)
    q = make_inputs(case).q
    problem = problem_of(case)
    assert can_fold(problem) == (seqlen_q == 1 or layout == "bhsd")
    if not can_fold(problem):
        return
    folded = fold_heads(problem, 3)
    assert (folded.num_heads_q, folded.seqlen_q, folded.group_size) == (2, 3 * seqlen_q, 1)
    assert not can_fold(folded)
    view = q.as_strided((2, 2, 3 * seqlen_q, 32), (*folded.q_strides, 1), q.storage_offset())
    assert torch.equal(view, q.reshape(view.shape))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_part_of_a_group_may_be_folded(layout: str) -> None:
    case = case_of(num_heads_q=12, num_heads_kv=2, layout=layout, mask="bool", tail=2)
    q, problem = make_inputs(case).q, problem_of(case)
    folded = fold_heads(problem, 3)
    assert (folded.num_heads_q, folded.seqlen_q, folded.group_size) == (4, 3, 2)
    view = q.as_strided((2, 4, 3, 32), (*folded.q_strides, 1), q.storage_offset())
    assert torch.equal(view, q.reshape(view.shape))
    assert folded.mask is not None
    assert problem.mask is not None
    of_head = problem.mask.strides[1]
    assert folded.mask.strides[1:3] == (3 * of_head, of_head)


@pytest.mark.parametrize("num_heads", [0, 4, 12])
def test_heads_are_folded_by_a_divisor_of_the_group(num_heads: int) -> None:
    problem = problem_of(case_of(num_heads_q=12, num_heads_kv=2))
    with pytest.raises(ValueError, match=f"num_heads={num_heads}.*divisor of the group's 6"):
        fold_heads(problem, num_heads)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads_kv": 6},  # no groups
        {"seqlen_q": MAX_QUERIES + 1},
        {"seqlen_q": 5, "tail": 1},  # heads lie a row further apart
        {"seqlen_q": 5, "mask": "additive"},  # a mask for all heads, with rows of its own
    ],
    ids=str,
)
def test_what_cannot_be_folded_is_left_alone(changes: dict[str, Any]) -> None:
    case = case_of(**changes)
    assert not can_fold(problem_of(case))
    assert not select_plan(problem_of(case), 90).folds_heads
    check_case("sim", case)


def test_packed_sequences_and_gates_are_not_folded() -> None:
    problem = problem_of(case_of())
    assert not can_fold(dataclasses.replace(problem, varlen="packed"))
    for arch in (80, 90):
        assert not select_plan(problem, arch, gate="qk").folds_heads


def test_a_group_shares_a_block_and_unbounded_rows_need_no_other_kernel() -> None:
    from flashcore.kernels.fwd_sm90.params import num_row_tiles
    from flashcore.kernels.fwd_sm90.plan import Sm90Plan

    one, several = (problem_of(case_of(seqlen_q=n)) for n in (1, 22))
    for problem, tiles in ((one, 4), (several, 8)):
        plan = select_plan(problem, 90)
        assert isinstance(plan, Sm90Plan)
        assert num_row_tiles(problem, dataclasses.replace(plan, block_m=64)) == tiles
        assert not plan.constants()["FOLDED"]
