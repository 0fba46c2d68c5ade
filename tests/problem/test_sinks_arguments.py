"""Test what is taken for sinks, and what else they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from roads import HEADS_Q, dense_inputs, lengths, packed_inputs
from sinks_by_formula import ROADS, SINKS, by_formula, expected

import flashcore
from flashcore.compat import flash_attn

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a list": ([0.0] * 4, TypeError, "sinks must be a torch.Tensor"),
    "integers": (torch.zeros(4, dtype=torch.int32), TypeError, r"sinks has dtype .*sinks\.float"),
    "float64": (torch.zeros(4).double(), TypeError, "sinks has dtype torch.float64"),
    "bfloat16": (torch.zeros(4).bfloat16(), TypeError, "sinks has dtype torch.bfloat16"),
    "too many": (torch.zeros(5), ValueError, r"sinks has shape \[5\], but q has 4 heads"),
    "one for all": (torch.zeros(1), ValueError, r"sinks has shape \[1\], but q has 4 heads"),
    "a column": (torch.zeros(4, 1), ValueError, r"sinks has shape \[4, 1\]"),
    "meta": (torch.zeros(4, device="meta"), ValueError, "sinks is on meta but q is on cpu"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ROADS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_wrong_sinks_are_refused(name: str, bad: str, requires_grad: bool) -> None:
    road, inputs = ROADS[name]
    sinks, kind, message = BAD[bad]
    q, k, v = inputs(torch.float16, requires_grad=requires_grad)
    with pytest.raises(kind, match=message):
        road(q, k, v, sinks=sinks)


@pytest.mark.parametrize("name", ["sink", "s_aux", "learnable_sink"])
def test_other_names_are_pointed_to_it(name: str) -> None:
    with pytest.raises(TypeError, match=r"did you mean sinks="):
        flashcore.attention(*dense_inputs(), **{name: SINKS})


def test_explain_names_them() -> None:
    q, k, v = dense_inputs(torch.float16)
    found = flashcore.explain(q, k, v, sinks=SINKS.float())
    assert found.problem.has_sinks
    assert "sinks" in str(found)
    assert found.plan is not None
    assert found.plan.has_sinks


@pytest.mark.filterwarnings("ignore::flashcore.FallbackWarning")
@pytest.mark.parametrize("argument", ["learnable_sink", "s_aux"])
def test_flash_attns_arguments(argument: str) -> None:
    q, k, v = dense_inputs()
    out, lse = by_formula(q, k, v, SINKS, causal=True)
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    have = flash_attn.flash_attn_func(
        *rows, causal=True, return_attn_probs=True, **{argument: SINKS}
    )
    torch.testing.assert_close(have[0], out.transpose(1, 2))
    torch.testing.assert_close(have[1], lse)
    q, k, v = packed_inputs()
    slopes = torch.zeros(HEADS_Q)
    no_bias = {"alibi_slopes": slopes}  # a call for each sequence
    for options in ({}, no_bias):
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            q, k, v, *lengths("cpu"), 3, 4, return_attn_probs=True, **options, **{argument: SINKS}
        )
        want = expected("packed", q, k, v, SINKS)
        torch.testing.assert_close(out, want[0])
        torch.testing.assert_close(lse, want[1])


def test_flash_attns_two_names_exclude_each_other() -> None:
    q, k, v = (x.transpose(1, 2) for x in dense_inputs())
    with pytest.raises(TypeError, match="learnable_sink and s_aux"):
        flash_attn.flash_attn_func(q, k, v, learnable_sink=SINKS, s_aux=SINKS)
