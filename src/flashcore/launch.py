"""Compiled kernel + tensors -> a launch on the current stream."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch

from flashcore.codegen import PROBE, generate_probe_source
from flashcore.compiler import CompiledKernel
from flashcore.errors import BackendUnavailableError, FlashCoreError
from flashcore.jit import compile_plan, compile_source
from flashcore.plan import Plan
from flashcore.problem import Problem

LOG2_E = math.log2(math.e)
_MAX_GRID = 2**31 - 1
_MAX_ROW_STRIDE = 2**31 - 1


class AttnParams(ctypes.Structure):
    """Mirror of `struct AttnParams` in kernels/tile/params.cuh, field by field."""

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
    )


class AttnGateParams(AttnParams):
    """AttnParams of a kernel that was built with a debug gate."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("gate_scores", "gate_row_max", "gate_row_sum")]


def grid_size(problem: Problem, plan: Plan) -> int:
    """Blocks of the one-dimensional grid: one a row tile of each head of each sequence."""
    num_m_blocks = -(-problem.seqlen_q // plan.block_m)
    return num_m_blocks * problem.num_heads_q * problem.batch


def _check_limits(problem: Problem, plan: Plan) -> None:
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


def build_params(
    problem: Problem, plan: Plan, pointers: dict[str, int | None]
) -> AttnParams | AttnGateParams:
    """The kernel's argument.

    Args:
        problem: shapes, strides and options.
        plan: tiles and gate.
        pointers: address by field name: q, k, v, mask, out, lse and, for a gate, gate_scores,
            gate_row_max, gate_row_sum. A missing one is null.

    Returns:
        The filled structure.

    Raises:
        NotImplementedError: the problem is too large for one launch.
    """
    _check_limits(problem, plan)
    mask_strides = (0, 0, 0, 0) if problem.mask is None else problem.mask.strides
    params = AttnParams() if plan.gate is None else AttnGateParams()
    for name, address in pointers.items():
        setattr(params, name, address)
    params.q_batch_stride, params.q_head_stride, params.q_row_stride = problem.q_strides
    params.k_batch_stride, params.k_head_stride, params.k_row_stride = problem.k_strides
    params.v_batch_stride, params.v_head_stride, params.v_row_stride = problem.v_strides
    params.mask_batch_stride, params.mask_head_stride = mask_strides[:2]
    params.mask_row_stride, params.mask_col_stride = mask_strides[2:]
    params.num_heads_q, params.num_heads_kv = problem.num_heads_q, problem.num_heads_kv
    params.seqlen_q, params.seqlen_k = problem.seqlen_q, problem.seqlen_k
    params.num_m_blocks = -(-problem.seqlen_q // plan.block_m)
    params.diag_offset = problem.diag_offset
    params.window_left, params.window_right = problem.window_left, problem.window_right
    params.softmax_scale = problem.scale
    params.softmax_scale_log2 = problem.scale * LOG2_E
    params.softcap = problem.softcap
    return params


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendUnavailableError(
            f"launching a kernel needs cuda-bindings ({error}); "
            'install it: pip install "flashcore[cuda]"'
        ) from error
    return driver


def _check(status: Any, what: str) -> None:
    if int(status) != 0:
        raise FlashCoreError(f"{what} failed: {status!r}")


@functools.lru_cache(maxsize=4096)
def _load(kernel: CompiledKernel, device_index: int, smem_bytes: int) -> tuple[Any, Any]:
    """The kernel's handle, allowed `smem_bytes` of dynamic shared memory on the device; and its
    library, which must live as long."""
    from cuda.core import ObjectCode

    driver = _driver()
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


def _launch(
    kernel: CompiledKernel,
    grid: int,
    num_threads: int,
    smem_bytes: int,
    params: ctypes.Structure,
    device: torch.device,
) -> None:
    driver = _driver()
    handle, _ = _load(kernel, device.index, smem_bytes)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
    (status,) = driver.cuLaunchKernel(
        handle, grid, 1, 1, num_threads, 1, 1, smem_bytes, stream, ctypes.addressof(arguments), 0
    )
    _check(status, f"launching {kernel.name}")


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
        _launch(kernel, grid, num_threads, smem_bytes, params, device)


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

    Raises:
        CompileError, BackendUnavailableError, FlashCoreError: see jit.compile_source, launch_raw.
    """
    grid = grid_size(problem, plan)
    if grid == 0:
        return
    verify_element_map(q.device.index, plan.arch, plan.dtype)
    tensors = {"q": q, "k": k, "v": v, "mask": mask, "out": out, "lse": lse} | (gate_buffers or {})
    pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
    launch_raw(
        compile_plan(plan),
        grid=grid,
        num_threads=plan.num_threads,
        smem_bytes=plan.smem_bytes,
        params=build_params(problem, plan, pointers),
        device=q.device,
    )
