"""Test Problem: what the arguments are normalised to."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flashcore.checks.reference import visible_pairs
from flashcore.problem import Problem
from flashcore.problem.memory_layout import MaskSpec


def tensors(batch=1, heads=1, seqlen_q=5, seqlen_k=7, dtype=torch.float16):
    return (
        torch.zeros(batch, heads, seqlen_q, 16, dtype=dtype),
        torch.zeros(batch, heads, seqlen_k, 16, dtype=dtype),
        torch.zeros(batch, heads, seqlen_k, 16, dtype=dtype),
    )


@pytest.mark.parametrize("seqlen_q", range(1, 6))
@pytest.mark.parametrize("seqlen_k", range(1, 6))
def test_band_is_what_was_asked_and_no_bound_is_idle(seqlen_q, seqlen_k):
    """All windows and alignments: the band shows exactly the visible keys, and a bound that is kept
    hides a key (a kernel tests every bound that is kept)."""
    qkv = tensors(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    i = torch.arange(seqlen_q)[:, None]
    j = torch.arange(seqlen_k)[None, :]
    for causal, left, right in itertools.product(
        (False, "lower_right", "upper_left"), range(-1, 7), range(-1, 7)
    ):
        p = Problem.from_tensors(*qkv, causal=causal, window=(left, right))
        nothing = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
        too_early = j < i + p.diag_offset - p.window_left if p.window_left >= 0 else nothing
        too_late = j > i + p.diag_offset + p.window_right if p.window_right >= 0 else nothing
        want = visible_pairs(seqlen_q, seqlen_k, causal, (left, right))
        assert torch.equal(~(too_early | too_late), want)
        assert too_early.any() == (p.window_left >= 0)
        assert too_late.any() == (p.window_right >= 0)


def test_positions_stay_within_32_bits():
    q, k, v = (x.expand(1, 1, 2**30 - 1, 16) for x in tensors(seqlen_q=1, seqlen_k=1))
    for causal, window in itertools.product(
        (False, "lower_right", "upper_left"), (None, (10**12, 10**12), (2**30 - 3, 2**30 - 3))
    ):
        for a, b in ((q, k), (q[:, :, :1], k), (q, k[:, :, :1])):
            p = Problem.from_tensors(a, b, v[:, :, : b.shape[2]], causal=causal, window=window)
            last = p.seqlen_q - 1 + p.diag_offset
            assert abs(p.diag_offset) + p.seqlen_q < 2**31
            assert p.diag_offset - p.window_left > -(2**31)
            assert last + p.window_right < 2**31


def test_equal_calls_make_equal_keys():
    """A Problem is the key of the plan cache: what changes no kernel changes no Problem."""
    q, k, v = tensors()
    problem = Problem.from_tensors(q, k, v)
    for same in (
        {"window": (-1, -1)},
        {"window": (100, 100)},
        {"scale": 0.25},
        {"causal": False},
    ):
        assert Problem.from_tensors(q, k, v, **same) == problem
    assert hash(Problem.from_tensors(q.clone(), k, v)) == hash(problem)
    # A dimension of size 1 has no stride worth a mention.
    assert Problem.from_tensors(q.as_strided(q.shape, (999, 7, 16, 1)), k, v) == problem
    assert problem.scale == 1 / math.sqrt(16)


def test_single_query_that_sees_all_keys_has_no_bound():
    q, k, v = tensors(seqlen_q=1)
    problem = Problem.from_tensors(q, k, v, causal=True)
    assert (problem.window_left, problem.window_right) == (-1, -1)
    assert problem.causal == "lower_right"


@pytest.mark.parametrize(
    ("offset", "head", "row", "want"),
    [
        (0, 512, 16, 16),
        (8, 512, 16, 16),
        (4, 512, 16, 8),
        (2, 512, 16, 4),
        (1, 512, 16, 2),
        (0, 512, 20, 8),
        (0, 512, 17, 2),
        (0, 514, 16, 4),
    ],
)
@pytest.mark.parametrize("which", range(3))
def test_load_bytes(offset, head, row, want, which):
    """One tensor at an offset, or with heads or rows apart, narrows the loads of all."""
    qkv = list(tensors(heads=2))
    storage = torch.zeros(2048, dtype=torch.float16)
    start = offset + (-storage.data_ptr() // 2) % 8  # 16-byte aligned, plus the offset
    qkv[which] = storage.as_strided(qkv[which].shape, (1024, head, row, 1), start)
    assert Problem.from_tensors(*qkv).load_bytes == want


def test_strides_of_dimensions_that_are_stepped_along():
    q, k, v = tensors(batch=2, heads=2)
    problem = Problem.from_tensors(
        q, k.transpose(1, 2).contiguous().transpose(1, 2), v[:1].expand_as(v)
    )
    assert problem.q_strides == (160, 80, 16)
    assert problem.k_strides == (224, 16, 32)
    assert problem.v_strides == (0, 112, 16)


def test_mask_strides():
    q, k, v = tensors(batch=2, heads=3)

    def spec(mask):
        return Problem.from_tensors(q, k, v, mask=mask).mask

    assert spec(torch.ones(5, 7)) == MaskSpec("float32", (0, 0, 7, 1), 4)
    assert spec(torch.ones(2, 1, 1, 7).bool()) == MaskSpec("bool", (7, 0, 0, 1), 1)
    assert spec(torch.ones(2, 3, 7, 5).half().mT) == MaskSpec("float16", (105, 35, 1, 5), 2)
    assert spec(torch.ones(()).expand(2, 3, 5, 7)) == MaskSpec("float32", (0, 0, 0, 0), 4)
