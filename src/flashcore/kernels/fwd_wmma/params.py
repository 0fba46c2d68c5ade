"""Make the kernel's argument from Problem and Plan, in mirrors of the structs in
kernels/tile/params.cuh."""

from __future__ import annotations

import ctypes
import math
from typing import Any, ClassVar

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.problem import Problem
from flashcore.problem.folding import BOX_ROWS, as_launched

LOG2_E = math.log2(math.e)
_MAX_GRID = 2**31 - 1
SCALE_STRIDES = ("k_scale_batch", "k_scale_head", "v_scale_batch", "v_scale_head")
_MAX_ROW_STRIDE = 2**31 - 1


def _fields(kind: type[Any], names: str) -> list[tuple[str, type[Any]]]:
    return [(name, kind) for name in names.split()]


class Tensors(ctypes.Structure):
    """Hold the addresses of what every kernel reads and writes."""

    _fields_ = _fields(ctypes.c_void_p, "q k v mask out lse sinks")


class TensorStrides(ctypes.Structure):
    """Hold the strides of q, k or v in elements."""

    _fields_ = _fields(ctypes.c_int64, "batch head") + _fields(ctypes.c_int32, "row")


class MaskStrides(ctypes.Structure):
    """Hold the strides of the mask in elements."""

    _fields_ = _fields(ctypes.c_int64, "batch head row col")


class Strides(ctypes.Structure):
    """Hold the strides by tensor."""

    _fields_ = [*_fields(TensorStrides, "q k v"), ("mask", MaskStrides)]


class Band(ctypes.Structure):
    """Say which keys a query sees."""

    _fields_ = _fields(ctypes.c_int32, "diag_offset window_left window_right tree_begin")


class Lengths(ctypes.Structure):
    """Describe sequences of different lengths."""

    _fields_ = _fields(ctypes.c_void_p, "cu_seqlens_q cu_seqlens_k seqlens_k") + _fields(
        ctypes.c_int32,
        "total_q total_k lower_right max_tiles num_length_classes"
        " k_rows_per_batch v_rows_per_batch tree_size",
    )


class Splits(ctypes.Structure):
    """Hold partial results of rows whose keys are split over blocks."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "split_out split_stats"),
        *_fields(
            ctypes.c_int32,
            "num_splits most_polls num_lines heads_of_line num_ranges least_tiles",
        ),
        ("adding_up", ctypes.c_float),
    ]


class Pages(ctypes.Structure):
    """Describe a cache in pages."""

    _fields_ = [
        ("page_table", ctypes.c_void_p),
        *_fields(ctypes.c_int32, "page_table_stride num_pages"),
    ]


class Scales(ctypes.Structure):
    """Say what the elements of 8-bit caches count."""

    _fields_ = [
        *_fields(ctypes.c_void_p, "k_scale v_scale"),
        *_fields(ctypes.c_int32, "k_scale_batch k_scale_head v_scale_batch v_scale_head"),
        ("v_factor", ctypes.c_float),
    ]


class Gate(ctypes.Structure):
    """Hold the addresses of what a debug gate writes or reads."""

    _fields_ = _fields(ctypes.c_void_p, "gate_scores gate_row_max gate_row_sum")


class AttnParams(ctypes.Structure):
    """Mirror `struct AttnParams` in kernels/tile/params.cuh, group by group and field by field.
    The fields of all groups but `strides` are attributes of this structure too, with their offsets
    in it: an address is placed by its field's name."""

    _anonymous_: ClassVar[tuple[str, ...]] = (
        "tensors", "band", "lengths", "splits", "pages", "scales",
    )  # fmt: skip
    _fields_ = [
        ("tensors", Tensors),
        *_fields(
            ctypes.c_int32,
            "batch num_heads_q num_heads_kv seqlen_q seqlen_k num_queries num_m_blocks",
        ),
        *_fields(ctypes.c_float, "softmax_scale softmax_scale_log2 softcap"),
        ("band", Band),
        ("strides", Strides),
        ("lengths", Lengths),
        ("splits", Splits),
        ("tile_counter", ctypes.c_void_p),
        ("pages", Pages),
        ("scales", Scales),
        ("max_score", ctypes.c_void_p),
    ]


class AttnGateParams(AttnParams):
    """Extend AttnParams of a kernel that was built with a debug gate."""

    _anonymous_: ClassVar[tuple[str, ...]] = ("gate",)
    _fields_ = [("gate", Gate)]


def grid_size(problem: Problem, plan: Plan) -> int:
    """Return the number of blocks of the one-dimensional grid: one for a row tile of each head of
    each sequence. Of packed sequences, as many as there can be."""
    if problem.packs_queries:  # tile numbers, see tile/sequence.cuh
        folded = max(1, plan.folds_heads)
        most_rows = -(-problem.total_q // (BOX_ROWS // folded)) * BOX_ROWS if folded > 1 else 0
        num_m_blocks = max(problem.total_q, most_rows) // plan.block_m + problem.batch + 1
        return num_m_blocks * (problem.num_heads_q // folded)
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
    params.strides.k = TensorStrides(*problem.k_strides)
    params.strides.v = TensorStrides(*problem.v_strides)
    params.strides.mask = MaskStrides(*mask_strides)
    params.seqlen_k, params.diag_offset = problem.seqlen_k, problem.diag_offset
    params.window_left, params.window_right = problem.window_left, problem.window_right


def build_params(
    problem: Problem, plan: Plan, pointers: dict[str, int | None]
) -> AttnParams | AttnGateParams:
    """Return the kernel's argument.

    Args:
        problem: shapes, strides and options.
        plan: tiles and gate.
        pointers: address by field name: q, k, v, mask, out, lse, sinks, max_score; for sequences of
            different lengths cu_seqlens_q, cu_seqlens_k, seqlens_k or page_table; for a gate
            gate_scores, gate_row_max, gate_row_sum. A missing one is null.

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
    params.strides.q = TensorStrides(*problem.q_strides)
    set_keys(params, problem)
    params.num_heads_q, params.num_heads_kv = problem.num_heads_q, problem.num_heads_kv
    params.seqlen_q = problem.seqlen_q
    params.num_m_blocks = -(-problem.seqlen_q // plan.block_m)
    params.softmax_scale = problem.scale
    params.softmax_scale_log2 = problem.scale * LOG2_E
    params.softcap = problem.softcap
    params.num_queries = plan.folds_heads if problem.packs_queries else num_queries
    params.batch = problem.batch
    params.total_q, params.total_k = problem.total_q, problem.total_k
    params.num_pages, params.page_table_stride = problem.num_pages, problem.page_table_stride
    params.lower_right = problem.causal != "upper_left"
    for name, stride in zip(SCALE_STRIDES, problem.scale_strides, strict=True):
        setattr(params, name, stride)
    if problem.packs_queries:
        params.tree_size = 0 if problem.mask is None else problem.mask.size
        params.max_tiles = grid_size(problem, plan)
        most_keys = problem.seqlen_k if problem.has_pages else problem.total_k
        # Class c holds sequences of more than 2^(c - 1) and at most 2^c key tiles.
        params.num_length_classes = (-(-most_keys // plan.block_n) - 1).bit_length() + 1
    return params
