"""Test sinks on a GPU: both kernels, every road, gradients by whatever code computes them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import flashcore
from backends import check
from flashcore.checks.cases import make_inputs
from flashcore.checks.varlen_cases import VarlenCase, make_varlen_inputs, varlen_error_report
from flashcore.problem.case import Case

pytestmark = pytest.mark.gpu

Tensor = torch.Tensor
# Of gpt-oss: 64 heads, 8 of k and v, head_dim 64, causal, every other layer with a window of 128.
CASES: dict[str, dict[str, Any]] = {
    "prompt": {"seqlen_q": 700, "seqlen_k": 700, "causal": "lower_right"},
    "prompt, window": {
        "seqlen_q": 700, "seqlen_k": 700, "causal": "lower_right", "window": (127, 0),
    },
    "decoding": {"seqlen_q": 1, "seqlen_k": 5000},
    "decoding, window": {"seqlen_q": 1, "seqlen_k": 300, "window": (127, 0)},
    "few queries": {"seqlen_q": 5, "seqlen_k": 3000, "causal": "lower_right"},
    "rows without keys": {"seqlen_q": 300, "seqlen_k": 100, "causal": "lower_right"},
    "mask": {"seqlen_q": 200, "seqlen_k": 333, "mask": "bool"},
    "bias, softcap": {"seqlen_q": 200, "seqlen_k": 333, "mask": "additive", "softcap": 20.0},
    "wide": {"seqlen_q": 130, "seqlen_k": 333, "head_dim": 192, "head_dim_v": 128},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["auto", "wmma"])
def test_the_error_rule_holds(backend: str, name: str, dtype: str) -> None:
    case = Case(batch=2, num_heads_q=16, num_heads_kv=2, dtype=dtype, sinks=True, **CASES[name])
    x = make_inputs(case, "cuda")
    for _ in range(2):  # the second one is looked up
        check(backend, x.q, x.k, x.v, name, mask=x.mask, sinks=x.sinks, **case.options())


@pytest.mark.parametrize("backend", ["auto", "wmma"])
def test_padded_sequences(backend: str) -> None:
    x = make_inputs(Case(batch=4, seqlen_q=50, seqlen_k=200, num_heads_q=4, sinks=True), "cuda")
    assert x.sinks is not None
    lengths = torch.tensor([200, 0, 33, 128], dtype=torch.int32, device="cuda")
    out, lse = flashcore.attention(
        x.q, x.k, x.v, seqlens_k=lengths, sinks=x.sinks, causal=True, return_lse=True,
        backend=backend,
    )  # fmt: skip
    for b, n in enumerate(lengths.tolist()):
        own = (x.q[b, None], x.k[b, None, :, :n], x.v[b, None, :, :n])
        want = by_formula(*(t.double() for t in own), x.sinks.double(), causal=True)
        torch.testing.assert_close(out[b, None].double(), want[0], atol=4e-3, rtol=4e-3)
        torch.testing.assert_close(lse[b, None].double(), want[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "wmma"])
@pytest.mark.parametrize("causal", ["none", "lower_right"])
def test_packed_sequences(backend: str, causal: str) -> None:
    case = VarlenCase(
        lengths_q=(300, 0, 70, 1, 5), lengths_k=(300, 3, 90, 700, 0), num_heads_q=8,
        num_heads_kv=2, causal=causal, tail=9, sinks=True,
    )  # fmt: skip
    x = make_varlen_inputs(case, "cuda")
    for _ in range(2):
        out, lse = flashcore.attention_varlen(
            *x.arguments(), sinks=x.sinks, return_lse=True, backend=backend, **case.options()
        )
        report = varlen_error_report(out, lse, case, x)
        assert report is not None
        assert report.ok, report


def by_formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, **options: Any) -> Any:
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    score = (q @ k.mT) * q.shape[-1] ** -0.5
    if options.get("softcap"):
        score = options["softcap"] * torch.tanh(score / options["softcap"])
    if options.get("causal"):
        visible = torch.ones_like(score[0, 0], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        score = score.masked_fill(~visible, -math.inf)
    if options.get("mask") is not None:
        score = score.masked_fill(~options["mask"], -math.inf)
    score = torch.cat([score, sinks[:, None, None].expand(*score.shape[:3], 1)], dim=-1)
    return score.softmax(-1)[..., :-1] @ v, score.logsumexp(-1)


MASK = torch.ones(1, 1, 1, 300, dtype=torch.bool).index_fill_(3, torch.arange(250, 300), False)
# Between them on sm_90: the fused kernels, torch's two operators, and the tiled code.
GRADIENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 20.0, "causal": True},
    "mask": {"mask": MASK},
}


@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("seqlen_q", [300, 400])  # 400: causal rows without keys
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients(backend: str, name: str, seqlen_q: int, through_lse: bool) -> None:
    torch.manual_seed(0)
    options = {k: x.cuda() if isinstance(x, Tensor) else x for k, x in GRADIENTS[name].items()}
    shapes = ((2, 8, seqlen_q, 64), (2, 2, 300, 64), (2, 2, 300, 64))
    low = [torch.randn(s, device="cuda").half().requires_grad_() for s in shapes]
    low.append((torch.randn(8, device="cuda") * 3 + 3).requires_grad_())
    high = [x.detach().double().requires_grad_() for x in low]
    out, lse = flashcore.attention(
        *low[:3], sinks=low[3], return_lse=True, backend=backend, **options
    )
    want_out, want_lse = by_formula(*high, **options)
    dout = torch.randn_like(out)
    dlse = torch.randn_like(lse)
    have = torch.autograd.grad(
        (out, lse) if through_lse else out, low, (dout, dlse) if through_lse else dout
    )
    want = torch.autograd.grad(
        (want_out, want_lse) if through_lse else want_out,
        high,
        (dout.double(), dlse.double()) if through_lse else dout.double(),
    )
    for x, y in zip(have, want, strict=True):
        assert x.isfinite().all()
        torch.testing.assert_close(x.double(), y, atol=2e-2, rtol=2e-2)


def test_gradients_of_sinks_are_the_same_bits_on_every_run() -> None:
    x = make_inputs(Case(seqlen_q=500, seqlen_k=500, num_heads_q=8, sinks=True), "cuda")
    assert x.sinks is not None
    sinks = x.sinks.requires_grad_()
    found = [
        torch.autograd.grad(flashcore.attention(x.q, x.k, x.v, sinks=sinks).float().sum(), sinks)[0]
        for _ in range(3)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, "upper_left"])
def test_dtypes_that_torch_computes(dtype: torch.dtype, causal: Any) -> None:
    q, k, v = (torch.randn(2, 4, 60, 32, device="cuda", dtype=dtype) for _ in range(3))
    sinks = torch.randn(4, device="cuda")
    out, lse = flashcore.attention(
        q, k, v, sinks=sinks, causal=causal, return_lse=True, backend="torch"
    )
    want = by_formula(*(x.double() for x in (q, k, v, sinks)), causal=bool(causal))
    torch.testing.assert_close(out.double(), want[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), want[1], atol=1e-3, rtol=1e-3)


def test_a_captured_graph_reads_sinks_that_changed() -> None:
    q, k, v = (torch.randn(1, 4, 64, 64, device="cuda").half() for _ in range(3))
    sinks = torch.zeros(4, device="cuda")
    flashcore.attention(q, k, v, sinks=sinks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashcore.attention(q, k, v, sinks=sinks)
    sinks.fill_(5.0)
    graph.replay()
    assert torch.equal(out, flashcore.attention(q, k, v, sinks=sinks))
