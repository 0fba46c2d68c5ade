"""Describe the kernel that appends to a cache: its constants, and its argument, a mirror of the
struct in append_kvcache.cuh."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from flashcore.problem.scales import scale_strides

WARPS = 4  # of a block; APPEND_WARPS in append_kvcache.cuh
QUERY_HEADS = 2  # of which a thread moves elements, as in append_kvcache.cuh
RUN = 8  # elements side by side that a thread moves at once, where it can; as there
HEADS_MAX = 2**31 - 256  # of all tokens, numbered in 32 bits, blocks that are not full included
_LANES_LOG2_MAX = 5  # a head is shared by at most a warp
QUERIES = ("end", "begin", "first")  # where queries stand; the kernel knows the numbers


@dataclass(frozen=True, slots=True)
class AppendPlan:
    """An AppendPlan says which variant of the kernel computes a call.

    Args:
        dtype: "float16" or "bfloat16", of all but cos and sin, and of caches of 8 bits.
        rotary_dtype: of cos and sin; "float32" or dtype.
        interleaved: whether neighbours are the pairs that turn.
        is_float8: whether the caches are of float8_e4m3fn, with scales.
    """

    dtype: str
    rotary_dtype: str
    interleaved: bool
    is_float8: bool = False

    kernel = "append_kvcache"
    params_struct = "AppendParams"
    gate = None
    num_threads = 32 * WARPS
    starts_early = True  # where the architecture can

    def constants(self) -> dict[str, object]:
        """Return the constants of the source text."""
        rotary = "float" if self.rotary_dtype == "float32" else self.rotary_dtype
        return {
            "Element": self.dtype,
            "CacheElement": "float8" if self.is_float8 else self.dtype,
            "RotaryElement": rotary,
            "INTERLEAVED": self.interleaved,
        }

    def describe(self) -> str:
        """Return what the kernel is, for people."""
        pairs = "neighbours" if self.interleaved else "halves"
        cache = " into float8_e4m3fn" if self.is_float8 else ""
        return f"{self.kernel} {self.dtype}{cache}, {self.rotary_dtype} angles of {pairs}"


def append_plans(dtypes: Iterable[str] = ("float16", "bfloat16")) -> list[AppendPlan]:
    """Return every variant of the kernel."""
    return [
        AppendPlan(dtype, rotary_dtype, interleaved, is_float8)
        for dtype in dtypes
        for rotary_dtype in (dtype, "float32")
        for interleaved in (False, True)
        for is_float8 in (False, True)
    ]


class AppendTensors(NamedTuple):
    """Hold what the kernel reads and writes, in the order of its argument.

    Args:
        q: [batch, num_heads_q, seqlen_q, head_dim] or [total_q, num_heads_q, head_dim]; None:
            queries are not rotated.
        k_new: [batch, num_heads_kv, seqlen_new, head_dim] or [total_new, num_heads_kv, head_dim].
        v_new: likewise, with head_dim_v.
        q_rotated: as q, contiguous; written.
        k_cache: [num_pages, num_heads_kv, page_size, head_dim]; written.
        v_cache: likewise, with head_dim_v; written.
        cos: [positions, rotary_dim / 2], its last dimension contiguous; None: nothing is rotated.
        sin: likewise.
        seqlens_k: int32, [batch]: tokens before.
        lengths: int32, [batch]: tokens after; written.
        page_table: int32, [batch, columns], its last dimension contiguous, or None.
        cu_seqlens_q: int32, [batch + 1], where q is packed.
        cu_seqlens_new: int32, [batch + 1], where k_new is packed.
        offsets: int32, [batch], or None.
        positions: int32, one for each row of q, contiguous, or None.
        k_scale: float32, broadcastable to [batch, num_heads_kv], of a k_cache of 8 bits; else None.
        v_scale: likewise, of v_cache.
    """

    q: Tensor | None
    k_new: Tensor
    v_new: Tensor
    q_rotated: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    cos: Tensor | None
    sin: Tensor | None
    seqlens_k: Tensor
    lengths: Tensor
    page_table: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_new: Tensor | None
    offsets: Tensor | None
    positions: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None


class RowStrides(ctypes.Structure):
    """Hold the strides of a tensor in elements."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row", "col")]

    @classmethod
    def of(cls, x: Tensor | None) -> RowStrides:
        """Return the strides of a padded tensor, a cache, or a packed tensor; 0 of none."""
        if x is None:
            return cls(0, 0, 0, 0)
        if x.dim() == 4:
            return cls(*x.stride())
        row, head, col = x.stride()
        return cls(0, head, row, col)


_STRIDED = ("q", "k_new", "v_new", "q_rotated", "k_cache", "v_cache")
_ROWS = "cos_stride sin_stride k_scale_batch k_scale_head v_scale_batch v_scale_head"
_NUMBERS = (
    "batch rows_q rows_new seqlen_q seqlen_new num_heads_q num_heads_kv head_dim head_dim_v "
    "page_size num_pages columns table_stride rotary_rows rotary_half queries "
    "lanes_log2 blocks_q rows_have_runs"
)


class AppendParams(ctypes.Structure):
    """Mirror `struct AppendParams` in append_kvcache.cuh, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in AppendTensors._fields),
        *((f"{name}_strides", RowStrides) for name in _STRIDED),
        *((name, ctypes.c_int64) for name in _ROWS.split()),
        *((name, ctypes.c_int32) for name in _NUMBERS.split()),
    ]


def build_append_params(x: AppendTensors, queries: str) -> AppendParams:
    """Return the kernel's argument, without addresses.

    Args:
        x: what it reads and writes.
        queries: where queries stand, of QUERIES.
    """
    rows_q, seqlen_q = (0, 1) if x.q is None else _rows(x.q)
    rows_new, seqlen_new = _rows(x.k_new)
    table = x.page_table
    of_k, of_v = (scale_strides(scale) for scale in (x.k_scale, x.v_scale))
    have_runs = _rows_have_runs(x)
    dim = max(x.k_new.shape[-1], x.v_new.shape[-1])
    units = -(-dim // (2 * RUN if have_runs else 2))  # of two runs, or of two elements
    lanes_log2 = min((units - 1).bit_length(), _LANES_LOG2_MAX)
    groups_q = 0 if x.q is None else rows_q * -(-x.q.shape[1] // QUERY_HEADS)
    return AppendParams(
        **{f"{name}_strides": RowStrides.of(getattr(x, name)) for name in _STRIDED},
        cos_stride=0 if x.cos is None else x.cos.stride(0),
        sin_stride=0 if x.sin is None else x.sin.stride(0),
        k_scale_batch=of_k[0],
        k_scale_head=of_k[1],
        v_scale_batch=of_v[0],
        v_scale_head=of_v[1],
        batch=x.seqlens_k.shape[0],
        rows_q=rows_q,
        rows_new=rows_new,
        seqlen_q=seqlen_q,
        seqlen_new=seqlen_new,
        num_heads_q=0 if x.q is None else x.q.shape[1],
        num_heads_kv=x.k_new.shape[1],
        head_dim=x.k_new.shape[-1],
        head_dim_v=x.v_new.shape[-1],
        page_size=x.k_cache.shape[2],
        num_pages=x.k_cache.shape[0],
        columns=1 if table is None else table.shape[1],
        table_stride=0 if table is None else table.stride(0),
        rotary_rows=0 if x.cos is None else x.cos.shape[0],
        rotary_half=0 if x.cos is None else x.cos.shape[1],
        queries=QUERIES.index(queries),
        lanes_log2=lanes_log2,
        blocks_q=-(-groups_q // (32 * WARPS >> lanes_log2)),
        rows_have_runs=have_runs,
    )


def append_grid_size(params: AppendParams) -> int:
    """Return the number of blocks: those that move queries, then one group of threads for each head
    of each new token; a thread for each length."""
    groups = params.rows_new * params.num_heads_kv
    blocks = params.blocks_q + -(-groups // (32 * WARPS >> params.lanes_log2))
    return max(blocks, -(-params.batch // (32 * WARPS)))


def _rows_have_runs(x: AppendTensors) -> bool:
    """Return whether every row of every tensor is made of runs of RUN elements side by side, which
    all begin at a multiple of their size, if the tensors do."""
    rotary_half = 0 if x.cos is None else x.cos.shape[1]
    dims = x.k_new.shape[-1], x.v_new.shape[-1], rotary_half
    if any(dim % RUN for dim in dims) or max(dims) > 2 * RUN << _LANES_LOG2_MAX:
        return False
    rows = (x.q, x.k_new, x.v_new, x.k_cache, x.v_cache)
    of_rows = [t.stride() for t in rows if t is not None]
    strides = [n for *others, _ in of_rows for n in others]
    strides += [t.stride(0) for t in (x.cos, x.sin) if t is not None]
    return all(last == 1 for *_, last in of_rows) and all(n % RUN == 0 for n in strides)


def _rows(x: Tensor) -> tuple[int, int]:
    """Return how many rows there are, and how many of them a padded sequence has."""
    return (x.shape[0] * x.shape[2], x.shape[2]) if x.dim() == 4 else (x.shape[0], 1)
