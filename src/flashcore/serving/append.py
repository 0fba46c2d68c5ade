"""Write new keys and values into caches, and rotate queries and keys; as an operator of torch,
`flashcore::append_to_kvcache`, which says that it changes the caches. On a GPU one kernel computes
it (kernels/append), elsewhere operations of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flashcore.backends.obstacles import BFLOAT16_MIN_ARCH, KERNEL_DTYPES, WMMA_MIN_ARCH
from flashcore.errors import BackendUnavailableError, notice_once
from flashcore.kernels.append.params import AppendPlan, AppendTensors
from flashcore.launch.append_call import AppendCall, launch_append
from flashcore.ops.eager import needs_dispatcher
from flashcore.problem.problem import arch_of_device
from flashcore.problem.scales import is_float8, quantised
from flashcore.problem.validation import DTYPES
from flashcore.serving.pages import capacity_of, write
from flashcore.serving.rotary import Rotary
from flashcore.serving.rows import Rows, lengths_after, lengths_before, number_of

_LIBRARY = torch.library.Library("flashcore", "FRAGMENT")
_LIBRARY.define(
    "append_to_kvcache(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor q, Tensor k_new, "
    "Tensor v_new, Tensor seqlens_k, Tensor? page_table, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_new, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, "
    "Tensor? rotary_offsets, Tensor? rotary_positions, str rotary_queries, str backend, "
    "Tensor? k_scale=None, Tensor? v_scale=None) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def append(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    seqlens_k: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_new: Tensor | None,
    rotary: Rotary | None,
    backend: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write new tokens into the caches, in place; rotate the new keys before, and the queries.

    Args:
        k_cache: [num_pages, num_heads_kv, page_size, head_dim]; changed.
        v_cache: [num_pages, num_heads_kv, page_size, head_dim_v]; changed.
        q: [batch, num_heads_q, seqlen_q, head_dim] or [total_q, num_heads_q, head_dim].
        k_new: [batch, num_heads_kv, seqlen_new, head_dim] or [total_new, num_heads_kv, head_dim].
        v_new: likewise, head_dim_v.
        seqlens_k: int32, [batch]: tokens in the cache before.
        page_table: int32, [batch, pages a sequence]; None: sequence b has page b.
        cu_seqlens_q: int32, [batch + 1], where q is packed.
        cu_seqlens_new: int32, [batch + 1], where k_new and v_new are packed.
        rotary: what rotates; None for nothing.
        backend: of the call; with "torch", PyTorch appends on a GPU, too.
        k_scale: float32, broadcastable to [batch, num_heads_kv], of a k_cache of 8 bits: new keys
            are divided by it.
        v_scale: likewise, of v_cache.

    Returns:
        q: rotated.
        seqlens_k: int32, [batch]: tokens in the cache now.
    """
    asked = (None, None, False, None, None, "") if rotary is None else rotary
    arguments = (
        k_cache, v_cache, q, k_new, v_new, seqlens_k, page_table, cu_seqlens_q, cu_seqlens_new,
        *asked, backend, k_scale, v_scale,
    )  # fmt: skip
    if q.is_cuda and not is_compiling() and not needs_dispatcher(q, k_new, v_new, None):
        rotated, lengths = _append_on_gpu(*arguments)
    else:
        rotated, lengths = torch.ops.flashcore.append_to_kvcache(*arguments)
    return q if rotary is None else rotated, lengths


def rotated_queries(
    q: Tensor,
    before: Tensor,
    cu_seqlens_q: Tensor | None,
    rotary: Rotary,
    number_new: Tensor | int,
) -> Tensor:
    """Return the queries rotated.

    Args:
        q: as `append` takes it.
        before: int32, [batch]: tokens in the cache, from 0 to what it has room for.
        cu_seqlens_q: as `append` takes it.
        rotary: what rotates.
        number_new: how many new tokens each sequence has.
    """
    if 0 in q.shape or before.shape[0] == 0:
        return q.clone()
    rows, ahead = Rows.of(q, cu_seqlens_q), number_new - number_of(q, cu_seqlens_q)
    if rotary.queries != "end":
        ahead = 0
    if rotary.queries == "first":
        rows = rows._replace(token=torch.zeros_like(rows.token))
    return rotary.rotate(q, rotary.positions_of(rows, before, ahead))


def _append(
    k_cache: Tensor,
    v_cache: Tensor,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    seqlens_k: Tensor,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_new: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    *asked: Any,
) -> tuple[Tensor, Tensor]:
    """Compute the operator by operations of PyTorch."""
    capacity = capacity_of(k_cache, page_table)
    before, number_new = lengths_before(seqlens_k, capacity), number_of(k_new, cu_seqlens_new)
    rotated = q.new_empty(0)
    has_rows = 0 not in k_new.shape and before.shape[0] > 0
    rows = Rows.of(k_new, cu_seqlens_new) if has_rows else None
    if rotary_cos is not None and rotary_sin is not None:
        rotary = Rotary(rotary_cos, rotary_sin, *asked[:4])
        rotated = rotated_queries(q, before, cu_seqlens_q, rotary, number_new)
        if rows is not None:
            k_new = rotary.rotate(k_new, rotary.positions_of(rows, before))
    if rows is not None:
        k_scale, v_scale = _both_scales(asked[5:])
        k_new = _as_elements(k_new, k_scale, rows, before.shape[0], k_cache.dtype)
        v_new = _as_elements(v_new, v_scale, rows, before.shape[0], v_cache.dtype)
        write((k_cache, v_cache), page_table, before, (k_new, v_new), rows)
    return rotated.contiguous(), lengths_after(seqlens_k, capacity, number_new)


def _both_scales(given: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """Return the scales of k and v: torch leaves out the last arguments of an operator where they
    have their default, None."""
    k_scale, v_scale = (*given, None, None)[:2]
    return k_scale, v_scale


def _as_elements(
    x: Tensor, scale: Tensor | None, rows: Rows, batch: int, dtype: torch.dtype
) -> Tensor:
    """Return new tokens as the elements of a cache of 8 bits; of another as they are."""
    if scale is None:
        return x
    of_sequences = scale.expand(batch, x.shape[1])
    if x.dim() == 4:
        return quantised(x, of_sequences[..., None, None], dtype)
    return quantised(x, of_sequences[rows.sequence][..., None], dtype)


def _append_on_gpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute the operator by one kernel, if it takes the tensors' dtype."""
    k_cache, v_cache, q, k_new, v_new, seqlens_k, table, cu_q, cu_new, cos, sin = arguments[:11]
    interleaved, offsets, positions, queries, backend, *scales = arguments[11:]
    variant = _variant_of(k_cache, q, k_new, seqlens_k, cos, interleaved, backend)
    if variant is None:
        return _append(*arguments)
    rotated = q.new_empty(0 if cos is None else q.shape)
    lengths = torch.empty_like(seqlens_k)
    if cos is not None:
        # The kernel reads rows whose elements are contiguous.
        cos, sin = (x if x.stride(1) == 1 else x.contiguous() for x in (cos, sin))
        positions = None if positions is None else positions.contiguous()
    tensors = AppendTensors(
        None if cos is None else q, k_new, v_new, None if cos is None else rotated, k_cache,
        v_cache, cos, sin, seqlens_k, lengths, table, cu_q, cu_new, offsets, positions,
        *_both_scales(scales),
    )  # fmt: skip
    try:
        launch_append(*variant, tensors, queries or "end")
    except BackendUnavailableError as error:  # it cannot be compiled here
        notice_once("append", f"PyTorch appends to caches, which takes more launches: {error}")
        return _append(*arguments)
    return rotated, lengths


def _variant_of(
    k_cache: Tensor,
    q: Tensor,
    k_new: Tensor,
    seqlens_k: Tensor,
    cos: Tensor | None,
    interleaved: bool,
    backend: str,
) -> tuple[AppendPlan, int] | None:
    """Return the variant of the kernel that appends, and the GPU's architecture; None where PyTorch
    does it."""
    arch = arch_of_device(q.device.index)
    plan = plan_to_append(k_cache, q, k_new, seqlens_k, cos, interleaved, backend, arch)
    return None if plan is None else (plan, arch)


def plan_to_append(
    k_cache: Tensor,
    q: Tensor,
    k_new: Tensor,
    seqlens_k: Tensor,
    cos: Tensor | None,
    interleaved: bool,
    backend: str,
    arch: int,
) -> AppendPlan | None:
    """Return the variant of the kernel that appends on a GPU of an architecture; None where PyTorch
    does it."""
    dtype = DTYPES[q.dtype]
    lowest = BFLOAT16_MIN_ARCH if dtype == "bfloat16" else WMMA_MIN_ARCH
    sizes = k_cache.numel(), k_new.numel(), q.numel(), seqlens_k.numel()
    if backend == "torch" or dtype not in KERNEL_DTYPES or arch < lowest or 0 in sizes:
        return None
    rotary_dtype = dtype if cos is None else DTYPES[cos.dtype]
    return AppendPlan(dtype, rotary_dtype, interleaved, is_float8(k_cache))


def prepare_append(
    q: Tensor,
    new: tuple[Tensor, Tensor],
    rotary: Rotary | None,
    others: dict[str, Tensor | None],
    backend: str,
    attends: Sequence[str],
) -> AppendCall | None:
    """Return what appends in steps of one description; None where that is not one kernel, which
    takes the tensors as they are.

    Args:
        q: as `append` takes it.
        new: k_new and v_new.
        rotary: without offsets and positions; None for nothing.
        others: the other tensors by field of AppendTensors.
        backend: as `append` takes it.
        attends: see AppendCall; it is given their addresses and those of new, cos and sin behind,
            that of a tensor that is two of them once.
    """
    k_cache, seqlens_k = others["k_cache"], others["seqlens_k"]
    assert k_cache is not None
    assert seqlens_k is not None
    turns: dict[str, Tensor | None] = dict.fromkeys(("q", "q_rotated", "cos", "sin"))
    interleaved, queries = False, "end"
    if rotary is not None:
        interleaved, queries = rotary.interleaved, rotary.queries
        if rotary.cos.stride(1) != 1 or rotary.sin.stride(1) != 1:
            return None
        turns = {"q": q, "q_rotated": q.new_empty(q.shape), "cos": rotary.cos, "sin": rotary.sin}
    variant = _variant_of(k_cache, q, new[0], seqlens_k, turns["cos"], interleaved, backend)
    if variant is None:
        return None
    without: dict[str, Any] = dict.fromkeys(AppendTensors._fields)
    of_new = {"k_new": new[0], "v_new": new[1], "lengths": torch.empty_like(seqlens_k)}
    tensors = AppendTensors(**{**without, **others, **of_new, **turns})
    try:
        return AppendCall(*variant, tensors, queries, attends)
    except BackendUnavailableError:  # it cannot be compiled here, which `append` says
        return None


def _fake(k_cache: Tensor, v_cache: Tensor, q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    rotated = q.new_empty(0 if others[6] is None else q.shape)
    return rotated, torch.empty_like(others[2])


_LIBRARY.impl("append_to_kvcache", _append, "CPU")
_LIBRARY.impl("append_to_kvcache", _append_on_gpu, "CUDA")
torch.library.register_fake("flashcore::append_to_kvcache", _fake, lib=_LIBRARY)
