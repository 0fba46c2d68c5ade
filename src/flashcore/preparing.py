"""`prepare` compiles what a call needs before the first request has to wait for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashcore.backends.dispatch import KERNELS, adapt_for, choose_backend
from flashcore.backends.growing import planned_as
from flashcore.backends.packed import packed_problem
from flashcore.base import env
from flashcore.compile.codegen import generate_source
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.ops.padded import padded_problem
from flashcore.problem import Causal, Problem, Window, arch_of_device
from flashcore.problem.options import Inputs, Options, Wanted
from flashcore.selection.select import select_plan

__all__ = ["prepare"]

Shape = Sequence[int]


def prepare(
    q: Tensor | Shape,
    k: Tensor | Shape,
    v: Tensor | Shape,
    *,
    causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    mask: Tensor | Shape | None = None,
    seqlens_k: Tensor | Shape | None = None,
    cu_seqlens_q: Tensor | Shape | None = None,
    cu_seqlens_k: Tensor | Shape | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sinks: Tensor | Shape | None = None,
    return_lse: bool = False,
    return_max_score: bool = False,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Plan | None:
    """Compile and load the kernel of a call of `attention` or `attention_varlen`, and launch
    nothing for it, so that the first request does not wait for the compiler.

    Which kernel a call takes depends on dtypes, head_dims, options, how its tensors are aligned,
    and roughly on lengths and heads: prepare a short and a long prompt, and decoding, each.

    Args:
        q: as in `attention`, a tensor or its shape; with cu_seqlens_q as in `attention_varlen`. A
            shape stands for a contiguous tensor. Tensors are not read.
        k: a tensor or its shape.
        v: a tensor or its shape.
        causal: False, True (aligned at the lower right) or "upper_left".
        scale: the factor of q.k; None is 1 / sqrt(head_dim).
        window: (left, right), the keys visible on either side of the diagonal, or None.
        softcap: scores become softcap * tanh(score / softcap); None is off.
        mask: a tensor, or the shape of a boolean one.
        seqlens_k: int32, [batch], or its shape.
        cu_seqlens_q: int32, [batch + 1], or its shape; with the three that follow it makes this a
            call of `attention_varlen`.
        cu_seqlens_k: int32, [batch + 1], or its shape.
        max_seqlen_q: the longest sequence of queries, in tokens.
        max_seqlen_k: the longest sequence of keys, in tokens.
        sinks: [num_heads_q], a tensor, or the shape of a float32 one.
        return_lse: whether the log-sum-exp of each row of scores is returned too.
        return_max_score: whether the largest score of each head is returned too.
        backend: "auto", "sm90", "wmma", "sim" or "torch".
        dtype: of shapes; by default that of q, k or v if one is a tensor, else float16.
        device: of shapes; by default that of a tensor among q, k and v, else the current GPU, or
            the CPU without one and with backend="sim".

    Returns:
        The plan of the kernel that is ready; None where PyTorch serves such calls.

    Raises:
        Exception: what `attention` or `attention_varlen` would raise for these arguments.
        CompileError: the kernel does not compile.
    """
    given = [x for x in (q, k, v) if isinstance(x, Tensor)]
    if dtype is None:
        dtype = given[0].dtype if given else torch.float16
    elif not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, but is {dtype!r}")
    if device is None:
        default = "cuda" if torch.cuda.is_available() and backend != "sim" else "cpu"
        device = given[0].device if given else torch.device(default)
    device = _device_of(device)

    def tensor(name: str, x: Tensor | Shape, element: torch.dtype) -> Tensor:
        """Return a tensor on the CPU and without values, in the place of one of which there is a
        shape."""
        if isinstance(x, Tensor):
            return x
        if not isinstance(x, (tuple, list)) or not all(type(n) is int and n >= 0 for n in x):
            raise TypeError(f"{name} must be a tensor or a shape, but is {x!r}")
        return torch.empty(tuple(x), dtype=element, device="cpu" if given == [] else device)

    packed = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    missing = [name for name, value in packed.items() if value is None]
    if 0 < len(missing) < len(packed):
        raise ValueError(f"a call of attention_varlen needs {', '.join(missing)} as well")
    if not missing and (mask is not None or seqlens_k is not None):
        raise ValueError("attention_varlen takes neither mask nor seqlens_k")
    q, k, v = (tensor(n, x, dtype) for n, x in (("q", q), ("k", k), ("v", v)))
    mask = None if mask is None else tensor("mask", mask, torch.bool)
    sinks = None if sinks is None else tensor("sinks", sinks, torch.float32)
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "scale": scale,
    }
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        assert max_seqlen_q is not None
        assert max_seqlen_k is not None
        cu_q = tensor("cu_seqlens_q", cu_seqlens_q, torch.int32)
        cu_k = tensor("cu_seqlens_k", cu_seqlens_k, torch.int32)
        problem = packed_problem(
            q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, sinks=sinks, **options
        )
    elif seqlens_k is not None:
        seqlens_k = tensor("seqlens_k", seqlens_k, torch.int32)
        checked = Options.checked(causal, window, softcap, scale)
        problem = padded_problem(Inputs(q, k, v, mask, seqlens_k, sinks=sinks), checked)
    else:
        problem = Problem.from_tensors(
            q, k, v, mask=mask, sinks=sinks, return_lse=return_lse, **options
        )
    wanted = Wanted(return_lse, return_max_score).checked()
    problem = dataclasses.replace(problem, return_max_score=wanted.return_max_score)
    if device.type == "cuda" and problem.device != "cuda":
        problem = dataclasses.replace(problem, device="cuda", arch=arch_of_device(device.index))
    return _ready(problem, backend, device)


def _device_of(device: Any) -> torch.device:
    """Return a device that somebody has named; raise unless there is one of that name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r} is no device: {str(error).splitlines()[0]}; pass 'cuda' or 'cpu'"
        ) from None


def _ready(problem: Problem, asked: str, device: torch.device) -> Plan | None:
    """Return the plan of a problem, compiled, and on a GPU loaded and checked."""
    backend = choose_backend(problem, asked).backend
    if problem.is_empty or backend == "torch":
        return None
    launched = planned_as(adapt_for(backend, problem).problem)
    if backend == "sim":
        from flashcore.sim.build import load_kernel

        plan = select_plan(launched, env.sim_arch())
        load_kernel(generate_source(plan, "host"))
        return plan
    from flashcore.launch.kernel_call import load_plan

    plan = select_plan(launched, launched.arch, kernel=KERNELS[backend])
    load_plan(launched, plan, device)
    return plan
