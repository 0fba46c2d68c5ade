"""A PagedCase is one call of attention over a paged cache in numbers, its tensors, and its
judgement.

As checks/cases.py for `attention`: a case and its seed always make the same tensors, on every
machine. A read that is not allowed would show: rows of no key hold NaN, and entries of the page
table behind a sequence's last page are no pages.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashcore.checks.accuracy import ErrorReport, error_report
from flashcore.plain.trees import packed_part_of_tree, tree_of_sequence
from flashcore.problem.case import InNumbers
from flashcore.problem.memory_layout import as_batch
from flashcore.problem.options import Inputs
from flashcore.problem.scales import dequantised, scales_of

WILD = (-1, 2**31 - 1)  # entries behind a sequence's last page, in turn
_ASTRAY = 10**6  # in place of the cache's last page, which it is taken for
_SPARE_PAGES = 2  # of no sequence
# Lengths that break kernels: 0, 1, and those around pages and tiles.
_LENGTHS = (0, 1, 2, 8, 15, 16, 17, 31, 33, 63, 64, 65, 97, 128, 150)
_PAGE_SIZES = (8, 16, 16, 24, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCase(InNumbers):
    """A case is one call of attention over a paged cache in numbers.

    `lengths` are the keys of each sequence, and `told` what seqlens_k says where that is not the
    truth: negative, or beyond what the table reaches. The table has `max_pages` columns, by default
    one more than the longest sequence has pages. In memory pages are [page_size, num_heads_kv, dim]
    or, with `heads_first`, [num_heads_kv, page_size, dim]. All sequences share their first `shared`
    pages, as far as those are full. With `astray` the entry of the cache's last page is too large.
    `cache_dtype` is "float8_e4m3fn" where pages are not of `dtype`; then there are scales, powers
    of two, so that what elements count has a `dtype` too: of all, of each head, or of each sequence
    and head, by the seed. With `tree` there is a tree_mask: of all sequences, or of each one.

    With `lengths_q`, the number of each sequence's queries, they are packed, and seqlen_q says
    nothing. A tree then has `tree_size` rows; a sequence with more queries has no tree.
    """

    lengths: tuple[int, ...]
    page_size: int = 16
    told: tuple[int, ...] | None = None
    max_pages: int | None = None
    seqlen_q: int = 3
    lengths_q: tuple[int, ...] = ()
    num_heads_q: int = 2
    num_heads_kv: int = 1
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "float16"
    causal: str = "none"
    window: tuple[int, int] | None = None
    softcap: float | None = None
    scale: float | None = None
    heads_first: bool = False
    shared: int = 0
    astray: bool = False
    cache_dtype: str = ""
    tree: bool = False
    tree_size: int = 0
    seed: int = 0


class Cache(NamedTuple):
    """A cache holds what attention_paged takes, or, where queries are packed, what
    attention_paged_varlen takes; the pages that the table means, and the lengths."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    seqlens_k: Tensor
    pages: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    tree_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    lengths_q: tuple[int, ...] = ()

    def inputs(self) -> Inputs:
        """Return the same as the operators take it."""
        return Inputs(
            self.q, self.k_pages, self.v_pages, seqlens_k=self.seqlens_k,
            page_table=self.page_table, k_scale=self.k_scale, v_scale=self.v_scale,
            tree_mask=self.tree_mask, cu_seqlens_q=self.cu_seqlens_q,
            max_seqlen_q=max(self.lengths_q, default=0),
        )  # fmt: skip

    def others(self) -> dict[str, Tensor]:
        """Return what kernels are given besides q and the pages, by name."""
        ends = {} if self.cu_seqlens_q is None else {"cu_seqlens_q": self.cu_seqlens_q}
        of_keys = {"seqlens_k": self.seqlens_k, "page_table": self.page_table}
        return ends | of_keys | self.scales()

    def scales(self) -> dict[str, Tensor]:
        """Return the scales of pages of 8 bits, by the names of arguments; none of others."""
        return scales_of(self.inputs())

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of attention_paged."""
        return self.q, self.k_pages, self.v_pages, self.page_table, self.seqlens_k

    def queries(self) -> Tensor:
        """Return q as [batch, num_heads_q, seqlen_q, head_dim]; packed queries are a batch of 1."""
        return as_batch(self.q) if self.lengths_q else self.q

    def place(self, b: int) -> tuple[slice, ...]:
        """Return where one sequence's queries lie in `queries`, and so in out and lse."""
        if not self.lengths_q:
            return (slice(b, b + 1),)
        begin = sum(self.lengths_q[:b])
        return slice(None), slice(None), slice(begin, begin + self.lengths_q[b])

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of one sequence, [1, num_heads, length, dim], in the dtype of q."""
        pages = torch.tensor(self.pages[b], dtype=torch.long, device=self.q.device)
        k, v = (
            x[pages].transpose(0, 1).flatten(1, 2).unsqueeze(0)[:, :, : self.lengths[b]]
            for x in (self.k_pages, self.v_pages)
        )
        scales = self.k_scale, self.v_scale
        own = [x if x is None or x.dim() < 2 else x[b : b + 1] for x in scales]
        dtype = self.q.dtype
        q = self.queries()[self.place(b)]
        return q, dequantised(k, own[0], dtype), dequantised(v, own[1], dtype)

    def mask(self, b: int) -> Tensor | None:
        """Return the mask over the keys of one sequence that its tree amounts to, if it has one."""
        if self.tree_mask is None:
            return None
        n = self.lengths_q[b] if self.lengths_q else self.q.shape[2]
        own = packed_part_of_tree(self.tree_mask, b, n)
        return None if own is None else tree_of_sequence(own, n, self.lengths[b])


def draw_paged_case(seed: int, **fixed: Any) -> PagedCase:
    """Draw a random case; `fixed` fields stay as given."""
    rng = random.Random(seed)
    size = fixed.get("page_size", rng.choice(_PAGE_SIZES))
    shared = rng.choice((0, 0, 1, 2))
    lengths = tuple(rng.choice(_LENGTHS) for _ in range(rng.choice((1, 2, 3, 5))))
    heads_kv = rng.choice((1, 2))
    drawn: dict[str, Any] = {
        "lengths": lengths,
        "page_size": size,
        "max_pages": -(-max(lengths) // size) + rng.choice((0, 0, 1, 3)),
        "seqlen_q": rng.choice((1, 1, 3, 17, 70)),
        "num_heads_kv": heads_kv,
        "num_heads_q": heads_kv * rng.choice((1, 2, 3)),
        "heads_first": rng.random() < 0.5,
        "shared": shared,
        "seed": seed,
    }
    return PagedCase(**(drawn | fixed))


def make_paged_inputs(case: PagedCase, device: str | torch.device = "cpu") -> Cache:
    """Make the tensors of a case; the values do not depend on the device. Pages lie in random
    order, and two belong to no sequence."""
    generator = torch.Generator().manual_seed(case.seed)
    size, lengths = case.page_size, case.lengths
    counts = [-(-n // size) for n in lengths]
    num_pages = sum(counts) + _SPARE_PAGES
    order = torch.randperm(num_pages, generator=generator).tolist()
    if case.astray:  # the last page belongs to the first sequence
        order.remove(num_pages - 1)
        order.insert(0, num_pages - 1)
    common, free = order[: case.shared], iter(order[case.shared :])
    columns = max(counts) + 1 if case.max_pages is None else case.max_pages
    table = torch.tensor(WILD, dtype=torch.int32).repeat(len(lengths), columns)[:, :columns]
    used = torch.zeros(num_pages, size, dtype=torch.bool)
    every: list[tuple[int, ...]] = []
    for b, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        whole = min(n // size, case.shared)
        pages = (*common[:whole], *(next(free) for _ in range(count - whole)))
        table[b, :count] = torch.tensor(pages, dtype=torch.int32)
        for j, page in enumerate(pages):
            used[page, : n - j * size] = True
        every.append(pages)
    if case.astray:
        table[table == num_pages - 1] = _ASTRAY

    def pages_of(dim: int) -> Tensor:
        x = torch.randn(num_pages, size, case.num_heads_kv, dim, generator=generator)
        x[~used] = torch.nan
        x = x.to(getattr(torch, case.cache_dtype or case.dtype)).to(device)
        return x.transpose(1, 2).contiguous() if case.heads_first else x.transpose(1, 2)

    rows: tuple[int, ...] = len(lengths), case.num_heads_q, case.seqlen_q
    if case.lengths_q:
        rows = sum(case.lengths_q), case.num_heads_q
    q = torch.randn(*rows, case.head_dim, generator=generator).to(getattr(torch, case.dtype))
    seqlens_k = torch.tensor(lengths if case.told is None else case.told, dtype=torch.int32)
    k, v = pages_of(case.head_dim), pages_of(case.head_dim_v)
    on_device = q.to(device), k, v, table.to(device), seqlens_k.to(device)
    k_scale, v_scale = None, None
    if case.cache_dtype:
        shape = ((), (case.num_heads_kv,), (len(lengths), case.num_heads_kv))[case.seed % 3]
        powers = torch.randint(-3, 2, (2, *shape), generator=generator)
        k_scale, v_scale = torch.exp2(powers.float()).to(device)
    found = Cache(*on_device, tuple(every), lengths, k_scale, v_scale)
    if case.lengths_q:
        ends = torch.tensor((0, *case.lengths_q)).cumsum(0).int().to(device)
        found = found._replace(cu_seqlens_q=ends, lengths_q=case.lengths_q)
    return found._replace(tree_mask=_tree_of(case).to(device)) if case.tree else found


def _tree_of(case: PagedCase) -> Tensor:
    """Return a random boolean mask of queries by queries, in which each sees itself."""
    generator = torch.Generator().manual_seed(case.seed)
    own = len(case.lengths) if case.seed % 2 else 1
    size = case.tree_size if case.lengths_q else case.seqlen_q
    drawn = torch.rand(own, 1, size, size, generator=generator) < 0.6
    return drawn | torch.eye(size, dtype=torch.bool)


def paged_error_report(out: Tensor, lse: Tensor, case: PagedCase, x: Cache) -> ErrorReport:
    """Apply the error rule, sequence by sequence.

    Args:
        out: [batch, num_heads_q, seqlen_q, head_dim_v], the result; where queries are packed
            [total_q, num_heads_q, head_dim_v].
        lse: [batch, num_heads_q, seqlen_q] or [num_heads_q, total_q].
        case: what was asked.
        x: the case's tensors.

    Returns:
        The report of the first sequence that fails, else of the last one.
    """
    if x.lengths_q:
        out, lse = as_batch(out), lse[None]
    for b in range(len(case.lengths)):
        own = x.place(b)
        tensors = out[own], *x.sequence(b)
        report = error_report(*tensors, lse=lse[own], mask=x.mask(b), **case.options())
        if not report.ok:
            break
    return report
