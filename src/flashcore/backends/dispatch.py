"""Decide which backend serves a Problem, and what runs it there."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flashcore.backends.adapting import Adapted, adapt, kernel_for, rather_portable
from flashcore.backends.autocasting import autocast_dtype
from flashcore.backends.by_torch import sdpa_cpu, sdpa_gpu
from flashcore.backends.growing import planned_as
from flashcore.backends.obstacles import (
    BFLOAT16_MIN_ARCH,
    KERNEL_DTYPES,
    WMMA_MIN_ARCH,
    fallback_text,
    gpu_kernel_on_cpu_text,
    obstacle_to,
    obstacle_to_kernels,
    too_wide,
)
from flashcore.backends.sinks import joined_by_sinks, lse_of_no_keys
from flashcore.backends.tiled import attention_tiled, one_by_one
from flashcore.base import env
from flashcore.errors import BackendUnavailableError, FallbackWarning, stacklevel_of_caller
from flashcore.kernels.registry import BY_BACKEND, FORWARD, PORTABLE, forward_for
from flashcore.launch.allocation import unseen_scores
from flashcore.launch.types import Addresses, Call, Computed
from flashcore.problem import Problem
from flashcore.problem.memory_layout import as_batch

if TYPE_CHECKING:
    from flashcore.kernels.fwd_wmma.plan import Plan
    from flashcore.launch.kernel_call import KernelCall

# Names of the forward kernels, by the backend that asks for each.
KERNELS = {kernel.backend: kernel.name for kernel in FORWARD}
BACKENDS = ("auto", *KERNELS, "sim", "torch")

_warned: set[str] = set()


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice holds the backend that serves a call.

    Args:
        backend: "sm90", "wmma", "sim" or "torch"; "meta" for tensors without values.
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
    env.notice_unknown_variables()
    if problem.device == "meta":
        return Choice("meta", "q, k and v are meta tensors, which have shapes and no values")
    if env.RECORD.name in os.environ:
        from flashcore.backends.recording import record_call

        record_call(problem, backend)
    return resolved(problem, backend)


def resolved(problem: Problem, backend: str) -> Choice:
    """Return what `choose_backend` does, or raise as it does, of a problem that need not be that of
    a call: nothing is recorded."""
    if backend == "torch":
        return Choice("torch", 'asked for with backend="torch"')
    if backend == "sim":
        return _choose_sim(problem)
    if backend in KERNELS:
        if problem.device == "cpu":
            raise BackendUnavailableError(gpu_kernel_on_cpu_text(backend))
        obstacle = obstacle_to(BY_BACKEND[backend], problem)
        if obstacle is not None:
            raise obstacle
        return Choice(backend, f'asked for with backend="{backend}"')
    return _choose_auto(problem)


def _choose_auto(problem: Problem) -> Choice:
    if problem.device == "cpu":
        return Choice("torch", "q, k and v are CPU tensors")
    obstacle = obstacle_to_kernels(problem)
    if obstacle is None:
        reason = f"{problem.dtype} tensors on an sm_{problem.arch} GPU"
        preferred = forward_for(problem.arch)
        rather_not = rather_portable(problem, preferred)
        unserved = PORTABLE.obstacle(problem) if rather_not or preferred is PORTABLE else None
        if unserved is not None:
            why = f"{rather_not}, and {unserved}" if rather_not else unserved
            return Choice("torch", f'{why}; pass backend="torch"', is_fallback=True)
        if rather_not is None:
            return Choice(preferred.backend, reason)
        return Choice(PORTABLE.backend, f"{reason}, and not {preferred.backend}: {rather_not}")
    # A GPU too old for every kernel is worth an error: whoever bought one expects to be told.
    if problem.arch and problem.arch < WMMA_MIN_ARCH:
        raise obstacle
    return Choice("torch", str(obstacle), is_fallback=True)


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
    obstacle = too_wide(problem)
    if obstacle is not None:
        raise obstacle
    reason = PORTABLE.obstacle(problem)
    if reason is not None and kernel_for(problem, arch) == PORTABLE.backend:
        raise NotImplementedError(f'{reason}; pass backend="torch"')
    return Choice("sim", 'asked for with backend="sim"')


def warn_once(choice: Choice) -> None:
    """Give the FallbackWarning of a choice, once per reason and process."""
    if choice.reason not in _warned:
        _warned.add(choice.reason)
        text = fallback_text(choice.reason)
        warnings.warn(text, FallbackWarning, stacklevel=stacklevel_of_caller())


def prepare(backend: str, problem: Problem, device: torch.device) -> Call:
    """Return what computes a problem on a backend that `choose_backend` returned.

    Args:
        backend: "sm90", "wmma", "sim", "torch" or "meta".
        problem: the description of the tensors to come.
        device: where they are.

    Returns:
        A function of q, k, v, mask and the addresses of the first three that returns out, [batch,
        num_heads_q, seqlen_q, head_dim_v], contiguous, and lse, [batch, num_heads_q, seqlen_q], or
        None unless problem.return_lse; with problem.return_max_score also max_score, [batch,
        num_heads_q]. It may be called again with other tensors of the same description, by several
        threads. Where there are sinks, see launch/types.py.
    """
    if problem.is_empty or backend == "meta":
        return functools.partial(_run_empty, problem)
    adapted = adapt_for(backend, problem)
    call = _prepare_adapted(backend, adapted.problem, device)
    # A launch takes addresses, and k and v of one head begin where they began.
    as_asked = not adapted.copies if backend in KERNELS else adapted.is_as_asked
    return call if as_asked else functools.partial(_run_adapted, adapted, call)


def adapt_for(backend: str, problem: Problem) -> Adapted:
    """Return the call as a backend that `choose_backend` returned is given it; see
    backends/adapting.py."""
    if backend == "meta":
        backend = "torch"  # what it copies has a shape too
    return adapt(problem, kernel_for(problem, env.sim_arch()) if backend == "sim" else backend)


def _prepare_adapted(backend: str, problem: Problem, device: torch.device) -> Call:
    if backend == "torch":
        return functools.partial(_run_torch, problem)
    if backend == "sim":
        return functools.partial(_run_sim, problem, plan_of(planned_as(problem), env.sim_arch()))
    from flashcore.launch import launcher

    launcher.start()
    call = kernel_call(planned_as(problem), KERNELS[backend], device).with_keys(problem).run
    return functools.partial(_run_max_score, problem, call) if problem.return_max_score else call


@functools.lru_cache(maxsize=1024)
def kernel_call(problem: Problem, kernel: str, device: torch.device) -> KernelCall:
    """Return the call of a kernel, one for all problems that are planned as one."""
    from flashcore.launch.kernel_call import KernelCall

    return KernelCall(problem, plan_of(problem, problem.arch, kernel), device)


def _run_max_score(
    problem: Problem,
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
) -> Computed:
    max_score = unseen_scores(problem, q)
    return *call(q, k, v, mask, (*addresses, max_score.data_ptr())), max_score


def _run_empty(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
    sinks: torch.Tensor | None = None,
) -> Computed:
    rows_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    out, lse = q.new_zeros((*rows_shape, problem.head_dim_v)), None
    if problem.return_lse:
        lse = lse_of_no_keys(q.new_empty(rows_shape, dtype=problem.lse_dtype), sinks)
    return (out, lse, unseen_scores(problem, q)) if problem.return_max_score else (out, lse)


def _run_adapted(
    adapted: Adapted,
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
    *sinks: torch.Tensor,
) -> Computed:
    if adapted.problem.packs_queries:
        q = as_batch(q)
        if not adapted.problem.has_pages:
            k, v = as_batch(k), as_batch(v)
    q, k, v, mask = adapted.tensors(q, k, v, mask)
    # Behind the three stand addresses of lengths and sinks.
    addresses = q.data_ptr(), k.data_ptr(), v.data_ptr(), *addresses[3:]
    out, *others = call(q, k, v, mask, addresses, *sinks)
    return adapted.result(out), *others


def _run_sim(
    problem: Problem,
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
    sinks: torch.Tensor | None = None,
) -> Computed:
    from flashcore.sim import simulate

    rows_shape = (problem.batch, problem.num_heads_q, problem.seqlen_q)
    out = q.new_empty((*rows_shape, problem.head_dim_v))
    lse = q.new_empty(rows_shape, dtype=problem.lse_dtype) if problem.return_lse else None
    max_score = unseen_scores(problem, q) if problem.return_max_score else None
    others = None if sinks is None else {"sinks": sinks}
    seed = env.sim_seed()
    simulate(problem, plan, q, k, v, mask, out, lse, None, others, max_score=max_score, seed=seed)
    return (out, lse) if max_score is None else (out, lse, max_score)


@functools.lru_cache(maxsize=4096)
def plan_of(problem: Problem, arch: int, kernel: str | None = None) -> Plan:
    """Return the plan of `select_plan`, which takes a third of a millisecond, once per Problem."""
    # Not needed, hence not loaded, by the torch backend.
    from flashcore.selection.select import select_plan

    return select_plan(problem, arch, kernel=kernel)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Turn torch.autocast off: inside it the tile-wise matmuls would be rounded; nothing else minds
    it."""
    if autocast_dtype(device_type) is not None:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _run_torch(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    addresses: Addresses,
    sinks: torch.Tensor | None = None,
) -> Computed:
    if problem.batch_invariant and problem.batch > 1:
        return one_by_one(_run_torch, problem, q, k, v, mask, sinks)
    row_maxima = None
    if problem.return_max_score:
        row_maxima = q.new_empty(q.shape[:3], dtype=problem.lse_dtype)
    with without_autocast(problem.device):
        result: tuple[torch.Tensor, torch.Tensor | None] | None = None
        if sdpa_cpu.means_the_same(problem):
            result = sdpa_cpu.attention_by_sdpa(problem, q, k, v, mask)
        elif sdpa_gpu.means_the_same(problem):
            result = sdpa_gpu.attention_by_sdpa(problem, q, k, v, mask)
        if result is None:
            result = attention_tiled(problem, q, k, v, mask, row_maxima, sinks)
        elif sinks is not None:
            result = joined_by_sinks(*result, sinks)
    out, lse = result[0], result[1] if problem.return_lse else None
    return (out, lse) if row_maxima is None else (out, lse, row_maxima.amax(2))
