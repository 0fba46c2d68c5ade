"""Turn a Plan and tensors into a launch on the current stream."""

from __future__ import annotations

import copy
import functools
import itertools
import threading

import torch

from flashcore.base.bounded import make_room
from flashcore.compile.compiler import CompiledKernel
from flashcore.compile.jit import compile_plan
from flashcore.kernels.fwd_wmma.params import AttnParams, check_limits
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import forward_of, kernel_of
from flashcore.kernels.tensor_map import encode_maps
from flashcore.launch import descriptors
from flashcore.launch.allocation import allocator
from flashcore.launch.counters import work_counters
from flashcore.launch.driver_launch import Argument, Launch, launch_raw
from flashcore.launch.element_map import verify_element_map
from flashcore.launch.launcher import Entry
from flashcore.launch.scratch import Scratch
from flashcore.launch.templates import Template, make_template
from flashcore.launch.types import Addresses
from flashcore.problem import Problem
from flashcore.problem.options import Options


@functools.lru_cache(maxsize=4096)
def _compile(plan: Plan) -> CompiledKernel:
    """Compile by jit.compile_plan, which takes 2 ms to make the source text, once per Plan."""
    return compile_plan(plan)


@functools.lru_cache(maxsize=4096)
def _launch(plan: Plan, grid: int, device_index: int) -> Launch:
    """Return a launch for all shapes that share it: while keys are appended, say, each call has a
    new one."""
    return Launch(
        _compile(plan),
        grid=grid,
        num_threads=plan.num_threads,
        smem_bytes=plan.smem_bytes,
        device=torch.device("cuda", device_index),
        starts_early=plan.starts_early,
    )


def load_plan(problem: Problem, plan: Plan, device: torch.device) -> None:
    """Compile a plan's kernel, or find it compiled, and load it on a GPU, for a later call."""
    index = torch.cuda.current_device() if device.index is None else device.index
    verify_element_map(index, plan.arch, plan.dtype)
    _launch(plan, _grid_size(problem, plan, index), index)


@functools.cache
def _num_sms(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


def _grid_size(problem: Problem, plan: Plan, device_index: int) -> int:
    at_once = _num_sms(device_index) * plan.min_blocks
    return kernel_of(plan).num_blocks(problem, plan, at_once)


def _verify(device_index: int, plan: Plan) -> None:
    """Verify the element map by `verify_element_map`, which waits for the GPU; while the stream is
    captured, not yet."""
    if not torch.cuda.is_current_stream_capturing():
        verify_element_map(device_index, plan.arch, plan.dtype)


def run_kernel(
    problem: Problem,
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    gate_buffers: dict[str, torch.Tensor] | None = None,
    lengths: dict[str, torch.Tensor] | None = None,
    max_score: torch.Tensor | None = None,
) -> None:
    """Run a plan on CUDA tensors, on the current stream, without waiting for it.

    Args:
        problem: validated description of q, k, v and mask.
        plan: for the tensors' GPU.
        q: [batch, num_heads_q, seqlen_q, head_dim].
        k: [batch, num_heads_kv, seqlen_k, head_dim].
        v: [batch, num_heads_kv, seqlen_k, head_dim_v].
        mask: as the problem describes it, or None.
        out: [batch, num_heads_q, seqlen_q, head_dim_v], contiguous; written.
        lse: [batch, num_heads_q, seqlen_q], float32, contiguous; written unless None.
        gate_buffers: by name gate_scores, gate_row_max, gate_row_sum, for a plan with a gate.
        lengths: int32, by name cu_seqlens_q, cu_seqlens_k, seqlens_k or page_table, where
            sequences differ in length. Packed tensors come as [1, num_heads, total, dim] views, out
            as [total, num_heads_q, head_dim_v], lse as [num_heads_q, total]; pages as k and v. And
            `sinks`, float32 [num_heads_q], where the problem has sinks.
        max_score: [batch, num_heads_q], float32, contiguous, of -inf; raised by a plan that
            returns_max_score.

    Raises:
        CompileError, BackendUnavailableError, FlashCoreError: see jit.compile_source, launch_raw.
    """
    grid = _grid_size(problem, plan, q.device.index)
    if grid == 0:
        return
    _verify(q.device.index, plan)
    tensors = {"q": q, "k": k, "v": v, "mask": mask, "out": out, "lse": lse, "max_score": max_score}
    tensors |= (gate_buffers or {}) | (lengths or {})
    pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    if plan.draws_tiles:
        pointers["tile_counter"] = work_counters(q.device)
    scratch = Scratch(problem, plan, q.device)
    if scratch.num_floats:
        with torch.cuda.device(q.device.index):
            shares, counters = scratch.allocate()
        pointers |= scratch.pointers(shares.data_ptr(), counters)
    kernel = forward_of(plan)
    params = kernel.build_params(problem, plan, pointers, grid)
    encode_maps(params, problem.dtype, descriptors.encode, kernel.maps)
    launch_raw(
        _compile(plan),
        grid=grid,
        num_threads=plan.num_threads,
        smem_bytes=plan.smem_bytes,
        params=params,
        device=q.device,
        starts_early=plan.starts_early,
    )


# By Problem.varlen, the fields of AttnParams that say how long sequences are and where their keys
# lie.
LENGTHS = {
    "keys": ("seqlens_k",),
    "packed": ("cu_seqlens_q", "cu_seqlens_k"),
    "pages": ("seqlens_k", "page_table"),
    "packed_pages": ("cu_seqlens_q", "seqlens_k", "page_table"),
}

# Arguments by call and addresses. A network meets the same addresses again and again: torch's
# allocator hands them out in turn. Encoding the descriptors anew would cost as much as the launch.
ARGUMENTS_MAX = 4096
# Call; q, k, v, lengths, sinks and max_score; mask; out; lse; shares and counters; of tiles.
_Key = tuple[int, Addresses, int, int, int, tuple[int, ...], int]
_arguments: dict[_Key, Argument] = {}
_lock = threading.Lock()
_serial = itertools.count()


class KernelCall:
    """A KernelCall is a plan on a device, ready for tensors of one description. See
    dispatch.prepare.

    Args:
        problem: describes them.
        plan: for it.
        device: where they are.
    """

    def __init__(self, problem: Problem, plan: Plan, device: torch.device) -> None:
        self._serial, self._problem, self._plan = next(_serial), problem, plan
        self._origin: KernelCall | None = None  # see with_keys
        self._model: Template | None = None  # of one of those
        self._spare: list[Argument] | None = None
        self._out_is_rows_first, self._device = False, device
        heads = problem.num_heads_q
        rows_shape: tuple[int, ...] = (problem.batch, heads, problem.seqlen_q)
        out_shape: tuple[int, ...] = (*rows_shape, problem.head_dim_v)
        if problem.packs_queries:
            rows_shape = (heads, problem.total_q)
            out_shape = (problem.total_q, heads, problem.head_dim_v)
        self._new_out = allocator(device, out_shape, problem.torch_dtype)
        self._new_lse = None
        if problem.return_lse:
            self._new_lse = allocator(device, rows_shape, torch.float32)
        self._others = LENGTHS.get(problem.varlen, ())  # addresses behind q, k and v
        self._others += ("sinks",) * problem.has_sinks
        self._others += ("k_scale", "v_scale") * (problem.cache_dtype != "")
        self._others += ("max_score",) * problem.return_max_score
        self._scratch = Scratch(problem, plan, device)
        self._counts_on = device if plan.draws_tiles else None
        self._grid = _grid_size(problem, plan, device.index)
        self._template: Template | None = None
        _verify(device.index, plan)
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self.launch = _launch(plan, self._grid, self._index)
        # Looked up once, not in every call.
        self._current_device, self._enqueue = torch._C._cuda_getDevice, self.launch.enqueue

    def with_keys(self, problem: Problem) -> KernelCall:
        """Return the call of another problem that the same plan serves, and that differs in the
        keys, the mask and their number alone.

        Keys that grow are new each time, and so are their addresses. Where those of this call are
        kept with their arguments, that one has few arguments, written over for each launch.
        """
        if problem == self._problem:
            return self
        check_limits(problem, self._plan)
        other = copy.copy(self)
        other._serial, other._problem = next(_serial), problem
        other._origin, other._template, other._spare = self._origin or self, None, []
        return other

    def with_rows_first(self) -> KernelCall | None:
        """Return the same call with out as [batch, seqlen_q, num_heads_q, head_dim_v]; None if
        the kernel writes rows of one head next to each other, and there are several. Addresses are
        all that it reads of q, k and v, so they may be given in any shape."""
        problem, plan = self._problem, self._plan
        if self._spare is not None or problem.packs_queries:
            return None
        other = copy.copy(self)
        if problem.seqlen_q != 1:
            if not plan.finds_out_by_map or problem.varlen != "none":
                return None
            other._serial, other._template, other._out_is_rows_first = next(_serial), None, True
        shape = (problem.batch, problem.seqlen_q, problem.num_heads_q, problem.head_dim_v)
        other._new_out = allocator(self._device, shape, problem.torch_dtype)
        return other

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        addresses: Addresses,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the call: see launch/types.py. Behind those of q, k and v stand addresses of LENGTHS,
        of sinks (float32), of scales and of max_score, where the problem has them. A given `out`
        lies as new ones do, is aligned to 16 bytes, and apart from what is read."""
        if self._current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.run(q, k, v, mask, addresses, out)
        out = self._new_out() if out is None else out
        lse = None if self._new_lse is None else self._new_lse()
        scratch: tuple[int, ...] = ()
        if self._scratch.num_floats:
            shares, counters = self._scratch.allocate()
            scratch = shares.data_ptr(), counters
        key = (
            self._serial,
            addresses,
            0 if mask is None else mask.data_ptr(),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            scratch,
            self.counter(),
        )
        spare = self._spare
        if spare is None:
            self._enqueue(_arguments.get(key) or self.make_argument(key))
            return out, lse
        # The thread that takes one has it alone until the launch has copied it.
        try:
            argument = spare.pop()
        except IndexError:
            argument = self._template_of(addresses, key[3]).new()
        self._fill(argument, key)
        self._enqueue(argument)
        spare.append(argument)
        return out, lse

    def entry(self, q: int, k: int, v: int) -> Entry:
        """Return the entry for the compiled launcher, given the addresses of such tensors."""
        template = self._template_of((q, k, v), q)  # each call has its own out
        problem, plan, scratch = self._problem, self._plan, self._scratch
        return Entry(
            kernel=self.launch.handle,
            device_index=self._index,
            grid=self._grid,
            num_threads=plan.num_threads,
            smem_bytes=plan.smem_bytes,
            starts_early=plan.starts_early,
            argument=template.content,
            attn_offset=template.attn_offset,
            map_offsets=template.map_offsets,
            out_shape=(problem.batch, problem.num_heads_q, problem.seqlen_q, problem.head_dim_v),
            computes_lse=problem.return_lse,
            options=Options.of(problem),
            found=None,  # whoever found this call knows
            num_counters=scratch.num_counters,
            num_shares=scratch.num_out,
            num_floats=scratch.num_floats,
            scratch_offsets=tuple(
                template.attn_offset + getattr(AttnParams, name).offset
                for name in ("tile_counter", "split_out", "split_stats")
            ),
        )

    def counter(self) -> int:
        """Return the address of what blocks draw tiles from on the current stream, which a capture
        has of its own; 0 where they draw none."""
        return 0 if self._counts_on is None else work_counters(self._counts_on)

    def make_argument(self, key: _Key) -> Argument:
        """Return the kernel's argument for a key of `_arguments`, which keeps it."""
        argument = self._template_of(key[1], key[3]).new()
        self._fill(argument, key)
        with _lock:
            make_room(_arguments, ARGUMENTS_MAX)
            _arguments[key] = argument
        return argument

    def _fill(self, argument: Argument, key: _Key) -> None:
        """Write the addresses of a key."""
        _, (q, k, v, *others), mask, out, lse, scratch, counter = key
        template = self._template
        assert template is not None
        template.place(argument, q, k, v, mask, out, lse)
        if others:
            template.place_others(argument, dict(zip(self._others, others, strict=True)))
        if scratch:
            template.place_others(argument, self._scratch.pointers(*scratch))
        if counter:
            template.place_others(argument, {"tile_counter": counter})

    def _template_of(self, addresses: Addresses, out: int) -> Template:
        """Return the template of the argument, made once, with these addresses."""
        if self._template is None:
            q, k, v, *_ = addresses
            pointers: dict[str, int | None] = {"q": q, "k": k, "v": v, "out": out}
            arguments = self._problem, self._plan, pointers, self._grid
            origin = self._origin
            if origin is not None and origin._model is not None:
                self._template = origin._model.with_keys(*arguments)
            else:
                self._template = make_template(*arguments, self._out_is_rows_first)
                if origin is not None:
                    origin._model = self._template
        return self._template
