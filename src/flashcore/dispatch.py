"""Which backend serves a Problem, and what runs it there."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flashcore import env, sdpa_cpu
from flashcore.errors import BackendUnavailableError, FallbackWarning
from flashcore.folding import with_copied_q
from flashcore.problem import Problem
from flashcore.tiled import attention_tiled

if TYPE_CHECKING:
    from flashcore.plan import Plan

BACKENDS = ("auto", "sm90", "wmma", "sim", "torch")
KERNELS = {"sm90": "attn_fwd_sm90", "wmma": "attn_fwd_wmma"}
KERNEL_DTYPES = ("float16", "bfloat16")
WMMA_MIN_ARCH = 75
SM90_ARCH = 90
BFLOAT16_MIN_ARCH = 80

# Of q, k and v. Whoever makes a call has them, and asking a tensor again takes time.
Addresses = tuple[int, int, int]
Call = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, Addresses],
    tuple[torch.Tensor, torch.Tensor | None],
]

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that serves a call.

    Args:
        backend: "sm90", "wmma", "sim" or "torch".
        reason: why, in words.
        is_fallback: whether "auto" would have preferred a kernel; worth a warning.
    """

    backend: str
    reason: str
    is_fallback: bool = False


def check_backend(backend: object) -> None:
    """Raise TypeError or ValueError unless `backend` is one of BACKENDS."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be one of {', '.join(BACKENDS)}, but is {backend!r}")
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is unknown; use one of {', '.join(map(repr, BACKENDS))}"
        )


def choose_backend(problem: Problem, backend: str) -> Choice:
    """Resolve `backend` for a problem.

    Args:
        problem: what is asked.
        backend: one of BACKENDS.

    Returns:
        The backend and why.

    Raises:
        TypeError: `backend` is no string, or the chosen one does not know the dtype.
        ValueError: unknown backend.
        BackendUnavailableError: it cannot run on this device.
    """
    check_backend(backend)
    if backend == "torch":
        return Choice("torch", 'asked for with backend="torch"')
    if backend == "sim":
        return _choose_sim(problem)
    if backend in KERNELS:
        if problem.device == "cpu":
            raise BackendUnavailableError(_gpu_kernel_on_cpu_text(backend))
        obstacle = _obstacle_to_wmma(problem)
        if obstacle is None and backend == "sm90":
            obstacle = _obstacle_to_sm90(problem)
        if obstacle is not None:
            raise obstacle
        return Choice(backend, f'asked for with backend="{backend}"')
    return _choose_auto(problem)


def _choose_auto(problem: Problem) -> Choice:
    if problem.device == "cpu":
        return Choice("torch", "q, k and v are CPU tensors")
    obstacle = _obstacle_to_wmma(problem)
    if obstacle is None:
        reason = f"{problem.dtype} tensors on an sm_{problem.arch} GPU"
        rather_not = _obstacle_to_sm90(problem)
        if rather_not is None:
            return Choice("sm90", reason)
        if problem.arch == SM90_ARCH:
            reason += f", and not sm90: {rather_not}"
        return Choice("wmma", reason)
    # A GPU too old for every kernel is worth an error: whoever bought one expects to be told.
    if problem.arch and problem.arch < WMMA_MIN_ARCH:
        raise obstacle
    return Choice("torch", str(obstacle), is_fallback=True)


def _obstacle_to_wmma(problem: Problem) -> Exception | None:
    """The exception that says why CUDA tensors cannot go to the WMMA kernel; None if they can."""
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
    return None


def _obstacle_to_sm90(problem: Problem) -> Exception | None:
    """Likewise for the Hopper kernel, for a problem that the WMMA kernel serves."""
    from flashcore.plan_sm90 import obstacle  # not needed by the torch backend

    if problem.arch != SM90_ARCH:
        return BackendUnavailableError(
            f'backend="sm90" needs an sm_90 (Hopper) GPU, but this one is sm_{problem.arch}; '
            'pass backend="auto"'
        )
    reason = obstacle(problem)
    if reason is not None:
        return NotImplementedError(f'{reason}; pass backend="wmma", or make the tensor contiguous')
    return None


def _gpu_kernel_on_cpu_text(backend: str) -> str:
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


def _choose_sim(problem: Problem) -> Choice:
    if problem.device != "cpu":
        raise BackendUnavailableError(
            f'q is on {problem.device}, but backend="sim" runs on CPU tensors: pass q.cpu(), '
            'or use backend="wmma" for the GPU'
        )
    if problem.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f'q has dtype {problem.dtype}, but backend="sim" runs the kernel, which takes float16 '
            'and bfloat16: convert with q.to(torch.float16), or use backend="torch"'
        )
    arch = env.sim_arch()
    if problem.dtype == "bfloat16" and arch < BFLOAT16_MIN_ARCH:
        raise BackendUnavailableError(
            f"bfloat16 needs sm_80 or later, but {env.SIM_ARCH.name} is {arch}; unset it or use "
            "torch.float16"
        )
    return Choice("sim", 'asked for with backend="sim"')


def warn_once(choice: Choice) -> None:
    """Give the FallbackWarning of a choice, once per reason and process."""
    if choice.reason not in _warned:
        _warned.add(choice.reason)
        warnings.warn(
            f"flashcore.attention falls back to PyTorch: {choice.reason} to silence this",
            FallbackWarning,
            stacklevel=stacklevel_of_caller(),
        )


def stacklevel_of_caller() -> int:
    """For warnings.warn in the function that calls this: who called flashcore, past torch if it
    stands between."""
    inside = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    return level


def prepare(backend: str, problem: Problem, device: torch.device) -> Call:
    """What computes a problem on a backend that `choose_backend` returned.

    Args:
        backend: "sm90", "wmma", "sim" or "torch".
        problem: the description of the tensors to come.
        device: where they are.

    Returns:
        A function of q, k, v, mask and the addresses of the first three that returns out, [batch,
        num_heads_q, seqlen_q, head_dim_v], contiguous, and lse, [batch, num_heads_q, seqlen_q], or
        None unless problem.return_lse. It may be called again with other tensors of the same
        description, by several threads.
    """
    if problem.is_empty:
        return functools.partial(_run_empty, problem)
    if backend == "torch":
        return functools.partial(_run_torch, problem)
    copied = with_copied_q(problem)
    if copied is not None:
        return functools.partial(_run_on_copied_q, prepare(backend, copied, device))
    if backend == "sim":
        return functools.partial(_run_sim, problem, _plan(problem, env.sim_arch()))
    from flashcore import launcher
    from flashcore.launch import KernelCall

    launcher.start()
    return KernelCall(problem, _plan(problem, problem.arch, KERNELS[backend]), device).run


def _run_empty(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    out = q.new_zeros((*rows_shape, problem.head_dim_v))
    if not problem.return_lse:
        return out, None
    return out, q.new_full(rows_shape, -math.inf, dtype=problem.lse_dtype)


def _run_on_copied_q(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    copied = q.contiguous()
    return call(copied, k, v, mask, (copied.data_ptr(), *addresses[1:]))


def _run_sim(
    problem: Problem,
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from flashcore.sim import simulate

    rows_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    out = q.new_empty((*rows_shape, problem.head_dim_v))
    lse = q.new_empty(rows_shape, dtype=problem.lse_dtype) if problem.return_lse else None
    simulate(problem, plan, q, k, v, mask, out, lse, seed=env.sim_seed())
    return out, lse


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, arch: int, kernel: str | None = None) -> Plan:
    """`select_plan`, which takes a third of a millisecond, once per Problem."""
    from flashcore.plan import select_plan  # not needed, hence not loaded, by the torch backend

    return select_plan(problem, arch, kernel=kernel)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Inside torch.autocast the tile-wise matmuls would be rounded; nothing else minds it."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _run_torch(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    with without_autocast(problem.device):
        result = None
        if sdpa_cpu.means_the_same(problem):
            result = sdpa_cpu.attention_by_sdpa(problem, q, k, v, mask)
        out, lse = attention_tiled(problem, q, k, v, mask) if result is None else result
    return out, lse if problem.return_lse else None
