"""Plan + tensors -> a launch on the current stream."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from typing import Any

import torch

from flashcore import params_sm90
from flashcore.codegen import PROBE, generate_probe_source
from flashcore.compiler import CompiledKernel
from flashcore.counters import own_counter, work_counters
from flashcore.driver_launch import Argument, Launch, launch_raw
from flashcore.errors import FlashCoreError
from flashcore.jit import compile_plan, compile_source
from flashcore.params import build_params, grid_size, place
from flashcore.plan import Plan
from flashcore.plan_sm90 import Sm90Plan
from flashcore.problem import Problem


@functools.lru_cache(maxsize=4096)
def _compile(plan: Plan) -> CompiledKernel:
    """jit.compile_plan, which takes 2 ms to make the source text, once per Plan."""
    return compile_plan(plan)


@functools.lru_cache(maxsize=4096)
def _launch(plan: Plan, grid: int, device_index: int) -> Launch:
    """One for all shapes that share it: while keys are appended, say, each call has a new one."""
    return Launch(
        _compile(plan),
        grid=grid,
        num_threads=plan.num_threads,
        smem_bytes=plan.smem_bytes,
        device=torch.device("cuda", device_index),
        starts_early=plan.starts_early,
    )


@functools.cache
def _num_sms(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)


@functools.cache
def verify_element_map(device_index: int, arch: int, dtype: str) -> None:
    """Checks on the GPU, once a process, that fragments lie where the kernels think they do.

    Raises:
        FlashCoreError: they do not; the GPU's wmma is not the documented one.
    """

    class ProbeParams(ctypes.Structure):
        _fields_ = [("mismatches", ctypes.c_void_p)]

    device = torch.device("cuda", device_index)
    mismatches = torch.full((32,), torch.nan, device=device)
    launch_raw(
        compile_source(generate_probe_source(dtype), arch, PROBE),
        grid=1,
        num_threads=32,
        smem_bytes=48 * 24 * 2,
        params=ProbeParams(mismatches.data_ptr()),
        device=device,
    )
    found = mismatches.tolist()
    if any(count != 0 for count in found):
        raise FlashCoreError(
            f"{torch.cuda.get_device_name(device)} holds {dtype} fragments in an unknown order "
            f"(mismatches by lane: {found}); use backend='torch', and please report this"
        )


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
) -> None:
    """Runs a plan on CUDA tensors, on the current stream, without waiting for it.

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
        lengths: int32, by name cu_seqlens_q, cu_seqlens_k or seqlens_k, where sequences differ in
            length. Packed tensors come as [1, num_heads, total, dim] views, out as [total,
            num_heads_q, head_dim_v], lse as [num_heads_q, total].

    Raises:
        CompileError, BackendUnavailableError, FlashCoreError: see jit.compile_source, launch_raw.
    """
    grid = grid_size(problem, plan)
    if grid == 0:
        return
    verify_element_map(q.device.index, plan.arch, plan.dtype)
    tensors = {"q": q, "k": k, "v": v, "mask": mask, "out": out, "lse": lse}
    tensors |= (gate_buffers or {}) | (lengths or {})
    if plan.draws_tiles:
        tensors["tile_counter"] = work_counters(q.device)
    pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    params: ctypes.Structure
    splits = _Splits(problem, plan)
    if splits.num_floats:
        scratch = splits.allocate(q)
        pointers |= splits.pointers(*(t.data_ptr() for t in scratch))
    if isinstance(plan, Sm90Plan):
        grid = params_sm90.grid_size(problem, plan, _num_sms(q.device.index))
        params = params_sm90.build_params_sm90(problem, plan, pointers, grid)
    else:
        params = build_params(problem, plan, pointers)
    launch_raw(
        _compile(plan),
        grid=grid,
        num_threads=plan.num_threads,
        smem_bytes=plan.smem_bytes,
        params=params,
        device=q.device,
        starts_early=plan.starts_early,
    )


class _Splits:
    """What a call needs beside its tensors where blocks share the keys of row tiles."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        self.num_floats = 0
        if isinstance(plan, Sm90Plan) and plan.num_splits > 1:
            self._num_out, self.num_floats = params_sm90.split_floats(problem, plan)
            (self._num_counters,) = params_sm90.split_shapes(problem, plan)["tile_counter"]

    def allocate(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares, from torch's allocator, and counters; both of the current stream."""
        shares = q.new_empty(self.num_floats, dtype=torch.float32)
        return shares, work_counters(q.device, self._num_counters)

    def pointers(self, shares: int, counters: int) -> dict[str, int | None]:
        """Addresses by field of AttnParams."""
        stats = shares + 4 * self._num_out
        return {"split_out": shares, "split_stats": stats, "tile_counter": counters}


# Arguments by call and addresses. A network meets the same addresses again and again: torch's
# allocator hands them out in turn. Encoding the descriptors anew would cost as much as the launch.
ARGUMENTS_MAX = 4096
_arguments: dict[tuple[int, ...], Argument] = {}
_lock = threading.Lock()
_serial = itertools.count()


class KernelCall:
    """A plan on a device, ready for tensors of one description. See dispatch.prepare."""

    def __init__(self, problem: Problem, plan: Plan, device: torch.device) -> None:
        self._serial, self._dtype = next(_serial), problem.dtype
        rows_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
        self._out_shape = (*rows_shape, problem.head_dim_v)
        self._lse_shape = rows_shape if problem.return_lse else None
        self._out_is_like_q = problem.head_dim == problem.head_dim_v and _is_contiguous(problem)
        self._splits = _Splits(problem, plan)
        self._template: Any
        self._counts_on = device if plan.draws_tiles else None
        if isinstance(plan, Sm90Plan):
            grid = params_sm90.grid_size(problem, plan, _num_sms(device.index))
            self._template = params_sm90.build_params_sm90(problem, plan, {}, grid, target="host")
        else:
            grid = grid_size(problem, plan)
            self._template = build_params(problem, plan, {})
        verify_element_map(device.index, plan.arch, plan.dtype)
        index = torch.cuda.current_device() if device.index is None else device.index
        self.launch = _launch(plan, grid, index)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See dispatch.prepare."""
        out = torch.empty_like(q) if self._out_is_like_q else q.new_empty(self._out_shape)
        lse = None
        if self._lse_shape is not None:
            lse = q.new_empty(self._lse_shape, dtype=torch.float32)
        key: tuple[int, ...] = (
            self._serial,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            out.data_ptr(),
            0 if lse is None else lse.data_ptr(),
        )
        if self._splits.num_floats:
            scratch = self._splits.allocate(q)
            key += (scratch[0].data_ptr(), scratch[1].data_ptr())
        argument = _arguments.get(key)
        self.launch(self.make_argument(key) if argument is None else argument)
        return out, lse

    def make_argument(self, key: tuple[int, ...]) -> Argument:
        """The kernel's argument for a key of `_arguments`, which keeps it if it lasts."""
        names = ("q", "k", "v", "mask", "out", "lse")
        pointers = {name: address or None for name, address in zip(names, key[1:7], strict=True)}
        lasts = True
        if self._counts_on is not None:
            lasts = not torch.cuda.is_current_stream_capturing()
            counter = own_counter if lasts else work_counters
            pointers["tile_counter"] = counter(self._counts_on).data_ptr()
        if self._splits.num_floats:
            pointers |= self._splits.pointers(*key[7:])
        if isinstance(self._template, params_sm90.AttnSm90Params):
            params: Any = params_sm90.place_sm90(self._template, pointers, self._dtype)
        else:
            params = place(self._template, pointers)
        argument = Argument(params)
        if not lasts:
            return argument
        with _lock:
            while len(_arguments) >= ARGUMENTS_MAX:
                del _arguments[next(iter(_arguments))]  # the oldest
            _arguments[key] = argument
        return argument


def _is_contiguous(problem: Problem) -> bool:
    """Whether q is, and so is whatever torch.empty_like makes of it."""
    row = problem.head_dim
    head = row * problem.seqlen_q
    sizes = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    expected = (head * problem.num_heads_q, head, row)
    return all(
        size == 1 or stride == want
        for size, stride, want in zip(sizes, problem.q_strides, expected, strict=True)
    )
