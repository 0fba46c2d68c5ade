"""Make paged caches whose unused memory would show in a result, and their sequences one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WILD = (-1, 2**31 - 1)  # entries that must not be read


class Cache(NamedTuple):
    """A cache holds what `attention_paged` takes, and the true lengths."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    seqlens_k: Tensor
    lengths: tuple[int, ...]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of `attention_paged`."""
        return self[:5]

    def sequence(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of one sequence: [1, num_heads, length, dim]."""
        n, page_size = self.lengths[b], self.k_pages.shape[2]
        pages = self.page_table[b, : -(-n // page_size)].long()
        k, v = (
            x[pages].transpose(0, 1).flatten(1, 2).unsqueeze(0)[:, :, :n]
            for x in (self.k_pages, self.v_pages)
        )
        return self.q[b : b + 1], k, v


def make_cache(
    page_size: int,
    lengths: Sequence[int],
    *,
    told: Sequence[int] | None = None,
    max_pages: int | None = None,
    num_heads_q: int = 2,
    num_heads_kv: int = 1,
    seqlen_q: int = 3,
    head_dim: int = 64,
    head_dim_v: int = 64,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    heads_first: bool = False,
    shared: int = 0,
    seed: int = 0,
) -> Cache:
    """Make a cache in pages in random order. Rows of no key hold NaN, and entries of the table
    behind a sequence's last page are WILD.

    Args:
        page_size: keys of a page.
        lengths: keys of each sequence.
        told: what seqlens_k says, if that is not the truth; beyond what the table reaches, or
            negative.
        max_pages: columns of the table; by default one more than the longest sequence has.
        num_heads_q: heads of q.
        num_heads_kv: heads of k and v.
        seqlen_q: queries of each sequence.
        head_dim: of q and k.
        head_dim_v: of v.
        dtype: of q, k and v.
        device: of all tensors.
        heads_first: whether pages are [num_heads_kv, page_size, dim] in memory, instead of
            [page_size, num_heads_kv, dim].
        shared: whole pages at the start that all sequences share, as far as they have so many.
        seed: of the values and of the order of pages.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // page_size) for n in lengths]
    if max_pages is None:
        max_pages = max(counts) + 1
    num_pages = sum(counts) + 2
    order = torch.randperm(num_pages, generator=generator).tolist()
    common = order[:shared]
    free = iter(order[shared:])
    table = torch.tensor(WILD, dtype=torch.int32).repeat(len(lengths), max_pages)[:, :max_pages]
    used = torch.zeros(num_pages, page_size, dtype=torch.bool)
    for b, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        whole = min(n // page_size, shared)
        pages = [*common[:whole], *(next(free) for _ in range(count - whole))]
        table[b, :count] = torch.tensor(pages, dtype=torch.int32)
        for j, page in enumerate(pages):
            used[page, : n - j * page_size] = True

    def pages_of(dim: int) -> Tensor:
        x = torch.randn(num_pages, page_size, num_heads_kv, dim, generator=generator)
        x[~used] = torch.nan
        x = x.to(dtype).to(device)
        return x.transpose(1, 2).contiguous() if heads_first else x.transpose(1, 2)

    rows = len(lengths), num_heads_q, seqlen_q
    q = torch.randn(*rows, head_dim, generator=generator).to(dtype)
    seqlens_k = torch.tensor(lengths if told is None else told, dtype=torch.int32)
    k_pages, v_pages = pages_of(head_dim), pages_of(head_dim_v)
    return Cache(
        q.to(device), k_pages, v_pages, table.to(device), seqlens_k.to(device), tuple(lengths)
    )
