"""Test attention with seqlens_k: a padded batch with true lengths, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parameters import thorough_but

import flashcore
from backends import GPU, SIM, SIM90, WMMA, on_sim90
from flashcore.checks.accuracy import error_report
from flashcore.checks.cases import Inputs, make_inputs
from flashcore.problem.case import Case
from flashcore.problem.options import Wanted

every_backend = pytest.mark.parametrize("backend", ["torch", SIM, SIM90, WMMA, GPU])

LENGTHS = [33, 0, 70, 1]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": "bfloat16"},
    "lower-right": {"causal": "lower_right", "layout": "bshd"},
    "upper-left": {"causal": "upper_left", "head_dim": 40, "head_dim_v": 72},
    "window-softcap": {"window": (9, 4), "softcap": 5.0, "layout": "bshd"},
    "mask": {"mask": "bool", "causal": "lower_right"},
}


def make(backend: str, **fixed: Any) -> tuple[Case, Inputs, torch.Tensor]:
    """Return inputs with NaN and infinities past each sequence's end, and the lengths, two of which
    are outside of what they may be."""
    fields = {"batch": 4, "num_heads_kv": 1, "seqlen_q": 50, "seqlen_k": 70, "tail": 3} | fixed
    case = Case(**fields)
    x = make_inputs(case, "cuda" if backend in ("wmma", "auto") else "cpu")
    for b, length in enumerate(LENGTHS):
        x.k[b, :, length:] = torch.nan
        x.v[b, :, length:] = torch.inf
    return case, x, torch.tensor([33, -7, 10**9, 1], dtype=torch.int32, device=x.q.device)


def attend(
    backend: str, x: Inputs, seqlens_k: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        backend = on_sim90(backend, patch)
        return flashcore.attention(
            x.q,
            x.k,
            x.v,
            mask=x.mask,
            seqlens_k=seqlens_k,
            return_lse=True,
            backend=backend,
            **options,
        )


@pytest.mark.parametrize("name", thorough_but(("plain", "window-softcap", "mask"), OPTIONS))
@every_backend
def test_every_sequence_is_as_if_alone(backend: str, name: str) -> None:
    case, x, seqlens_k = make(backend, **OPTIONS[name])
    out, lse = attend(backend, x, seqlens_k, **case.options())
    for b, n in enumerate(LENGTHS):
        own = slice(b, b + 1)
        report = error_report(
            out[own],
            x.q[own],
            x.k[own, :, :n],
            x.v[own, :, :n],
            lse=lse[own],
            mask=None if x.mask is None else x.mask[..., :n],
            **case.options(),
        )
        assert report.ok, f"{b}: {report}"


@pytest.mark.parametrize("name", ["plain", "lower-right", "mask"])
def test_gradients_stop_at_the_lengths(name: str) -> None:
    case, x, seqlens_k = make("torch", **(OPTIONS[name] | {"dtype": "float64"}))
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    out, lse = attend("torch", x, seqlens_k, **case.options())
    loss = out.square().sum() + lse[lse > -torch.inf].sum()
    gradients = torch.autograd.grad(loss, leaves)
    for b, n in enumerate(LENGTHS):
        own = [t[b : b + 1, :, : (n if t is not x.q else None)] for t in leaves]
        mask = None if x.mask is None else x.mask[..., :n]
        out, lse = flashcore.attention(*own, mask=mask, return_lse=True, **case.options())
        loss = out.square().sum() + lse[lse > -torch.inf].sum()
        wanted = torch.autograd.grad(loss, own)
        for have, want in zip(gradients, wanted, strict=True):
            rows = want.shape[2]
            torch.testing.assert_close(have[b : b + 1, :, :rows], want)
            assert not have[b, :, rows:].any()


def test_the_operators_are_well_made() -> None:
    _, x, seqlens_k = make("torch", dtype="float32", tail=0)
    q, k, v = (t.nan_to_num(0.5, 0.5).requires_grad_() for t in (x.q, x.k, x.v))
    options = ("lower_right", -1, -1, 0.0, None, False, True)
    forward = torch.ops.flashcore.attention_padded_forward.default
    given = q, k, v, None, seqlens_k, None, None, None, None
    torch.library.opcheck(forward, (*given, *options, *Wanted(True), "torch"))
    compiled = torch.compile(flashcore.attention, fullgraph=True, backend="eager")
    plain = flashcore.attention(q, k, v, seqlens_k=seqlens_k, causal=True)
    assert torch.equal(compiled(q, k, v, seqlens_k=seqlens_k, causal=True), plain)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a list": ({"seqlens_k": [3, 4]}, TypeError, "seqlens_k must be a torch.Tensor"),
    "long": ({"seqlens_k": torch.tensor([3, 4])}, TypeError, r"int64.*seqlens_k\.int\(\)"),
    "one too few": (
        {"seqlens_k": torch.ones(1, dtype=torch.int32)},
        ValueError,
        "seqlens_k has 1 entries, but q has batch 2",
    ),
    "a list of a mask": ({"mask": [1.0]}, TypeError, "mask must be a torch.Tensor"),
    "a matrix": ({"seqlens_k": torch.ones(2, 1, dtype=torch.int32)}, ValueError, "one dimension"),
    "a mask with a gradient": (
        {"mask": torch.zeros(6, 6, requires_grad=True)},
        NotImplementedError,
        r"mask\.detach\(\)",
    ),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_message_names_argument_value_and_way_out(name: str) -> None:
    changes, kind, words = BAD[name]
    x = torch.randn(2, 1, 6, 8)
    arguments: dict[str, Any] = {"seqlens_k": torch.tensor([3, 4], dtype=torch.int32)} | changes
    with pytest.raises(kind, match=words):
        flashcore.attention(x, x, x, **arguments)
