"""Choose the kernel that isolate takes apart."""

from __future__ import annotations

from flashcore.backends.dispatch import KERNELS
from flashcore.base import env
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL
from flashcore.kernels.registry import BY_NAME, forward_for
from flashcore.sim.plants import index


def kernel_to_run(
    backend: str, plant: str | None = None, arch: int | None = None, backward: bool = False
) -> str:
    """Return the kernel that isolate takes apart where none is named: the backend's; with "sim" the
    one that serves the architecture (FLASHCORE_SIM_ARCH by default). Where a bug is planted that
    this one has not, it is another one that has, of the same backend if one is named. Of the
    `backward` pass it is the kernel of dk and dv, which has most of the stages."""
    if backward:
        known = sorted({kernel.backend for kernel in BY_NAME.values() if kernel.is_backward})
        if backend not in ("sim", *known):
            raise ValueError(
                f"backend={backend!r} has no backward kernels: take one of {', '.join(known)}, sim"
            )
        chosen = DKDV_KERNEL
    elif backend == "sim":
        chosen = forward_for(arch or env.sim_arch()).name
    else:
        chosen = KERNELS[backend]
    if plant is None:
        return chosen
    owners = index.kernels_of(plant)
    if backward:
        owners = [name for name in owners if BY_NAME[name].is_backward]
        if not owners:
            raise ValueError(
                f"plant={plant!r} is a bug of no backward kernel: leave out --backward"
            )
    if backend != "sim":
        owners = [name for name in owners if BY_NAME[name].backend == backend]
    return chosen if chosen in owners or not owners else owners[0]
