"""Compiled kernel + tensors -> a launch on the current stream."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from flashcore import params_sm90
from flashcore.codegen import PROBE, generate_probe_source
from flashcore.compiler import CompiledKernel
from flashcore.driver import import_driver
from flashcore.errors import FlashCoreError
from flashcore.jit import compile_plan, compile_source
from flashcore.params import build_params, grid_size
from flashcore.plan import Plan
from flashcore.plan_sm90 import Sm90Plan
from flashcore.problem import Problem


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise FlashCoreError(f"{what} failed: {status!r}")


@functools.lru_cache(maxsize=4096)
def _load(kernel: CompiledKernel, device_index: int, smem_bytes: int) -> tuple[Any, Any]:
    """The kernel's handle, allowed `smem_bytes` of dynamic shared memory on the device; and its
    library, which must live as long."""
    from cuda.core import ObjectCode

    driver = import_driver()
    library = (
        ObjectCode.from_cubin(kernel.code)
        if kernel.code_type == "cubin"
        else ObjectCode.from_ptx(kernel.code)
    )
    handle = library.get_kernel(kernel.name).handle
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, smem_bytes, handle, device_index)
    _check(status, f"asking for {smem_bytes} bytes of shared memory")
    return driver.CUfunction(int(handle)), library


def launch_raw(
    kernel: CompiledKernel,
    *,
    grid: int,
    num_threads: int,
    smem_bytes: int,
    params: ctypes.Structure,
    device: torch.device,
) -> None:
    """Launches a kernel on the device's current stream.

    Args:
        kernel: compiled for the device's architecture.
        grid: blocks.
        num_threads: threads a block.
        smem_bytes: dynamic shared memory a block.
        params: the kernel's one argument.
        device: a CUDA device.

    Raises:
        FlashCoreError: the driver refuses; the message holds its status.
    """
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    # Entering the device also binds its context to this thread, which the driver's launch needs.
    with torch.cuda.device(device):
        handle, _ = _load(kernel, device.index, smem_bytes)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))  # must outlive the call
        pointers = ctypes.addressof(arguments)
        (status,) = import_driver().cuLaunchKernel(
            handle, grid, 1, 1, num_threads, 1, 1, smem_bytes, stream, pointers, 0
        )
    _check(status, f"launching {kernel.name}")


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
        lengths: int32, by name cu_seqlens_q and cu_seqlens_k, or seqlens_k, where sequences differ
            in length. Packed tensors come as [1, num_heads, total, dim] views, out as [total,
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
    pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    params: ctypes.Structure
    if isinstance(plan, Sm90Plan):
        grid = params_sm90.grid_size(problem, plan, _num_sms(q.device.index))
        params = params_sm90.build_params_sm90(problem, plan, pointers)
    else:
        params = build_params(problem, plan, pointers)
    launch_raw(
        compile_plan(plan),
        grid=grid,
        num_threads=plan.num_threads,
        smem_bytes=plan.smem_bytes,
        params=params,
        device=q.device,
    )


class KernelCall:
    """A plan on a device, ready for tensors of one description. See dispatch.prepare."""

    def __init__(self, problem: Problem, plan: Plan, device: torch.device) -> None:
        self.problem, self.plan, self.device = problem, plan, device

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        p = self.problem
        out = q.new_empty((p.batch, p.num_heads_q, p.seqlen_q, p.head_dim_v))
        lse = None
        if p.return_lse:
            lse = q.new_empty((p.batch, p.num_heads_q, p.seqlen_q), dtype=p.lse_dtype)
        run_kernel(p, self.plan, q, k, v, mask, out, lse)
        return out, lse
