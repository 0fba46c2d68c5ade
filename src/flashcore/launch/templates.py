"""Copy the kernel's argument with other addresses and other keys."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from flashcore.kernels.fwd_wmma.params import AttnParams, Lengths, Pages, Scales, Splits
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import forward_of
from flashcore.kernels.tensor_map import TensorMap, encode_maps
from flashcore.launch import descriptors
from flashcore.launch.driver_launch import Argument
from flashcore.problem import Problem

_POINTERS = struct.Struct("6Q")  # q, k, v, mask, out and lse, with which AttnParams begins
_POINTER = struct.Struct("Q")
_OFFSETS = {
    name: getattr(AttnParams, name).offset
    for name in (
        *(x[0] for group in (Lengths, Splits, Pages, Scales) for x in group._fields_),
        *("tile_counter", "sinks", "max_score"),
    )
}


class Template:
    """A template is a kernel's argument, to be copied with other addresses.

    Args:
        content: the struct; TMA descriptors in it are those of tensors of the same description.
        attn_offset: where AttnParams begins in it, in bytes.
        map_offsets: where the descriptors of q, k, v and out are; none for the portable kernel.
        shifts: by how many bytes each of these begins before its tensor (params_sm90.make_ragged).
    """

    def __init__(
        self,
        content: bytes,
        attn_offset: int,
        map_offsets: tuple[int, ...],
        shifts: tuple[int, ...] = (),
    ) -> None:
        self.content, self.attn_offset, self.map_offsets = content, attn_offset, map_offsets
        self._shifts = shifts if any(shifts) else None

    def new(self) -> Argument:
        """Return a copy, whose addresses are still to be placed."""
        return Argument(*descriptors.aligned(self.content))

    def place(
        self, argument: Argument, q: int, k: int, v: int, mask: int, out: int, lse: int
    ) -> None:
        """Write the addresses of the tensors, 0 for none."""
        offset = argument.offset + self.attn_offset
        _POINTERS.pack_into(argument.memory, offset, q, k, v, mask, out, lse)
        if self.map_offsets:
            bases: Iterable[int] = (q, k, v, out)
            if self._shifts is not None:
                bases = ((x - by) % 2**64 for x, by in zip(bases, self._shifts, strict=True))
            pairs = zip(self.map_offsets, bases, strict=True)
            descriptors.readdress(argument.address, pairs)

    def place_others(self, argument: Argument, others: Mapping[str, int]) -> None:
        """Write other addresses, by field of AttnParams."""
        offset = argument.offset + self.attn_offset
        for name, other in others.items():
            _POINTER.pack_into(argument.memory, offset + _OFFSETS[name], other)

    def with_keys(
        self, problem: Problem, plan: Plan, pointers: dict[str, int | None], grid: int
    ) -> Template:
        """Return the template of a problem that differs in the keys, the mask and their number
        alone: what `make_template` returns, for a third of the time."""
        kernel = forward_of(plan)
        params = kernel.params.from_buffer_copy(self.content)
        kernel.set_keys(params, problem, plan, pointers, grid)
        of_keys = [name for name in kernel.maps if name in ("k", "v")]
        encode_maps(params, problem.dtype, descriptors.encode_kind, of_keys)
        return Template(bytes(params), self.attn_offset, self.map_offsets)


def make_template(
    problem: Problem,
    plan: Plan,
    pointers: dict[str, int | None],
    grid: int,
    out_is_rows_first: bool = False,
) -> Template:
    """Return the argument of a problem, with the addresses of some tensors that it describes. With
    `out_is_rows_first` out is [batch, seqlen_q, num_heads_q, head_dim_v], which a kernel writes
    that knows it by its descriptor alone; see KernelCall.with_rows_first."""
    kernel = forward_of(plan)
    params = kernel.build_params(problem, plan, pointers, grid)
    if out_is_rows_first:
        of_out: TensorMap = params.o_map
        of_out.head_stride_bytes = problem.head_dim_v * of_out.element_bytes
        of_out.row_stride_bytes = problem.num_heads_q * of_out.head_stride_bytes
        of_out.batch_stride_bytes = problem.seqlen_q * of_out.row_stride_bytes
    tensors = [pointers["out" if name == "o" else name] or 0 for name in kernel.maps]
    bases = [getattr(params, f"{name}_map").base for name in kernel.maps]
    shifts = tuple(x - base for x, base in zip(tensors, bases, strict=True))
    encode_maps(params, problem.dtype, descriptors.encode_kind, kernel.maps)
    offsets = tuple(getattr(type(params), f"{name}_map").offset for name in kernel.maps)
    return Template(bytes(params), kernel.attn_offset, offsets, shifts)
