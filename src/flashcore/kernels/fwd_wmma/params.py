"""Make the kernel's argument from Problem and Plan, in mirrors of the structs in
kernels/tile/params.cuh."""

from __future__ import annotations

import ctypes
import math

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.problem.folding import as_launched

LOG2_E = math.log2(math.e)
_MAX_GRID = 2**31 - 1
_MAX_ROW_STRIDE = 2**31 - 1


class AttnParams(ctypes.Structure):
    """Mirror `struct AttnParams` in kernels/tile/params.cuh, field by field."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out", "lse")]
        + [
            (name, ctypes.c_int64)
            for name in (
                "q_batch_stride",
                "q_head_stride",
                "k_batch_stride",
                "k_head_stride",
                "v_batch_stride",
                "v_head_stride",
                "mask_batch_stride",
                "mask_head_stride",
                "mask_row_stride",
                "mask_col_stride",
            )
        ]
        + [
            (name, ctypes.c_int32)
            for name in (
                "q_row_stride",
                "k_row_stride",
                "v_row_stride",
                "num_heads_q",
                "num_heads_kv",
                "seqlen_q",
                "seqlen_k",
                "num_m_blocks",
                "diag_offset",
                "window_left",
                "window_right",
            )
        ]
        + [(name, ctypes.c_float) for name in ("softmax_scale", "softmax_scale_log2", "softcap")]
        + [(name, ctypes.c_void_p) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqlens_k")]
        + [
            (name, ctypes.c_int32)
            for name in (
                "batch",
                "total_q",
                "total_k",
                "lower_right",
                "max_tiles",
                "num_length_classes",
                "k_rows_per_batch",
                "v_rows_per_batch",
            )
        ]
        + [("tile_counter", ctypes.c_void_p)]
        + [(name, ctypes.c_void_p) for name in ("split_out", "split_stats")]
        + [(name, ctypes.c_int32) for name in ("num_splits", "num_queries")]
    )


class AttnGateParams(AttnParams):
    """Extend AttnParams of a kernel that was built with a debug gate."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("gate_scores", "gate_row_max", "gate_row_sum")]


def grid_size(problem: Problem, plan: Plan) -> int:
    """Return the number of blocks of the one-dimensional grid: one for a row tile of each head of
    each sequence. Of packed sequences, as many as there can be."""
    if problem.varlen == "packed":  # tile numbers, see tile/sequence.cuh
        num_m_blocks = problem.total_q // plan.block_m + problem.batch + 1
        return num_m_blocks * problem.num_heads_q
    problem = as_launched(problem, plan.folds_heads)
    num_m_blocks = -(-problem.seqlen_q // plan.block_m)
    return num_m_blocks * problem.num_heads_q * problem.batch


def check_limits(problem: Problem, plan: Plan) -> None:
    """Raise NotImplementedError if a problem is too large for one launch."""
    if grid_size(problem, plan) > _MAX_GRID:
        raise NotImplementedError(
            f"{grid_size(problem, plan)} row tiles exceed a grid's {_MAX_GRID}; split the batch"
        )
    for name, strides in (
        ("q", problem.q_strides),
        ("k", problem.k_strides),
        ("v", problem.v_strides),
    ):
        if strides[2] > _MAX_ROW_STRIDE:
            raise NotImplementedError(
                f"{name} has a stride of {strides[2]} elements between rows, "
                f"more than {_MAX_ROW_STRIDE}; pass {name}.contiguous()"
            )


def set_keys(params: AttnParams, problem: Problem) -> None:
    """Write what depends on the keys, the mask and their number alone.

    Args:
        params: to be changed.
        problem: as the kernel sees it (folding.as_launched).
    """
    mask_strides = (0, 0, 0, 0) if problem.mask is None else problem.mask.strides
    params.k_batch_stride, params.k_head_stride, params.k_row_stride = problem.k_strides
    params.v_batch_stride, params.v_head_stride, params.v_row_stride = problem.v_strides
    params.mask_batch_stride, params.mask_head_stride = mask_strides[:2]
    params.mask_row_stride, params.mask_col_stride = mask_strides[2:]
    params.seqlen_k, params.diag_offset = problem.seqlen_k, problem.diag_offset
    params.window_left, params.window_right = problem.window_left, problem.window_right


def build_params(
    problem: Problem, plan: Plan, pointers: dict[str, int | None]
) -> AttnParams | AttnGateParams:
    """Return the kernel's argument.

    Args:
        problem: shapes, strides and options.
        plan: tiles and gate.
        pointers: address by field name: q, k, v, mask, out, lse; for sequences of different
            lengths cu_seqlens_q, cu_seqlens_k or seqlens_k; for a gate gate_scores, gate_row_max,
            gate_row_sum. A missing one is null.

    Returns:
        The filled structure.

    Raises:
        NotImplementedError: the problem is too large for one launch.
    """
    num_queries = problem.seqlen_q
    check_limits(problem, plan)
    problem = as_launched(problem, plan.folds_heads)
    params = AttnParams() if plan.gate is None else AttnGateParams()
    for name, address in pointers.items():
        setattr(params, name, address)
    params.q_batch_stride, params.q_head_stride, params.q_row_stride = problem.q_strides
    set_keys(params, problem)
    params.num_heads_q, params.num_heads_kv = problem.num_heads_q, problem.num_heads_kv
    params.seqlen_q = problem.seqlen_q
    params.num_m_blocks = -(-problem.seqlen_q // plan.block_m)
    params.softmax_scale = problem.scale
    params.softmax_scale_log2 = problem.scale * LOG2_E
    params.softcap = problem.softcap
    params.num_queries = num_queries
    params.batch = problem.batch
    params.total_q, params.total_k = problem.total_q, problem.total_k
    params.lower_right = problem.causal != "upper_left"
    if problem.varlen == "packed":
        params.max_tiles = grid_size(problem, plan)
        # Class c holds sequences of more than 2^(c - 1) and at most 2^c key tiles.
        params.num_length_classes = (-(-problem.total_k // plan.block_n) - 1).bit_length() + 1
    return params
