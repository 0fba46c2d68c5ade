"""Say how autograd sees the operators: recorded, or taken apart where forward mode wants tangents.

An operator's kernel for the dispatch key Autograd runs once for each level of torch.func around a
call, and once below them. In forward mode (jvp, jacfwd, dual numbers) it computes the call by plain
operations of torch, which carry tangents; else it records the operator if a gradient is wanted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._functorch.autograd_function import (  # type: ignore[attr-defined]
    enable_single_level_autograd_function,
)
from torch.autograd import forward_ad

from flashcore.backends.dispatch import check_backend
from flashcore.backends.obstacles import KERNEL_DTYPES
from flashcore.errors import FallbackWarning, stacklevel_of_caller
from flashcore.ops import flops
from flashcore.problem.validation import DTYPES

_warned_of_forward_mode = False


def needs_grad(*tensors: Any) -> bool:
    """Return whether autograd records a call with these tensors. What is none has no gradient."""
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110 - a generator takes as long again
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def in_forward_mode(*inputs: Any) -> bool:
    """Return whether the level that an operator is called at wants tangents of its results."""
    transform = peek_interpreter_stack()
    if transform is not None and transform.key() != TransformType.Vmap:
        return transform.key() == TransformType.Jvp
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )


def warn_of_forward_mode(q: Tensor, backend: str) -> None:
    """Check the backend; give one FallbackWarning a process where a kernel is passed over."""
    global _warned_of_forward_mode
    check_backend(backend)
    served = q.is_cuda and DTYPES.get(q.dtype) in KERNEL_DTYPES
    if _warned_of_forward_mode or not (served if backend == "auto" else backend != "torch"):
        return
    _warned_of_forward_mode = True
    warnings.warn(
        "flashcore.attention falls back to PyTorch: the kernels have no forward mode (jvp, "
        'jacfwd, dual numbers). The result is the same; pass backend="torch", or filter '
        "flashcore.FallbackWarning, to silence this",
        FallbackWarning,
        stacklevel=stacklevel_of_caller(),
    )


def below_autograd(op: Any, keyset: Any, inputs: tuple[Any, ...]) -> Any:
    """Call an operator for whoever comes after autograd."""
    # autograd.Function switches recording and tangents off, but the levels of torch.func below this
    # one have theirs.
    transformed = torch._C._are_functorch_transforms_active()
    recording = transformed or torch.is_grad_enabled()
    tangents = transformed or torch._C._is_fwd_grad_enabled()
    with (
        torch._C._AutoDispatchBelowAutograd(),
        torch.set_grad_enabled(recording),
        forward_ad._set_fwd_grad_enabled(tangents),
    ):
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def register_autograd(
    library: torch.library.Library,
    op: Any,
    function: type[torch.autograd.Function],
    plain: Callable[..., Any],
) -> None:
    """Register what the module's text says.

    As torch.library.register_autograd does, but so that torch.func.grad can transform it: when
    an operator's autograd kernel runs, the transform has already unwrapped the tensors of its
    level. torch.autograd.Function.apply does not know that, what lies under it does.

    Args:
        library: where the operator is defined.
        op: the operator.
        function: records it; its forward takes the dispatch keys and the operator's arguments.
        plain: the same as the operator, by operations of torch.
    """
    record = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if torch._C._len_torch_dispatch_stack():
            flops.introduce()
        if in_forward_mode(*inputs):
            return plain(*inputs)
        if not needs_grad(*inputs):
            return below_autograd(op, keyset, inputs)
        with enable_single_level_autograd_function():
            return record(keyset, *inputs)

    library.impl(op._schema.name.partition("::")[2], kernel, "Autograd", with_keyset=True)
