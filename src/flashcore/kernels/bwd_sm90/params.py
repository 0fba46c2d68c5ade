"""Make the arguments of the backward kernels for Hopper."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import torch

from flashcore.kernels.bwd_sm90.plan import BwdSm90Plan
from flashcore.kernels.fwd_sm90.params import make_ragged
from flashcore.kernels.fwd_wmma import params
from flashcore.kernels.fwd_wmma.params import AttnGateParams, AttnParams
from flashcore.kernels.tensor_map import TensorMap
from flashcore.problem import Problem
from flashcore.problem.memory_layout import strides_of

_ELEMENT_BYTES = 2
MAPS = ("q", "k", "v", "dout", "dq", "dk", "dv")
LENGTHS = ("seqlens_k", "cu_seqlens_q", "cu_seqlens_k")  # those that a problem may have
# Besides AttnParams'.
POINTERS = ("dlse", "delta", "dq_sums", "dmask", "dmask_shares", "dq_turns", "delta_count")


class MaskGradient(ctypes.Structure):
    """Say what of an additive mask's gradient is summed."""

    _fields_ = [(name, ctypes.c_int32) for name in ("batch", "heads", "num_shares", "row_stride")]


def _fields(attn: type[AttnParams]) -> list[tuple[str, Any]]:
    return [
        *((f"{name}_map", TensorMap) for name in MAPS),
        ("attn", attn),
        ("num_heads", ctypes.c_int32),
        ("heads_per_section", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in POINTERS[:5]),
        ("mask_gradient", MaskGradient),
        ("dq_turns", ctypes.c_void_p),
        ("first_head_q", ctypes.c_int32),
        ("first_head_kv", ctypes.c_int32),
        ("delta_count", ctypes.c_void_p),
        ("padding", ctypes.c_uint8 * (-(ctypes.sizeof(attn) + 88) % 64)),
    ]


class AttnBwdSm90Params(ctypes.Structure):
    """Mirror `struct AttnBwdSm90Params` in kernels/bwd_sm90/bwd_sm90.cuh; 64-byte aligned there."""

    _fields_ = _fields(AttnParams)


class AttnBwdSm90GateParams(ctypes.Structure):
    """Mirror it as it is in a kernel that was built with a debug gate."""

    _fields_ = _fields(AttnGateParams)


# The part of L2 that blocks which run side by side may take for the tiles they stream; see
# kernels/fwd_sm90/params.py.
_GROUP_BYTES = 8 << 20


def heads_per_section(problem: Problem, plan: BwdSm90Plan, num_blocks: int) -> int:
    """Return the number of heads whose tiles `num_blocks` blocks draw together under a right bound
    (fwd_sm90/schedule_sm90.cuh): as many as L2 holds what their blocks stream, and enough tiles to
    keep the blocks busy. Heads of q in the kernel of dq, else of k and v."""
    num_heads = _num_heads(problem, plan)
    streamed = problem.seqlen_k if plan.is_dq else problem.seqlen_q * problem.group_size
    head_bytes = _ELEMENT_BYTES * streamed * (problem.head_dim + problem.head_dim_v)
    tiles_of_head = max(1, plan.num_pieces(problem) // num_heads)
    group_bytes = _GROUP_BYTES
    if plan.also_dq:
        # Blocks that add to the same sums should be few, and they stream the same rows at about
        # the same time, so that of long heads L2 need not hold all. Measured at 1k to 16k.
        group_bytes = int(_GROUP_BYTES * min(4.0, max(1.0, math.sqrt(problem.seqlen_q / 1024))))
    wanted = max(1, group_bytes // max(1, head_bytes), round(num_blocks / tiles_of_head))
    return min(num_heads, wanted)


def _num_heads(problem: Problem, plan: BwdSm90Plan) -> int:
    """Return the heads of all batches that a launch takes."""
    of_group = problem.group_size if plan.is_dq else 1
    if plan.heads is not None:
        return plan.heads[1] * of_group
    return problem.num_heads_kv * of_group * problem.batch


def build_params_bwd_sm90(
    problem: Problem,
    plan: BwdSm90Plan,
    tensors: Mapping[str, torch.Tensor],
    num_blocks: int,
    addresses: Mapping[str, int] | None = None,
) -> AttnBwdSm90Params | AttnBwdSm90GateParams:
    """Return the argument of one of the kernels.

    Args:
        problem: shapes, strides and options of the forward.
        plan: of the kernel.
        tensors: by name q, k, v, out, lse, dout, dq, dk, dv, delta; mask, dlse, dq_sums, dmask and
            dmask_shares where there are some; gate_scores for a plan with a gate; seqlens_k, or
            cu_seqlens_q and cu_seqlens_k, where the problem has lengths. Of packed sequences out is
            contiguous as [total, heads, dim].
        num_blocks: of the launch.
        addresses: of the tensors, by name; None for the simulator, which places them itself.

    Returns:
        The filled structure, with descriptors that are still to be encoded.

    Raises:
        NotImplementedError: the problem is too large for one launch.
    """
    addresses = addresses or dict.fromkeys(tensors, 0)
    argument = AttnBwdSm90Params() if plan.gate is None else AttnBwdSm90GateParams()
    inputs: dict[str, int | None] = {x: addresses[x] for x in ("q", "k", "v", "out", "lse")}
    others = {name: addresses.get(name) for name in ("mask", *LENGTHS)}
    if plan.gate is not None:
        others["gate_scores"] = addresses.get("gate_scores")
    argument.attn = params.build_params(problem, plan, inputs | others)
    if not plan.is_dq:
        argument.attn.num_m_blocks = -(-problem.seqlen_k // plan.block_n)  # the tiles of a head
    if problem.varlen == "packed":
        argument.attn.max_tiles = plan.num_pieces(problem)
        walked = -(-problem.total_k // plan.block_n)
        if not plan.is_dq:
            walked = -(-problem.total_q // plan.block_m)
        argument.attn.num_length_classes = (walked - 1).bit_length() + 1
    argument.num_heads = _num_heads(problem, plan)
    if plan.heads is not None:
        first, _ = plan.heads
        argument.first_head_kv, argument.first_head_q = first, first * problem.group_size
    argument.heads_per_section = heads_per_section(problem, plan, num_blocks)
    for name in POINTERS:
        setattr(argument, name, addresses.get(name))
    argument.mask_gradient = MaskGradient(*plan.mask_gradient(problem))
    for name, box_rows in plan.box_rows.items():
        tensor_map = _tensor_map(tensors[name], addresses[name], plan.chunk, box_rows)
        if problem.varlen == "packed":
            make_ragged(tensor_map, 0)
        elif problem.varlen == "keys" and name in ("k", "v"):
            rows_per_batch = tensor_map.batch_stride_bytes // tensor_map.row_stride_bytes
            if problem.batch == 1:
                rows_per_batch = 0
            setattr(argument.attn, f"{name}_rows_per_batch", rows_per_batch)
            make_ragged(tensor_map, (problem.batch - 1) * rows_per_batch)
        setattr(argument, f"{name}_map", tensor_map)
    return argument


def _tensor_map(x: torch.Tensor, address: int, chunk: int, box_rows: int) -> TensorMap:
    batch, heads, rows, cols = x.shape
    # A dimension of size 1 has stride 0; a descriptor wants some legal one.
    batch_bytes, head_bytes, row_bytes = (
        _ELEMENT_BYTES * stride if stride else 16 for stride in strides_of(x)
    )
    return TensorMap(
        base=address,
        row_stride_bytes=row_bytes,
        head_stride_bytes=head_bytes,
        batch_stride_bytes=batch_bytes,
        cols=cols,
        rows=rows,
        heads=heads,
        batches=batch,
        box_cols=chunk,
        box_rows=box_rows,
        element_bytes=_ELEMENT_BYTES,
        swizzle_bytes=chunk * _ELEMENT_BYTES,
    )
