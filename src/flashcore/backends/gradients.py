"""Decide which code computes the gradient of attention.

On a Hopper GPU fused kernels do (backends/backward_sm90.py). Elsewhere, and for what they do not
know, torch's fused backward operators do where they mean the same (backends/torch_backward.py), and
PyTorch operations tile by tile where those do not (backends/tiled.py).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcore.backends import torch_backward
from flashcore.backends.backward_sm90 import (
    fused_backward,
    is_by_one_kernel,
    prepare_on_gpu,
    run_in_simulator,
    run_on_gpu,
    why_in_order,
)
from flashcore.backends.tiled import attention_backward_tiled
from flashcore.base import env
from flashcore.errors import BackendUnavailableError, FallbackWarning
from flashcore.kernels.bwd_sm90.kernel import DQ
from flashcore.kernels.bwd_sm90.plan import ARCH as SM90_ARCH
from flashcore.kernels.bwd_sm90.plan import obstacle as obstacle_to_sm90
from flashcore.kernels.bwd_sm90.plan import obstacle_anywhere
from flashcore.launch.types import Prepared
from flashcore.problem import Problem
from flashcore.problem.memory_layout import with_strides_of_empty_like


@dataclass(frozen=True, slots=True)
class BackwardChoice:
    """A choice holds the code that computes a gradient.

    Args:
        code: "sm90", "sim", "flash", "efficient" or "tiled"; in explanations also "none".
        reason: why, in words.
    """

    code: str
    reason: str

    @property
    def is_fused(self) -> bool:
        """Return whether flashcore's own kernels compute it, on a GPU or in the simulator."""
        return self.code == "sim" or self.is_on_gpu

    @property
    def is_on_gpu(self) -> bool:
        """Return whether flashcore's own kernels compute it on a GPU."""
        return self.code == DQ.backend


def choose_backward(
    problem: Problem,
    *,
    through_lse: bool = False,
    mask_grad_elements: int = 0,
    backend: str = "auto",
) -> BackwardChoice:
    """Resolve which code computes the gradient of a call.

    Args:
        problem: the description of the call. Of sequences that differ in length it is `packed`, or
            one of the sequences.
        through_lse: whether a gradient arrives through lse, or none through out.
        mask_grad_elements: how many elements an additive mask has that needs a gradient; 0 if none
            does.
        backend: of the call. With "torch" none of our kernels computes its gradient either; with
            "sim" the simulator runs those for Hopper, where it runs that GPU's code.
    """
    reason = _obstacle_to_ours(problem, backend, mask_grad_elements > 0)
    if reason is None:
        where = "sim" if backend == "sim" else DQ.backend
        of_mask = ", another for the mask's gradient" if mask_grad_elements else ""
        kernels, order = "fused kernels", "deterministic"
        if is_by_one_kernel(problem):
            kernels = "one fused kernel"
            order = why_in_order(problem) or (
                "dq added up in any order, as deterministic=False allows"
            )
        return BackwardChoice(where, f"{kernels} for Hopper{of_mask}, {order}")
    if backend == "sim":
        return BackwardChoice("tiled", reason)
    obstacle = torch_backward.obstacle_to_fused(problem, through_lse)
    if obstacle is not None:
        return BackwardChoice("tiled", obstacle)
    not_flash = torch_backward.obstacle_to_flash(problem)
    if not_flash is None:
        return BackwardChoice("flash", "torch's FlashAttention-2 computes the same gradient")
    not_efficient = torch_backward.obstacle_to_efficient(problem, mask_grad_elements)
    if not_efficient is None:
        return BackwardChoice("efficient", not_flash)
    return BackwardChoice("tiled", f"{not_flash}; {not_efficient}")


def computes_all(problem: Problem, choice: BackwardChoice) -> bool:
    """Return whether a choice computes the gradients of all sequences of different lengths at once;
    else each is computed by itself, for which the host reads the lengths."""
    return choice.is_fused or (problem.varlen == "packed" and choice.code == "flash")


def _obstacle_to_ours(problem: Problem, backend: str, needs_mask_grad: bool) -> str | None:
    if backend == "torch":
        return 'asked for with backend="torch"'
    if backend == "sim":
        if env.sim_arch() != SM90_ARCH:
            return f"the fused backward is Hopper's, and {env.SIM_ARCH.name} is {env.sim_arch()}"
        return obstacle_anywhere(problem, needs_mask_grad)
    return obstacle_to_sm90(problem, needs_mask_grad)


def shape_of(mask: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of a mask with all four dimensions."""
    *_, batch, heads, rows, keys = (1, 1, 1, 1, *mask.shape)
    return batch, heads, rows, keys


def gradient_of_rows(
    mask: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute the gradient of a mask that is the same for all keys of a row.

    With delta = sum(dout * out) - dlse, the gradients of a row's scores, p (dout.v - delta), add up
    to sum(dout * out) - delta sum(p), where p adds up to 1 without the sink's part.

    Args:
        mask: additive, broadcast to the scores; its last dimension has size 1.
        out: the forward's output, [batch, num_heads_q, seqlen_q, head_dim_v].
        lse: the forward's lse, [batch, num_heads_q, seqlen_q].
        dout: gradient of out, or None for zero.
        dlse: gradient of lse, or None for zero.
        sinks: [num_heads_q], a logit of each head that joined the softmax; or None.

    Returns:
        Shape and dtype of mask; what an empty row would contribute is 0.
    """
    sums = torch.zeros_like(lse) if dlse is None else dlse
    if sinks is not None:
        of_sink = torch.exp(sinks.to(lse.dtype).unsqueeze(-1) - lse)
        of_out = 0.0 if dout is None else (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        sums = sums + of_sink * (of_out - sums)
    sums = sums.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)
    return sums.sum_to_size(shape_of(mask)).reshape(mask.shape).to(mask.dtype)


@functools.cache
def _warn_of_fallback(reason: str) -> None:
    warnings.warn(
        f"flashcore's gradients fall back to torch's operators, as the fused backward cannot be "
        f"compiled: {reason}",
        FallbackWarning,
        stacklevel=2,
    )


def gradients_with_lengths(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Mapping[str, Tensor],
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute dq, dk and dv of sequences of different lengths without reading these, or return None
    where no fused kernel does; the arguments are those of `fused_backward`."""
    choice = choose_backward(problem, backend=backend)
    if not choice.is_fused or problem.is_empty:
        return None
    return _fused(choice, (problem, q, k, v, mask, out, lse, dout, dlse), lengths)


def _fused(
    choice: BackwardChoice,
    inputs: tuple[Any, ...],
    lengths: Mapping[str, Tensor] | None = None,
    dmask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute dq, dk and dv by the fused kernels of a choice; return None, with a warning, where
    they cannot be compiled: from a bundle without them, and without a compiler. `inputs` are the
    arguments of `fused_backward` up to dlse; `dmask` is its last."""
    run = run_on_gpu if choice.is_on_gpu else run_in_simulator
    try:
        problem, q, k, v, mask, out, lse, dout, dlse = inputs
        return fused_backward(
            problem, q, k, v, mask, out, lse, dout, dlse, run, None, lengths, dmask
        )
    except BackendUnavailableError as error:
        if not choice.is_on_gpu:
            raise
        _warn_of_fallback(str(error))
    return None


def attention_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor | None,
    dlse: Tensor | None,
    needs_mask_grad: bool,
    backend: str = "auto",
    sinks: Tensor | None = None,
) -> torch_backward.Gradients:
    """Compute dq, dk, dv and dmask; the arguments and results of `attention_backward_tiled`, the
    backend of the call, and its sinks, if it has some."""
    choice = choose_backward(
        problem,
        through_lse=dout is None or dlse is not None,
        mask_grad_elements=mask.numel() if mask is not None and needs_mask_grad else 0,
        backend=backend,
    )
    if choice.code == "tiled" or problem.is_empty:
        return attention_backward_tiled(
            problem, q, k, v, mask, out, lse, dout, dlse, needs_mask_grad
        )
    if choice.is_fused:
        inputs = problem, q, k, v, mask, out, lse, dout, dlse
        dmask, of_kernel = None, None
        if mask is not None and needs_mask_grad:
            if shape_of(mask)[3] == 1:
                dmask = gradient_of_rows(mask, out, lse, dout, dlse, sinks)
            else:
                dmask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
                of_kernel = dmask.view(shape_of(mask))
        fused = _fused(choice, inputs, None, of_kernel)
        if fused is not None:
            if mask is not None and dmask is not None:
                dmask = with_strides_of_empty_like(mask, dmask)
            return *fused, dmask
        return attention_gradients(*inputs, needs_mask_grad, "torch", sinks)
    assert dout is not None
    whole_q, whole_k, whole_v, out, dout = (
        torch_backward.with_whole_packets(x) for x in (q, k, v, out, dout)
    )
    if choice.code == "flash":
        gradients = torch_backward.flash_gradients(
            problem, whole_q, whole_k, whole_v, out, lse, dout
        )
    else:
        gradients = torch_backward.efficient_gradients(
            problem, whole_q, whole_k, whole_v, mask, out, lse, dout, needs_mask_grad
        )
    dq, dk, dv, dmask = gradients
    like = torch_backward.laid_out_as
    return like(q, dq), like(k, dk), like(v, dv), dmask


def prepare_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    backend: str,
    lengths: Mapping[str, Tensor] | None = None,
) -> Prepared | None:
    """Return what computes dq, dk and dv of such tensors; None where `attention_gradients` or
    `gradients_with_lengths` has to look at each call. See prepare_on_gpu."""
    if not choose_backward(problem, backend=backend).is_on_gpu:
        return None
    try:
        return prepare_on_gpu(problem, q, k, v, mask, out, lse, dout, lengths)
    except BackendUnavailableError:
        return None  # of which attention_gradients warns
