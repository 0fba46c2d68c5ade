"""Make calls of attention_with_kvcache, and compute them plainly: token by token in Python loops,
then each sequence by the float64 oracle."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flashcore.checks.accuracy import error_report


@dataclasses.dataclass
class Step:
    """A Step is the tensors of one call, over a contiguous cache or one in pages.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim], padded also where the call packs.
        caches: of keys and of values.
        new: keys and values [batch, num_heads_kv, seqlen_new, dim], or None.
        lengths: of each sequence before the call; may be out of range.
        table: [batch, pages] as a list of lists, or None.
    """

    q: Tensor
    caches: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor] | None
    lengths: list[int]
    table: list[list[int]] | None = None

    @property
    def seqlens_k(self) -> Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.q.device)

    @property
    def page_table(self) -> Tensor | None:
        if self.table is None:
            return None
        return torch.tensor(self.table, dtype=torch.int32, device=self.q.device)

    def arguments(self) -> dict[str, Any]:
        """Return the call's keyword arguments, with copies of the caches that may be changed."""
        k, v = (x.clone() for x in self.caches)
        found: dict[str, Any] = {"q": self.q, "k_cache": k, "v_cache": v}
        found |= {"seqlens_k": self.seqlens_k, "page_table": self.page_table}
        if self.new is not None:
            found |= {"k_new": self.new[0], "v_new": self.new[1]}
        return found


WILD = (-1, 2**31 - 1, -(2**31))


def make_step(
    lengths: list[int],
    *,
    seqlen_q: int = 1,
    seqlen_new: int | None = None,
    capacity: int = 32,
    page_size: int | None = None,
    num_heads_q: int = 4,
    num_heads_kv: int = 2,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    heads_third: bool = False,
    seed: int = 0,
) -> Step:
    """Return a step with NaN wherever a cache has no token.

    Args:
        lengths: before the call.
        seqlen_q: queries a sequence.
        seqlen_new: new tokens a sequence, 0 for none; by default seqlen_q.
        capacity: tokens that a sequence has room for.
        page_size: of a cache in pages, drawn in any order, with wild entries behind the end; None
            for a contiguous one.
        num_heads_q: of q.
        num_heads_kv: of the caches.
        head_dim: of q and k.
        head_dim_v: of v; by default head_dim.
        dtype: of all.
        device: of all.
        heads_third: whether the caches are [.., tokens, heads, dim] in memory.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    batch, seqlen_new = len(lengths), seqlen_q if seqlen_new is None else seqlen_new
    dims = head_dim, head_dim if head_dim_v is None else head_dim_v
    q = randn(batch, num_heads_q, seqlen_q, head_dim)
    new = tuple(randn(batch, num_heads_kv, seqlen_new, d) for d in dims) if seqlen_new else None
    table = None
    rows, tokens = batch, capacity
    if page_size is not None:
        assert capacity % page_size == 0
        columns, tokens = capacity // page_size, page_size
        rows = batch * columns + 3
        order = torch.randperm(rows, generator=generator).tolist()
        table = [order[b * columns : (b + 1) * columns] for b in range(batch)]
        for b, n in enumerate(lengths):
            used = -(-min(max(n, 0) + seqlen_new, capacity) // page_size)
            table[b][used:] = [WILD[j % 3] for j in range(used, columns)]
    caches = []
    for dim in dims:
        cache = randn(rows, num_heads_kv, tokens, dim)
        if heads_third:
            cache = cache.transpose(1, 2).contiguous().transpose(1, 2)
        caches.append(cache)
    step = Step(q, (caches[0], caches[1]), new, lengths, table)  # type: ignore[arg-type]
    is_token = torch.zeros(rows, tokens, dtype=torch.bool)
    for b, n in enumerate(lengths):
        for t in range(min(max(n, 0), capacity)):
            is_token[place(step, b, t)] = True
    for cache in step.caches:
        cache.masked_fill_(~is_token.to(device)[:, None, :, None], torch.nan)
    return step


def place(step: Step, b: int, t: int) -> tuple[int, int]:
    """Return where token t of sequence b is: which row or page of the cache, and where in it."""
    if step.table is None:
        return b, t
    size = step.caches[0].shape[2]
    return step.table[b][t // size], t % size


def capacity_of(step: Step) -> int:
    """Return how many tokens a sequence has room for."""
    return step.caches[0].shape[2] * (1 if step.table is None else len(step.table[0]))


def written(step: Step, k_new: Tensor | None = None) -> tuple[tuple[Tensor, Tensor], list[int]]:
    """Return the caches after the call, and the lengths.

    Args:
        step: before the call.
        k_new: the new keys, where they are rotated before; by default as they are.
    """
    k, v = (x.clone() for x in step.caches)
    capacity = capacity_of(step)
    lengths = [min(max(n, 0), capacity) for n in step.lengths]
    if step.new is not None:
        keys, values = step.new[0] if k_new is None else k_new, step.new[1]
        for b, n in enumerate(lengths):
            for i in range(min(keys.shape[2], capacity - n)):
                row, at = place(step, b, n + i)
                k[row, :, at], v[row, :, at] = keys[b, :, i], values[b, :, i]
        lengths = [min(n + keys.shape[2], capacity) for n in lengths]
    return (k, v), lengths


def keys_of(step: Step, cache: Tensor, b: int, n: int) -> Tensor:
    """Return the first n tokens of a sequence, [1, num_heads_kv, n, dim]."""
    tokens = [cache[row, :, at] for row, at in (place(step, b, t) for t in range(n))]
    if not tokens:
        return cache.new_zeros((1, cache.shape[1], 0, cache.shape[3]))
    return torch.stack(tokens, dim=1)[None]


def check_step(
    step: Step,
    result: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    *,
    q: Tensor | None = None,
    k_new: Tensor | None = None,
    masks: list[Tensor] | None = None,
    **options: Any,
) -> None:
    """Hold a call's results, and the caches that it left, to the plain computation.

    Args:
        step: before the call.
        result: out and lse.
        caches: after the call.
        q: the queries, where they are rotated; by default those of the step.
        k_new: the new keys, where they are rotated.
        masks: of each sequence, [.., seqlen_q, its length].
        **options: of `attention`.
    """
    expected, lengths = written(step, k_new)
    for have, want in zip(caches, expected, strict=True):
        if k_new is None:
            assert torch.equal(have.nan_to_num(nan=7.0), want.nan_to_num(nan=7.0))
        else:
            torch.testing.assert_close(have, want, equal_nan=True)
    q = step.q if q is None else q
    for b, n in enumerate(lengths):
        k, v = (keys_of(step, x, b, n) for x in expected)
        own = slice(b, b + 1)
        mask = None if masks is None else masks[b]
        report = error_report(
            result[0][own], q[own], k, v, lse=result[1][own], mask=mask, **options
        )
        assert report.ok, f"sequence {b} of {n} tokens: {report}"
