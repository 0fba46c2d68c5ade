"""Test attention over a paged cache: every sequence is as if alone, whatever lies in the pages and
entries that are not its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pages import Cache, make_cache
from parameters import thorough_but

import flashcore
from backends import GPU, SIM, WMMA, device_of
from flashcore.checks.accuracy import error_report
from flashcore.kernels.fwd_sm90.obstacles import loads_whole_rows
from flashcore.ops.paged import attention_paged, paged_problem
from flashcore.problem.options import Inputs, Options

SIM90 = pytest.param("sim90", id="sim90")
every_backend = pytest.mark.parametrize("backend", ["torch", SIM, SIM90, WMMA, GPU])

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "upper-left": {"causal": "upper_left"},
    "window-softcap": {"window": (20, 4), "softcap": 5.0},
}
# Pages of one key, of a part of a key tile, of no power of two, and of several key tiles.
PAGE_SIZES = (1, 8, 16, 24, 64, 256)


def attend(backend: str, cache: Cache, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        if backend == "sim90":
            backend = "sim"
            patch.setenv("FLASHCORE_SIM_ARCH", "90")
        result = attention_paged(*cache.arguments(), return_lse=True, backend=backend, **options)
    assert isinstance(result, tuple)
    return result


def check(backend: str, cache: Cache, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold every sequence to the error rule, by the oracle for it alone."""
    out, lse = attend(backend, cache, **options)
    assert out.isfinite().all()
    for b in range(len(cache.lengths)):
        own = slice(b, b + 1)
        report = error_report(out[own], *cache.sequence(b), lse=lse[own], **options)
        assert report.ok, f"sequence {b}: {report}"
    return out, lse


def make(page_size: int, backend: str, **fixed: Any) -> Cache:
    """Make sequences of which one is empty, told as a negative length, and one is told to be longer
    than the table reaches."""
    max_pages = -(-70 // page_size)
    reach = max_pages * page_size
    told = (33, -7, 10**9, 1)
    lengths = (33, 0, reach, 1)
    return make_cache(
        page_size, lengths, told=told, max_pages=max_pages, device=device_of(backend), **fixed
    )


@pytest.mark.parametrize("page_size", thorough_but((1, 24), PAGE_SIZES))
@every_backend
def test_every_sequence_is_as_if_alone(backend: str, page_size: int) -> None:
    check(backend, make(page_size, backend))


@pytest.mark.parametrize("name", thorough_but(("upper-left", "window-softcap"), OPTIONS))
@every_backend
def test_options(backend: str, name: str) -> None:
    check(backend, make(16, backend, dtype=torch.bfloat16, seed=1), **OPTIONS[name])


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (10, 2)])
@every_backend
def test_both_layouts_of_pages_and_groups_of_heads(backend: str, heads: tuple[int, int]) -> None:
    num_heads_q, num_heads_kv = heads
    for heads_first in (False, True):
        cache = make(
            8, backend, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, heads_first=heads_first,
            seqlen_q=1, head_dim=40, head_dim_v=72,
        )  # fmt: skip
        check(backend, cache)


@pytest.mark.parametrize("page_size", [1, 16])
@every_backend
def test_sinks(backend: str, page_size: int) -> None:
    """A sequence without keys has the sink alone."""
    cache = make(page_size, backend, num_heads_q=4, num_heads_kv=2)
    check(backend, cache, sinks=torch.randn(4, device=cache.q.device))


@every_backend
def test_sequences_may_share_pages(backend: str) -> None:
    check(
        backend, make_cache(16, (50, 33, 16), shared=2, seqlen_q=20, device=device_of(backend)),
        causal=True,
    )  # fmt: skip


@every_backend
def test_keys_and_values_in_one_tensor(backend: str) -> None:
    """Engines keep them as [2, num_pages, ...] or [num_pages, 2, ...]."""
    cache = make(16, backend)
    for dim in (0, 1):
        both = torch.stack([x.transpose(1, 2) for x in (cache.k_pages, cache.v_pages)], dim)
        k, v = (x.transpose(1, 2) for x in both.unbind(dim))
        check(backend, cache._replace(k_pages=k, v_pages=v))


@pytest.mark.parametrize("layout", thorough_but(("apart",), ("tokens", "heads", "both", "apart")))
@pytest.mark.parametrize("backend", [SIM90, GPU])
def test_boxes_of_all_columns(backend: str, layout: str) -> None:
    """TMA takes all columns of a page's rows at once where pages are small and heads wide, but not
    where pages are no multiple of eight rows apart."""
    cache = make(
        16, backend, num_heads_q=4, num_heads_kv=2, seqlen_q=1, head_dim=128, head_dim_v=128,
        heads_first=layout == "heads", dtype=torch.bfloat16,
    )  # fmt: skip
    k, v = cache.k_pages, cache.v_pages
    if layout == "both":
        k, v = torch.stack([x.transpose(1, 2) for x in (k, v)], 1).transpose(2, 3).unbind(1)
    check(backend, cache._replace(k_pages=k, v_pages=v))
    if layout == "apart":
        apart = k.new_full((k.shape[0], 20, *k.transpose(1, 2).shape[2:]), torch.nan)
        apart[:, :16] = k.transpose(1, 2)
        check(backend, cache._replace(k_pages=apart[:, :16].transpose(1, 2)))


@pytest.mark.parametrize(
    ("page_size", "head_dim", "rows_apart", "whole"),
    [
        *((16, 128, 16, True), (8, 192, 8, True), (32, 256, 40, True)),
        *((64, 128, 64, False), (16, 64, 16, False), (16, 96, 16, False), (16, 128, 20, False)),
    ],
)
def test_which_boxes_have_all_columns(
    page_size: int, head_dim: int, rows_apart: int, whole: bool
) -> None:
    q = torch.empty(2, 4, 1, head_dim, dtype=torch.float16)
    k = torch.empty(6, rows_apart, 2, head_dim, dtype=torch.float16)[:, :page_size].transpose(1, 2)
    lengths, table = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32)
    inputs = Inputs(q, k, k, seqlens_k=lengths, page_table=table)
    problem = paged_problem(inputs, Options.checked(False, None, None, None))
    assert loads_whole_rows(problem) == whole


@every_backend
def test_a_part_of_a_wider_table(backend: str) -> None:
    cache = make(16, backend)
    wide = torch.cat([cache.page_table, torch.full_like(cache.page_table, -1)], dim=1)
    check(backend, cache._replace(page_table=wide[:, : cache.page_table.shape[1]]))


@every_backend
def test_pages_may_lie_in_any_order(backend: str) -> None:
    """The same bits: which page holds some keys is no part of the problem."""
    cache = make(16, backend)
    order = torch.randperm(cache.k_pages.shape[0], generator=torch.Generator().manual_seed(7))
    place = torch.argsort(order).to(cache.page_table.device, torch.int32)
    used = (cache.page_table >= 0) & (cache.page_table < len(order))
    table = torch.where(used, place[cache.page_table.clamp(0, len(order) - 1).long()], -1)
    moved = cache._replace(
        k_pages=cache.k_pages[order.to(place.device)],
        v_pages=cache.v_pages[order.to(place.device)],
        page_table=table.to(torch.int32),
    )
    for have, want in zip(attend(backend, moved), attend(backend, cache), strict=True):
        assert torch.equal(have, want)


def test_nothing_to_attend_to() -> None:
    cache = make_cache(16, (0, 0), max_pages=0)
    out, lse = attend("torch", cache)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_gradients_add_up_in_shared_pages() -> None:
    cache = make_cache(
        8, (20, 30, 0), shared=2, seqlen_q=4, dtype=torch.float64, head_dim=16, head_dim_v=16
    )
    leaves = [x.detach().clone().requires_grad_() for x in cache.arguments()[:3]]
    alike = cache._replace(q=leaves[0], k_pages=leaves[1], v_pages=leaves[2])

    def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return out.square().sum() + lse[lse > -torch.inf].sum()

    have = torch.autograd.grad(loss(*attend("torch", alike, causal=True)), leaves)
    alone = [
        loss(*flashcore.attention(*alike.sequence(b), causal=True, return_lse=True))
        for b in range(len(cache.lengths))
    ]
    want = torch.autograd.grad(torch.stack(alone).sum(), leaves)
    for mine, theirs in zip(have, want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_operators_are_well_made() -> None:
    cache = make_cache(8, (20, 13), dtype=torch.float32)
    q, k, v, table, lengths = cache.arguments()
    q, k, v = (x.nan_to_num(0.5).requires_grad_() for x in (q, k, v))
    options = ("lower_right", -1, -1, 0.0, None, False, True)
    forward = torch.ops.flashcore.attention_paged_forward.default
    sinks = torch.randn(q.shape[1], requires_grad=True)
    for given in (None, sinks):
        pages = None, table.clamp(0, 5), lengths
        arguments = (q, k, v, *pages, given, None, None, None, *options, True, False, "torch")
        torch.library.opcheck(forward, arguments)
    compiled = torch.compile(attention_paged, fullgraph=True, backend="eager")
    plain = attention_paged(q, k, v, table, lengths, causal=True)
    assert torch.equal(compiled(q, k, v, table, lengths, causal=True), plain)


@pytest.mark.thorough  # three seconds
def test_second_derivatives_and_forward_mode() -> None:
    cache = make_cache(4, (6, 3), dtype=torch.float64, head_dim=4, head_dim_v=4, seqlen_q=2)
    q, k, v = (x.nan_to_num(0.5).requires_grad_() for x in cache.arguments()[:3])
    sinks = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)

    def function(*x: torch.Tensor) -> Any:
        table, lengths = cache.page_table, cache.seqlens_k
        return attention_paged(*x[:3], table, lengths, sinks=x[3], backend="torch")

    assert torch.autograd.gradcheck(function, (q, k, v, sinks), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (q, k, v, sinks))


def test_vmap_over_queries_shares_the_cache() -> None:
    cache = make_cache(8, (20, 13))
    q = torch.stack([cache.q, 2 * cache.q])
    mapped = torch.vmap(lambda q: attend("torch", cache._replace(q=q))[0])(q)
    for x, out in zip(q, mapped, strict=True):
        torch.testing.assert_close(out, attend("torch", cache._replace(q=x))[0])


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "table of long": (
        {"page_table": torch.zeros(2, 3, dtype=torch.long)},
        TypeError,
        r"page_table has dtype torch\.int64.*page_table\.int\(\)",
    ),
    "no table": ({"page_table": None}, TypeError, "page_table must be a torch.Tensor"),
    "table of one row": (
        {"page_table": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"page_table has shape \[3\]; it must have two dimensions, \[batch, max_pages\]",
    ),
    "table of others": (
        {"page_table": torch.zeros(1, 3, dtype=torch.int32)},
        ValueError,
        "page_table has 1 rows, but q has batch 2",
    ),
    "table across": (
        {"page_table": torch.zeros(3, 2, dtype=torch.int32).T},
        ValueError,
        r"a stride of 2 between the pages.*page_table\.contiguous\(\)",
    ),
    "lengths of others": (
        {"seqlens_k": torch.ones(3, dtype=torch.int32)},
        ValueError,
        "seqlens_k has 3 entries, but q has batch 2",
    ),
    "fewer pages of v": (
        {"v_pages": torch.zeros(4, 1, 8, 16)},
        ValueError,
        r"v has 4 pages but k has 5 .*\[num_pages, num_heads_kv, page_size, dim\]",
    ),
    "smaller pages of v": ({"v_pages": torch.zeros(5, 1, 4, 16)}, ValueError, "v has seqlen 4"),
    "other dtype": (
        {"k_pages": torch.zeros(5, 1, 8, 16, dtype=torch.float16)},
        TypeError,
        r"k has dtype torch\.float16 but q has torch\.float32",
    ),
    "no pages": (
        {"k_pages": torch.zeros(0, 1, 8, 16), "v_pages": torch.zeros(0, 1, 8, 16)},
        ValueError,
        r"k has no pages .*\[batch, 0\]",
    ),
    "empty pages": (
        {"k_pages": torch.zeros(5, 1, 0, 16), "v_pages": torch.zeros(5, 1, 0, 16)},
        ValueError,
        "page_size 0",
    ),
    "return_lse": ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
    "backend": ({"backend": "gpu"}, ValueError, "backend='gpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_the_message_names_argument_value_and_way_out(name: str) -> None:
    changes, kind, words = BAD[name]
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 2, 3, 16),
        "k_pages": torch.zeros(5, 1, 8, 16),
        "v_pages": torch.zeros(5, 1, 8, 16),
        "page_table": torch.zeros(2, 3, dtype=torch.int32),
        "seqlens_k": torch.ones(2, dtype=torch.int32),
    } | changes
    with pytest.raises(kind, match=words):
        attention_paged(**arguments)


def test_a_table_that_reaches_too_far_is_refused() -> None:
    table = torch.zeros(1, 2**30, dtype=torch.int32, device="meta")
    q, k = torch.zeros(1, 1, 1, 16, device="meta"), torch.zeros(1, 1, 1, 16, device="meta")
    lengths = torch.zeros(1, dtype=torch.int32, device="meta")
    with pytest.raises(NotImplementedError, match=r"reaches 1073741824 keys.*fewer columns"):
        attention_paged(q, k, k, table, lengths)


MASKS = ("bool", "bias", "float32", "row", "columns")


def mask_of(kind: str, cache: Cache) -> torch.Tensor:
    """Return a mask over all that the table reaches; rows are not aligned for wide loads."""
    batch, heads, rows = cache.q.shape[:3]
    reach = cache.page_table.shape[1] * cache.k_pages.shape[2]
    generator = torch.Generator().manual_seed(5)
    shape = (batch, 1, 1, reach) if kind == "row" else (batch, heads, rows, reach)
    drawn = torch.randn(shape, generator=generator)
    if kind == "columns":
        drawn = drawn.mT.contiguous().mT
    mask = drawn > -0.5 if kind in ("bool", "row", "columns") else drawn
    return (mask.to(cache.q.dtype) if kind == "bias" else mask).to(cache.q.device)


@pytest.mark.parametrize("page_size", thorough_but((16,), (1, 16, 24)))
@pytest.mark.parametrize("kind", thorough_but(("bool", "row"), MASKS))
@every_backend
def test_masks_are_over_the_keys_of_a_sequence(backend: str, kind: str, page_size: int) -> None:
    """Read in place, whatever pages the keys lie in."""
    cache = make(page_size, backend, num_heads_q=4, num_heads_kv=2, seqlen_q=3)
    mask = mask_of(kind, cache)
    out, lse = attend(backend, cache, mask=mask, causal=True)
    for b, n in enumerate(cache.lengths):
        own = slice(b, b + 1)
        report = error_report(
            out[own], *cache.sequence(b), lse=lse[own], mask=mask[own, ..., :n], causal=True
        )
        assert report.ok, f"sequence {b}: {report}"


def test_masks_of_another_shape_are_refused() -> None:
    cache = make(16, "torch")
    reach = cache.page_table.shape[1] * 16
    with pytest.raises(ValueError, match="mask has shape"):
        attend("torch", cache, mask=torch.ones(4, 1, 1, reach - 1, dtype=torch.bool))
