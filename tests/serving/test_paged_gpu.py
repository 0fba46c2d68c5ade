"""Test on a GPU what the simulator cannot show of pages: large caches, CUDA graphs, no waiting."""

from __future__ import annotations

import pytest
import torch
from pages import Cache, make_cache

from flashcore.checks.accuracy import error_report
from flashcore.ops.paged import attention_paged

pytestmark = pytest.mark.gpu

# Of a serving engine: one long sequence, some short, and one that ends inside of a page.
LENGTHS = (9000, 1, 300, 0, 64, 4097, 255, 16)


def attend(cache: Cache, backend: str = "auto", **options: object) -> torch.Tensor:
    return attention_paged(*cache.arguments(), backend=backend, **options)  # type: ignore[arg-type]


def check(cache: Cache, backend: str = "auto", **options: object) -> None:
    out = attend(cache, backend, **options)
    for b in range(len(cache.lengths)):
        report = error_report(out[b : b + 1], *cache.sequence(b), **options)  # type: ignore[arg-type]
        assert report.ok, f"sequence {b}: {report}"


@pytest.mark.parametrize("page_size", [1, 8, 16, 48, 64, 256, 1024])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("backend", ["auto", "wmma"])
def test_one_token(backend: str, head_dim: int, page_size: int) -> None:
    cache = make_cache(
        page_size, LENGTHS, num_heads_q=8, num_heads_kv=2, seqlen_q=1, head_dim=head_dim,
        head_dim_v=head_dim, dtype=torch.bfloat16, device="cuda", shared=2,
    )  # fmt: skip
    check(cache, backend)


@pytest.mark.parametrize("page_size", [8, 16, 64, 256])
@pytest.mark.parametrize("seqlen_q", [4, 100, 700])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (100, 0), "softcap": 20.0}, {}])
def test_chunks_of_a_prompt(page_size: int, seqlen_q: int, options: dict[str, object]) -> None:
    cache = make_cache(
        page_size, LENGTHS, num_heads_q=4, num_heads_kv=2, seqlen_q=seqlen_q, head_dim=128,
        head_dim_v=128, device="cuda", heads_first=True,
    )  # fmt: skip
    check(cache, **options)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (10, 2), (35, 5), (71, 1)])
def test_groups_of_any_size(heads: tuple[int, int]) -> None:
    cache = make_cache(
        16, LENGTHS, num_heads_q=heads[0], num_heads_kv=heads[1], seqlen_q=1, head_dim=96,
        head_dim_v=64, device="cuda",
    )  # fmt: skip
    check(cache)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("causal", [False, True])
def test_a_graph_follows_lengths_and_table(page_size: int, causal: bool) -> None:
    """Captured without a warm call, then replayed with another cache in the same memory."""
    fixed = {"max_pages": 2000 // page_size, "seqlen_q": 3, "device": "cuda"}
    # As many pages, whose values differ.
    caches = [
        make_cache(page_size, lengths, seed=seed, **fixed)  # type: ignore[arg-type]
        for seed, lengths in enumerate([(1984, 64, 0), (64, 0, 1984), (64, 1984, 0)])
    ]
    live = caches[0]._replace(**{f: getattr(caches[0], f).clone() for f in Cache._fields[:5]})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(live, causal=causal)
    for cache in (*caches[1:], caches[0]):
        for to, x in zip(live.arguments(), cache.arguments(), strict=True):
            to.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, attend(cache, causal=causal))


def test_nothing_waits_for_the_gpu() -> None:
    cache = make_cache(16, LENGTHS, device="cuda")
    attend(cache)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(cache)
        attend(cache._replace(page_table=cache.page_table.clone()))
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("page_size", [16, 64])
def test_wild_entries_within_a_sequence_stay_inside_the_cache(page_size: int) -> None:
    """Their results are those of some page; nothing faults."""
    cache = make_cache(page_size, (500, 300), device="cuda")
    for wild in (-1, -(2**31), 2**31 - 1, 10**6):
        attend(cache._replace(page_table=torch.full_like(cache.page_table, wild)))
    torch.cuda.synchronize()
