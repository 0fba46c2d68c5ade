"""Test caches of float8_e4m3fn on a GPU: every kind of call against the oracle, a needle among
131072 keys, graphs that are replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pages import Cache, make_cache
from test_float8_caches import needle, steps_of

import flashcore
from flashcore.checks.accuracy import error_report
from flashcore.ops.paged import attention_paged
from flashcore.serving import append

pytestmark = pytest.mark.gpu

LENGTHS = (9000, 1, 300, 0, 64, 4097, 255, 16)


def attend(x: Cache, **options: Any) -> Any:
    return attention_paged(*x.arguments(), **x.scales(), **options)


def check(x: Cache, **options: Any) -> None:
    out, lse = attend(x, return_lse=True, **options)
    for b in range(len(x.lengths)):
        own = slice(b, b + 1)
        report = error_report(out[own], *x.sequence(b), lse=lse[own], **options)
        assert report.ok, f"sequence {b}: {report}"


@pytest.mark.parametrize("head_dim", [(64, 64), (128, 128), (256, 256), (96, 32), (192, 128)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
def test_one_token(page_size: int, dtype: torch.dtype, head_dim: tuple[int, int]) -> None:
    check(
        make_cache(
            page_size, LENGTHS, num_heads_q=8, num_heads_kv=2, seqlen_q=1, head_dim=head_dim[0],
            head_dim_v=head_dim[1], dtype=dtype, device="cuda", cache_dtype="float8_e4m3fn",
            seed=2, shared=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("seqlen_q", [4, 12, 100, 700])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (100, 0), "softcap": 20.0}, {}])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chunks_of_a_prompt(seed: int, seqlen_q: int, options: dict[str, Any]) -> None:
    x = make_cache(
        16, LENGTHS, num_heads_q=4, num_heads_kv=2, seqlen_q=seqlen_q, head_dim=128, head_dim_v=128,
        device="cuda", dtype=torch.bfloat16, cache_dtype="float8_e4m3fn", seed=seed,
    )  # fmt: skip
    check(x, **options)


@pytest.mark.parametrize("place", [0, 77777, 131071])
@pytest.mark.parametrize("paged", [False, True])
def test_one_distinguished_key_is_found_among_131072(paged: bool, place: int) -> None:
    length = 131072
    q, k, v, scales, want = needle(length, place, "cuda", heads=8, dim=128)
    lengths = torch.tensor([length], dtype=torch.int32, device="cuda")
    if not paged:
        out = flashcore.attention(q, k, v, seqlens_k=lengths, **scales, backend="sm90")
    else:
        pages = [
            x.view(torch.uint8)[0].unflatten(1, (-1, 64)).transpose(0, 1).contiguous()
            for x in (k, v)
        ]
        order = torch.randperm(length // 64, device="cuda")
        k, v = (x[order].view(torch.float8_e4m3fn) for x in pages)
        table = order.argsort().int()[None]
        out = attention_paged(q, k, v, table, lengths, **scales, backend="sm90")  # type: ignore[assignment]
    torch.testing.assert_close(out, want, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_new_tokens_are_divided_by_the_scale(is_packed: bool, paged: bool) -> None:
    steps_of("auto", paged, is_packed, device="cuda")


def test_one_kernel_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operations, about ten launches, are not called."""
    monkeypatch.delattr(append, "_append")
    steps_of("auto", paged=True, is_packed=False, device="cuda")


def test_a_graph_is_replayed_with_other_lengths_and_scales() -> None:
    x = make_cache(
        16, (700, 90, 33), num_heads_q=8, num_heads_kv=2, seqlen_q=1, device="cuda",
        cache_dtype="float8_e4m3fn", seed=2,
    )  # fmt: skip
    attend(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(x)
    assert x.k_scale is not None
    x.seqlens_k.copy_(torch.tensor([500, 91 - 1, 1], dtype=torch.int32))
    x.k_scale.mul_(0.5)
    graph.replay()
    assert torch.equal(out, attend(x))
