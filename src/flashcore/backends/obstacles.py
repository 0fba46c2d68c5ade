"""Say why a kernel cannot serve a problem on a GPU: the exceptions that say so."""

from __future__ import annotations

from typing import Any

import torch

from flashcore.backends.adapting import adapt
from flashcore.errors import BackendUnavailableError
from flashcore.kernels.kernel import ForwardKernel
from flashcore.kernels.registry import PORTABLE
from flashcore.problem import Problem
from flashcore.problem.validation import HEAD_DIM_MAX

KERNEL_DTYPES = ("float16", "bfloat16")
WMMA_MIN_ARCH = 75
SM90_ARCH = 90
BFLOAT16_MIN_ARCH = 80


def obstacle_to_kernels(problem: Problem) -> Exception | None:
    """Return the exception that says why CUDA tensors cannot go to any kernel; None if they can go
    to the portable one."""
    way_out = 'pass backend="torch"'
    if problem.arch == 0:
        return BackendUnavailableError(f"the kernels need an NVIDIA GPU; {way_out}")
    if problem.arch < WMMA_MIN_ARCH:
        return BackendUnavailableError(
            f"the GPU is sm_{problem.arch}, but the kernels need tensor cores as sm_75 (Turing) "
            f"and later have; {way_out}"
        )
    if problem.dtype not in KERNEL_DTYPES:
        return TypeError(
            f"no kernel serves dtype {problem.dtype}; convert q, k and v to torch.float16 or "
            f"torch.bfloat16, or {way_out}"
        )
    if problem.dtype == "bfloat16" and problem.arch < BFLOAT16_MIN_ARCH:
        return BackendUnavailableError(
            f"bfloat16 needs sm_80 or later, but the GPU is sm_{problem.arch}; use torch.float16, "
            f"or {way_out}"
        )
    return too_wide(problem)


def too_wide(problem: Problem) -> Exception | None:
    """Return the exception that says that no kernel takes such a head_dim."""
    head_dim = max(problem.head_dim, problem.head_dim_v)
    if head_dim <= HEAD_DIM_MAX:
        return None
    return NotImplementedError(
        f"no kernel serves head_dim {head_dim}; at most {HEAD_DIM_MAX} is served: pass "
        'backend="torch"'
    )


def obstacle_to(kernel: ForwardKernel[Any], problem: Problem) -> Exception | None:
    """Return the exception that says why CUDA tensors cannot go to a kernel; None if they can."""
    found = obstacle_to_kernels(problem)
    if found is not None:
        return found
    if not kernel.serves(problem.arch):
        return BackendUnavailableError(
            f'backend="{kernel.backend}" is {kernel.title}, which needs an sm_{kernel.only_arch} '
            f'GPU, but this one is sm_{problem.arch}; pass backend="auto"'
        )
    reason = kernel.obstacle(adapt(problem, kernel.backend).problem)
    if reason is not None:
        way_out = "torch" if PORTABLE.obstacle(problem) else PORTABLE.backend
        return NotImplementedError(f'{reason}; pass backend="{way_out}"')
    return None


def gpu_kernel_on_cpu_text(backend: str) -> str:
    """Say that a GPU kernel was asked for on CPU tensors."""
    way_out = (
        'backend="sim" runs the same kernel in the simulator, backend="torch" computes with PyTorch'
    )
    if torch.cuda.is_available():
        return (
            f'q is on cpu, but backend="{backend}" needs CUDA tensors: pass q.cuda(), or {way_out}'
        )
    return (
        f'backend="{backend}" needs a CUDA GPU, and torch sees none here (q is on cpu): {way_out}'
    )


def fallback_text(reason: str) -> str:
    """Return what the FallbackWarning says of a call that PyTorch computes instead of a kernel."""
    return f"flashcore.attention falls back to PyTorch: {reason} to silence this"
