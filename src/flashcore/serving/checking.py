"""Check the arguments of `attention_with_kvcache`; each failure names the argument, its value, the
way out. Nothing here reads what tensors hold, so nothing waits for the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashcore.backends.dispatch import check_backend, resolved
from flashcore.backends.packed import check_lengths
from flashcore.problem import Problem
from flashcore.problem.memory_layout import described_memory
from flashcore.problem.scales import CACHE_DTYPES, OTHER_FLOAT8, check_scales, is_float8
from flashcore.problem.validation import (
    DTYPES,
    SEQLEN_MAX,
    check_device,
    check_mask,
    check_mask_kind,
    check_packed_tree_mask,
    check_plain_tensor,
    check_tree_mask,
    shape_text,
    type_name,
)


def check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, is_packed: bool, pages: bool) -> None:
    """Raise unless q and the caches go together: ranks, dtypes, devices, heads, head_dim."""
    lead = "num_pages, num_heads_kv, page_size" if pages else "batch, num_heads_kv, seqlen_cache"
    rank, shape = (
        (3, "[total_q, num_heads_q, head_dim], as cu_seqlens_q is given")
        if is_packed
        else (4, "[batch, num_heads_q, seqlen_q, head_dim]; packed queries need cu_seqlens_q")
    )
    check_rank("q", q, rank, shape)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_rank(
            name, x, 4, f"[{lead}, head_dim]; {name}.transpose(1, 2) is a view with heads first"
        )
    if q.dtype not in DTYPES:
        raise TypeError(
            f"q has dtype {q.dtype}; supported are {', '.join(DTYPES.values())}: convert it, e.g. "
            "with q.to(torch.bfloat16)"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dtype in OTHER_FLOAT8:
            raise NotImplementedError(
                f"{name} has dtype {x.dtype}; of 8 bits caches are float8_e4m3fn: keep it in that, "
                f"with scales, or in {q.dtype}, the dtype of q"
            )
        check_like_q(
            name, x, q, "q = q.to(k_cache.dtype) is cheaper than another cache", is_cache=True
        )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"v_cache has shape {shape_text(v_cache)} but k_cache has {shape_text(k_cache)}; all "
            "but head_dim must be equal"
        )
    if k_cache.shape[3] != q.shape[-1]:
        raise ValueError(
            f"k_cache has head_dim {k_cache.shape[3]} but q has {q.shape[-1]}; they must be equal "
            "(only v_cache's may differ)"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[3] == 0:
            raise NotImplementedError(f"{name} has head_dim 0; it must be at least 1")
    num_heads_q, num_heads_kv = q.shape[1], k_cache.shape[1]
    if num_heads_q % num_heads_kv if num_heads_kv else num_heads_q:
        raise ValueError(
            f"q has {num_heads_q} heads and k_cache has {num_heads_kv}; q's must be a multiple of "
            f"k_cache's. Caches are [{lead}, head_dim]: of one with heads third pass "
            "k_cache.transpose(1, 2)"
        )


def check_caches_scales(
    k_cache: Tensor, v_cache: Tensor, options: dict[str, Any], batch: int
) -> None:
    """Raise unless caches of 8 bits, both, have scales, and others have none."""
    scales = options["k_scale"], options["v_scale"]
    check_scales(k_cache, v_cache, *scales, batch, ("k_cache", "v_cache"))


def batch_of(q: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_new: Tensor | None) -> int:
    """Return how many sequences there are; raise unless both say the same."""
    if cu_seqlens_q is None:
        if cu_seqlens_new is not None:
            raise ValueError(
                "cu_seqlens_new is given without cu_seqlens_q; packed new tokens need "
                "packed queries"
            )
        return q.shape[0]
    meaning = "0, then where each sequence ends"
    entries = max(
        1,
        cu_seqlens_q.shape[0]
        if isinstance(cu_seqlens_q, Tensor) and cu_seqlens_q.dim() == 1
        else 1,
    )
    check_vector("cu_seqlens_q", cu_seqlens_q, q, entries, meaning)
    if cu_seqlens_new is not None:
        check_vector("cu_seqlens_new", cu_seqlens_new, q, entries, meaning)
    return entries - 1


def check_table(
    q: Tensor,
    k_cache: Tensor,
    seqlens_k: Tensor,
    page_table: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    batch: int,
) -> None:
    """Raise unless lengths and tables are int32, on q's device, and of a row a sequence."""
    if isinstance(seqlens_k, int):
        raise TypeError(
            f"seqlens_k must be a torch.Tensor, but is {seqlens_k!r} (int); for one length of all "
            f"pass torch.full((batch,), {seqlens_k}, dtype=torch.int32, device=q.device)"
        )
    vectors = {
        "seqlens_k": (seqlens_k, "the tokens that each sequence has in the cache"),
        "cache_batch_idx": (cache_batch_idx, "the row of the cache that each sequence has"),
        "cache_leftpad": (cache_leftpad, "the place of each sequence's first token"),
    }
    for name, (x, meaning) in vectors.items():
        if x is not None or name == "seqlens_k":
            check_vector(name, x, q, batch, meaning)
    if page_table is None:
        if cache_batch_idx is None and k_cache.shape[0] != batch:
            raise ValueError(
                f"k_cache has batch {k_cache.shape[0]} but there are {batch} sequences; pass "
                "cache_batch_idx to say which rows of the cache they have, or page_table if its "
                "first dimension counts pages"
            )
        return
    if cache_batch_idx is not None:
        raise ValueError(
            "cache_batch_idx and page_table are both given; a page table says where sequences are: "
            "pass page_table[cache_batch_idx] alone"
        )
    check_plain("page_table", page_table)
    if page_table.dtype != torch.int32:
        raise TypeError(
            f"page_table has dtype {page_table.dtype}; it must be int32: pass page_table.int()"
        )
    if page_table.dim() != 2 or page_table.shape[0] != batch:
        raise ValueError(
            f"page_table has shape {shape_text(page_table)}; it must be [batch, pages of the "
            f"longest sequence] with batch {batch}"
        )
    check_device("page_table", page_table, q)
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise ValueError(
            f"page_table has a stride of {page_table.stride(1)} between the pages of a sequence; "
            "pass page_table.contiguous()"
        )


def check_capacity(capacity: int) -> None:
    """Raise unless positions in a sequence have few enough digits."""
    if capacity > SEQLEN_MAX:
        raise NotImplementedError(
            f"a sequence has room for {capacity} tokens; at most {SEQLEN_MAX} are supported: pass "
            "a part of the cache, or fewer columns of page_table"
        )


def check_vector(name: str, x: Any, q: Tensor, entries: int, meaning: str) -> None:
    """Raise unless x is a contiguous int32 vector of so many entries on q's device."""
    if is_compiling():
        if x.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be int32: pass {name}.int()")
    else:
        check_lengths(name, x, q)
    if x.dim() != 1 or x.shape[0] != entries:
        raise ValueError(
            f"{name} has shape {shape_text(x)}; it must have {entries} entries: {meaning}"
        )


def check_masks(
    q: Tensor,
    mask: Tensor | None,
    tree_mask: Tensor | None,
    is_packed: bool,
    batch: int,
    capacity: int,
) -> None:
    """Raise unless masks fit the queries, and the cache or the last keys."""
    if is_packed and mask is not None:
        raise NotImplementedError(
            f"mask (shape {shape_text(mask)}) is given with cu_seqlens_q; packed queries take a "
            "tree_mask alone, of their own tokens: pass padded queries, [batch, num_heads_q, "
            "seqlen_q, head_dim]"
        )
    if mask is not None:
        if is_compiling():
            check_mask_kind(mask, q)
        else:
            check_mask(mask, q, capacity)
    if tree_mask is None:
        return
    check_plain("tree_mask", tree_mask)
    if is_packed:
        check_packed_tree_mask(tree_mask, q, batch)
    else:
        check_tree_mask(tree_mask, q)


def check_backend_serves(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, backend: str, batch: int, capacity: int
) -> None:
    """Raise unless the backend that the caller insists on can compute here, before the caches are
    changed."""
    check_backend(backend)
    if backend in ("auto", "torch") or is_compiling() or q.is_meta:
        return
    k, v = (
        x.new_empty(1, dtype=q.dtype).expand(batch, x.shape[1], capacity, x.shape[3])
        for x in (k_cache, v_cache)
    )
    given = q if q.dim() == 4 else q.new_empty(1).expand(batch, q.shape[1], q.shape[0], q.shape[2])
    problem = Problem.from_tensors(given, k, v)
    if is_float8(k_cache):
        num_pages, _, page_size, _ = k_cache.shape
        pages: dict[str, Any] = {"varlen": "keys"}
        if page_size != capacity:
            pages = {"varlen": "pages", "page_size": page_size, "num_pages": num_pages}
        memory = described_memory(given, k_cache, v_cache)
        dtype = CACHE_DTYPES[k_cache.dtype]
        problem = dataclasses.replace(problem, cache_dtype=dtype, **memory, **pages)
    resolved(problem, backend)


def check_new(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    batch: int,
) -> tuple[Tensor, Tensor] | None:
    """Return the new tokens, if there are any; raise unless they go with the caches, which then
    must be writable."""
    if k_new is None and v_new is None:
        return None
    if k_new is None or v_new is None:
        given, missing = ("k_new", "v_new") if v_new is None else ("v_new", "k_new")
        raise ValueError(f"{given} is given without {missing}; a new token has a key and a value")
    names = ("k_new", k_new, "k_cache", k_cache), ("v_new", v_new, "v_cache", v_cache)
    is_packed = q.dim() == 3
    text, kind = "[batch, num_heads_kv, seqlen_new, head_dim]", "padded"
    if is_packed:
        text, kind = "[total_new, num_heads_kv, head_dim]", "packed"
    for name, x, of, cache in names:
        check_rank(name, x, q.dim(), f"{text}, as q is {kind}")
        wanted: tuple[int, ...] = (batch, cache.shape[1], k_new.shape[-2], cache.shape[3])
        if is_packed:
            wanted = (k_new.shape[0], *wanted[1::2])
        if tuple(x.shape) != wanted:
            raise ValueError(
                f"{name} has shape {shape_text(x)}; for these sequences and this {of} it must be "
                f"{text} = {list(wanted)}"
            )
        check_like_q(name, x, q, f"{name}.to(q.dtype)")
        if any(n > 1 and not step for n, step in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{of} is expanded (strides {list(cache.stride())}), so new tokens would "
                f"overwrite each other; pass {of}.contiguous() and keep that"
            )
    return k_new, v_new


def check_given(out: Tensor | None, lse: Tensor | None, q: Tensor, v_cache: Tensor) -> None:
    """Raise unless the tensors that receive results have the results' shapes, dtypes and device."""
    score_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else tuple(q.shape[:3])
    for name, x, shape, dtype in (
        ("out", out, (*q.shape[:-1], v_cache.shape[3]), q.dtype),
        ("lse", lse, rows, score_dtype),
    ):
        if x is None:
            continue
        check_plain(name, x)
        if x.dtype != dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, but the result has {dtype}")
        if tuple(x.shape) != tuple(shape) or x.device != q.device:
            raise ValueError(
                f"{name} has shape {shape_text(x)} on {x.device}; the result has {list(shape)} on "
                f"{q.device}"
            )


def check_like_q(name: str, x: Tensor, q: Tensor, way_out: str, is_cache: bool = False) -> None:
    """Raise unless a tensor has dtype and device of q; a cache may be of 8 bits."""
    if x.dtype != q.dtype and not (is_cache and is_float8(x)):
        raise TypeError(f"{name} has dtype {x.dtype} but q has {q.dtype}; convert one: {way_out}")
    check_device(name, x, q)


def check_rank(name: str, x: Any, rank: int, shape: str) -> None:
    """Raise unless x is a plain tensor of so many dimensions."""
    check_plain(name, x)
    if x.dim() != rank:
        raise ValueError(
            f"{name} has {x.dim()} dimensions (shape {shape_text(x)}); it must be {shape}"
        )


def check_plain(name: str, x: Any) -> None:
    """Refuse what check_plain_tensor refuses; compiled code has no way to ask for all of it."""
    if not is_compiling():
        check_plain_tensor(name, x)
    elif not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, but is a {type_name(x)}")
