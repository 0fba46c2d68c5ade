"""List the planted bugs of every forward kernel, by name."""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.compile.plant import Plant
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90_KERNEL
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA_KERNEL
from flashcore.sim.plants.causal import PLANTS_CAUSAL_SM90
from flashcore.sim.plants.mask import PLANTS_MASK_SM90
from flashcore.sim.plants.numerics import (
    PLANTS_LARGE_SCORES,
    PLANTS_OLD_LARGE_MAX_SM90,
    PLANTS_TOTALS,
)
from flashcore.sim.plants.old_max import PLANTS_OLD_MAX_SM90
from flashcore.sim.plants.schedules import PLANTS_SCHEDULES, PLANTS_SCHEDULES_SM90
from flashcore.sim.plants.sinks import PLANTS_SINKS, PLANTS_SINKS_SPLIT
from flashcore.sim.plants.sm90 import PLANTS_SM90
from flashcore.sim.plants.split import PLANTS_SPLIT
from flashcore.sim.plants.varlen import PLANTS_VARLEN, PLANTS_VARLEN_SM90
from flashcore.sim.plants.wmma import PLANTS

BY_KERNEL: Mapping[str, Mapping[str, Plant]] = {
    WMMA_KERNEL: {
        **PLANTS,
        **PLANTS_SCHEDULES,
        **PLANTS_VARLEN,
        **PLANTS_LARGE_SCORES,
        **PLANTS_TOTALS,
        **PLANTS_SINKS,
    },
    SM90_KERNEL: {
        **PLANTS_SM90,
        **PLANTS_CAUSAL_SM90,
        **PLANTS_OLD_MAX_SM90,
        **PLANTS_MASK_SM90,
        **PLANTS_SCHEDULES_SM90,
        **PLANTS_LARGE_SCORES,
        **PLANTS_OLD_LARGE_MAX_SM90,
        **PLANTS_SPLIT,
        **PLANTS_VARLEN_SM90,
        **PLANTS_SINKS,
        **PLANTS_SINKS_SPLIT,
    },
}


def find_plant(name: str, kernel: str) -> Plant:
    """Return the planted bug of that name in a kernel.

    Raises:
        ValueError: an unknown name, or a bug of another kernel.
    """
    if name in BY_KERNEL[kernel]:
        return BY_KERNEL[kernel][name]
    names = dict.fromkeys(name for plants in BY_KERNEL.values() for name in plants)
    if name not in names:
        raise ValueError(f"plant={name!r} is not one of {', '.join(names)}")
    owner = next(other for other, plants in BY_KERNEL.items() if name in plants)
    raise ValueError(f"plant={name!r} is not a bug of {kernel}, but of {owner}")
