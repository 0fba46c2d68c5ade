"""Call torch's fused backward operators, given out and lse of our forward pass.

Both recompute the weights from q, k and lse, so they take the results of any forward pass that
computed the same attention:

- `_flash_attention_backward`, FlashAttention-2: grouped heads, causal masks and windows;
- `_efficient_attention_backward`: masks and unequal head dims; it copies k and v for grouped heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcore.backends import torch_own
from flashcore.problem import Problem
from flashcore.problem.memory_layout import with_columns, with_strides_of_empty_like

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]

_flash_operator = torch_own.flash_attention_backward
_efficient_operator = torch.ops.aten._efficient_attention_backward

FLASH_MIN_ARCH = 80
FLASH_HEAD_DIM_MAX = 256
EFFICIENT_HEAD_DIM_MAX = 256  # above it the operator recomputes through slow memory
LSE_ALIGNMENT = 32  # rows of lse, of `_efficient_attention_backward`
PACKET = 8  # elements; head dims are multiples of it
BIAS_ALIGNMENT = 16  # elements between two rows of its bias
CAUSAL_FROM_TOP_LEFT, CAUSAL_FROM_BOTTOM_RIGHT = 1, 2  # its custom_mask_type
# A broadcast bias gets its gradient from one that is not; up to this many times the bias's size.
BIAS_GRADIENT_MAX = 16


def obstacle_to_fused(problem: Problem, through_lse: bool) -> str | None:
    """Return why neither operator computes the gradient of a call, or None."""
    if problem.device != "cuda" or problem.arch == 0:
        return "torch's fused backward operators need an NVIDIA GPU"
    if problem.dtype not in ("float16", "bfloat16"):
        return f"torch's fused backward operators do not take {problem.dtype}"
    if problem.softcap:
        return "torch's fused backward operators do not know soft-capping"
    if through_lse:
        return "torch's fused backward operators take no gradient of lse"
    return None


def obstacle_to_flash(problem: Problem) -> str | None:
    """Return why FlashAttention-2 does not (where `obstacle_to_fused` finds nothing), or None."""
    if problem.arch < FLASH_MIN_ARCH:
        return f"FlashAttention-2 needs sm_{FLASH_MIN_ARCH} or later"
    if problem.mask is not None:
        return "FlashAttention-2 takes no mask"
    if problem.head_dim != problem.head_dim_v or problem.head_dim > FLASH_HEAD_DIM_MAX:
        return f"FlashAttention-2 takes equal head dims up to {FLASH_HEAD_DIM_MAX}"
    if _flash_window(problem) is None:
        return "FlashAttention-2 aligns its band with the last query, on both of its sides"
    return None


def obstacle_to_efficient(problem: Problem, mask_grad_elements: int) -> str | None:
    """Return why the memory-efficient operator does not, or None."""
    if problem.varlen != "none":
        return "torch's memory-efficient backward serves each sequence by itself"
    if max(problem.head_dim, problem.head_dim_v) > EFFICIENT_HEAD_DIM_MAX:
        return f"torch's memory-efficient backward is slow above head_dim {EFFICIENT_HEAD_DIM_MAX}"
    if _efficient_band(problem) is None:
        return "torch's memory-efficient backward knows causal masks, but no windows"
    if problem.mask is not None and problem.mask.dtype not in ("bool", problem.dtype):
        return f"it would round a {problem.mask.dtype} mask to {problem.dtype}"
    scores = problem.batch * problem.num_heads_q * problem.seqlen_q * problem.seqlen_k
    if mask_grad_elements and scores > BIAS_GRADIENT_MAX * mask_grad_elements:
        return "it would store the gradient of a broadcast mask before summing it"
    return None


def _flash_window(problem: Problem) -> tuple[int, int] | None:
    """Return (left, right) around the diagonal of the last query, -1 for all; None where
    FlashAttention-2 has no such band."""
    if problem.varlen == "packed":
        if problem.causal == "upper_left" and problem.window_right >= 0:
            return None  # where that diagonal lies depends on each sequence's lengths
        if problem.causal == "upper_left" and problem.window_left >= 0:
            return None
        return problem.window_left, problem.window_right
    shift = problem.seqlen_k - problem.seqlen_q - problem.diag_offset
    left, right = problem.window_left, problem.window_right
    left, right = left if left < 0 else left + shift, right if right < 0 else right - shift
    lost = (left < 0) != (problem.window_left < 0) or (right < 0) != (problem.window_right < 0)
    return None if lost else (left, right)


def _efficient_band(problem: Problem) -> int | None:
    """Return custom_mask_type; None where there is no such."""
    if problem.window_left >= 0:
        return None
    if problem.window_right < 0:
        return 0
    if problem.diag_offset + problem.window_right == 0:
        return CAUSAL_FROM_TOP_LEFT
    if problem.diag_offset + problem.window_right == problem.seqlen_k - problem.seqlen_q:
        return CAUSAL_FROM_BOTTOM_RIGHT
    return None


def flash_gradients(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> Gradients:
    """Compute dq, dk and dv by FlashAttention-2; the tensors are those of `attention`."""
    dout, lse = _without_empty_rows(problem, dout, lse)
    rows = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
    dq, dk, dv = (x.transpose(1, 2) for x in _flash(problem, rows, lse))
    return dq, dk, dv, None


def packed_flash_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dv of packed sequences by one call of FlashAttention-2.

    Args:
        problem: the description of the call, varlen "packed".
        q: [total_q, num_heads_q, head_dim].
        k: [total_k, num_heads_kv, head_dim].
        v: [total_k, num_heads_kv, head_dim_v].
        cu_seqlens_q: int32, [batch + 1].
        cu_seqlens_k: int32, [batch + 1].
        out: the forward's output, [total_q, num_heads_q, head_dim_v].
        lse: the forward's lse, [num_heads_q, total_q].
        dout: gradient of out.

    Returns:
        dq, dk, dv: shapes and dtypes of q, k and v; 0 in rows of no sequence.
    """
    empty = lse == -math.inf
    dout = dout.masked_fill(empty.t().unsqueeze(-1), 0.0)
    # As the kernels clamp them: torch's operator would follow them out of the tensors.
    cu_q, cu_k = (
        cu.clamp(0, total).cummax(0).values.to(torch.int32)
        for cu, total in ((cu_seqlens_q, problem.total_q), (cu_seqlens_k, problem.total_k))
    )
    rows = [with_whole_packets(x) for x in (dout, q, k, v, out)]
    gradients = _flash(problem, rows, lse.masked_fill(empty, math.inf), lengths=(cu_q, cu_k))
    for x, cu in zip(gradients, (cu_q, cu_k, cu_k), strict=True):
        row = torch.arange(x.shape[0], device=x.device)
        x.masked_fill_(((row < cu[0]) | (row >= cu[-1]))[:, None, None], 0.0)
    dq, dk, dv = gradients
    return laid_out_as(q, dq), laid_out_as(k, dk), laid_out_as(v, dv)


def _flash(
    problem: Problem,
    rows: list[Tensor],
    lse: Tensor,
    lengths: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator. `rows` are dout, q, k, v and out, [batch, seqlen, num_heads, head_dim] or
    [total, num_heads, head_dim] with lengths."""
    window = _flash_window(problem)
    assert window is not None
    no_dropout = torch.empty(0, dtype=torch.uint64, device=lse.device)
    gradients: tuple[Tensor, Tensor, Tensor] = _flash_operator(
        _with_unit_stride(rows[0]),
        *rows[1:],
        lse.contiguous(),
        *(lengths or (None, None)),
        problem.seqlen_q,
        problem.seqlen_k,
        0.0,
        window[0] < 0 and window[1] == 0,
        no_dropout,
        no_dropout,
        scale=problem.scale,
        window_size_left=None if window[0] < 0 else window[0],
        window_size_right=None if window[1] < 0 else window[1],
    )
    return gradients


def efficient_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    needs_mask_grad: bool,
) -> Gradients:
    """Compute dq, dk, dv and dmask by the memory-efficient operator. It knows no groups of heads:
    heads of k and v are repeated for it, and their gradients summed."""
    dout, lse = _without_empty_rows(problem, dout, lse)
    group = problem.group_size

    def repeated(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1) if group > 1 else x

    def summed(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if group == 1:
            return x
        by_group = x.unflatten(1, (problem.num_heads_kv, group))
        return by_group.sum(2, dtype=torch.float32).to(x.dtype)

    padding = -problem.seqlen_q % LSE_ALIGNMENT
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, dbias = _efficient_operator(
        _with_unit_stride(dout.transpose(1, 2)),
        q.transpose(1, 2),
        repeated(k).transpose(1, 2),
        repeated(v).transpose(1, 2),
        None if mask is None else _bias(problem, mask),
        out.transpose(1, 2).contiguous(),  # the operator assumes it, unlike of the others
        None,
        None,
        problem.seqlen_q,
        problem.seqlen_k,
        torch.nn.functional.pad(lse, (0, padding), value=math.inf),
        0.0,
        no_dropout,
        no_dropout,
        _efficient_band(problem),
        needs_mask_grad,
        scale=problem.scale,
    )
    dmask = None
    if mask is not None and needs_mask_grad:
        dmask = dbias.to(torch.float32).sum_to_size(mask.shape).to(mask.dtype)
    dq = dq.transpose(1, 2)
    return dq, summed(dk), summed(dv), dmask


def _bias(problem: Problem, mask: Tensor) -> Tensor:
    """Return the mask as an additive one of q's dtype, rows BIAS_ALIGNMENT apart, expanded."""
    mask = mask[(None,) * (4 - mask.dim())]
    mask = mask.expand(*mask.shape[:3], problem.seqlen_k)
    columns = problem.seqlen_k + -problem.seqlen_k % BIAS_ALIGNMENT
    shape = (*mask.shape[:3], columns)
    bias = torch.zeros(shape, dtype=problem.torch_dtype, device=mask.device)
    bias = bias[..., : problem.seqlen_k]
    if mask.dtype == torch.bool:
        bias.masked_fill_(~mask, -math.inf)
    else:
        bias.copy_(mask)
    return bias.expand(problem.batch, problem.num_heads_q, problem.seqlen_q, problem.seqlen_k)


def _with_unit_stride(x: Tensor) -> Tensor:
    """Return x, or a copy of it: a gradient may arrive expanded."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _without_empty_rows(problem: Problem, dout: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return dout and lse so that empty rows contribute 0: torch writes +inf for their lse."""
    last = problem.seqlen_q - 1 + problem.diag_offset
    if (
        problem.mask is None
        and (problem.window_right < 0 or problem.diag_offset + problem.window_right >= 0)
        and (problem.window_left < 0 or last - problem.window_left < problem.seqlen_k)
    ):
        return dout, lse
    empty = lse == -math.inf
    return dout.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, math.inf)


def with_whole_packets(x: Tensor) -> Tensor:
    """Return x as the operators read it, columns of zeros behind it: rows that are contiguous, of a
    multiple of PACKET elements."""
    missing = -x.shape[-1] % PACKET
    if missing:
        return with_columns(x, x.shape[-1] + missing)
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_out_as(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient without padded columns, and with the strides of `torch.empty_like(x)`,
    which compilers are promised."""
    return with_strides_of_empty_like(x, gradient[..., : x.shape[-1]])
