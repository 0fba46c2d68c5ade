"""Choose the kernel that isolate takes apart."""

from __future__ import annotations

from flashcore.backends.dispatch import KERNELS
from flashcore.base import env
from flashcore.kernels.registry import BY_NAME, forward_for
from flashcore.sim.plants import index


def kernel_to_run(backend: str, plant: str | None = None, arch: int | None = None) -> str:
    """Return the kernel that isolate takes apart where none is named: the backend's; in the
    simulator the planted bug's, or the one that serves the architecture (FLASHCORE_SIM_ARCH by
    default)."""
    if backend != "sim":
        return KERNELS[backend]
    by_arch = forward_for(arch or env.sim_arch()).name
    if plant is None:
        return by_arch
    possible = index.kernels_of(plant)
    return by_arch if by_arch in possible else possible[0]


def kernel_of_backend(kernel: str, plant: str | None) -> str:
    """Return the kernel itself; where a bug is planted that it has not, one of the same backend
    that has."""
    if plant is None:
        return kernel
    backend = BY_NAME[kernel].backend
    found = [name for name in index.kernels_of(plant) if BY_NAME[name].backend == backend]
    return found[0] if found and kernel not in found else kernel
