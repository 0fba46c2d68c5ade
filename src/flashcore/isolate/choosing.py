"""Choose the kernel that isolate takes apart."""

from __future__ import annotations

from flashcore.backends.dispatch import KERNELS
from flashcore.base import env
from flashcore.kernels.registry import BY_NAME, forward_for
from flashcore.sim.plants import index


def kernel_to_run(backend: str, plant: str | None = None, arch: int | None = None) -> str:
    """Return the kernel that isolate takes apart where none is named: the backend's; with "sim" the
    one that serves the architecture (FLASHCORE_SIM_ARCH by default). Where a bug is planted that
    this one has not, it is another one that has, of the same backend if one is named."""
    if backend == "sim":
        chosen = forward_for(arch or env.sim_arch()).name
    else:
        chosen = KERNELS[backend]
    if plant is None:
        return chosen
    owners = index.kernels_of(plant)
    if backend != "sim":
        owners = [name for name in owners if BY_NAME[name].backend == backend]
    return chosen if chosen in owners or not owners else owners[0]
