"""List all kernels. A new one joins here, and everybody finds it."""

from __future__ import annotations

from typing import Any

from flashcore.kernels.bwd_mask_sm90.kernel import DMASK
from flashcore.kernels.bwd_sm90.kernel import DELTA, DKDV, DQ, ROUND, BwdSm90Kernel
from flashcore.kernels.fwd_sm90.kernel import SM90
from flashcore.kernels.fwd_wmma.kernel import WMMA
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.kernel import ForwardKernel, Kernel

# Of several that serve an architecture the first one is taken.
FORWARD: tuple[ForwardKernel[Any], ...] = (SM90, WMMA)
BACKWARD: tuple[BwdSm90Kernel, ...] = (DELTA, DQ, DKDV, ROUND, DMASK)
# It serves every architecture, and every problem that a kernel serves.
PORTABLE: ForwardKernel[Any] = WMMA

BY_NAME: dict[str, Kernel[Any]] = {kernel.name: kernel for kernel in (*FORWARD, *BACKWARD)}
_FORWARD_BY_NAME = {kernel.name: kernel for kernel in FORWARD}
_BACKWARD_BY_NAME = {kernel.name: kernel for kernel in BACKWARD}
BY_BACKEND = {kernel.backend: kernel for kernel in FORWARD}


def kernel_of(plan: Plan) -> Kernel[Any]:
    """Return the kernel of a plan."""
    return BY_NAME[plan.kernel]


def forward(name: str) -> ForwardKernel[Any]:
    """Return the forward kernel of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _FORWARD_BY_NAME:
        raise ValueError(f"kernel={name!r} is not one of {', '.join(_FORWARD_BY_NAME)}")
    return _FORWARD_BY_NAME[name]


def backward(name: str) -> BwdSm90Kernel:
    """Return the backward kernel of that name."""
    return _BACKWARD_BY_NAME[name]


def forward_of(plan: Plan) -> ForwardKernel[Any]:
    """Return the forward kernel of a plan."""
    return _FORWARD_BY_NAME[plan.kernel]


def forward_for(arch: int) -> ForwardKernel[Any]:
    """Return the forward kernel that is preferred on an architecture, 90 for sm_90."""
    return next(kernel for kernel in FORWARD if kernel.serves(arch))
