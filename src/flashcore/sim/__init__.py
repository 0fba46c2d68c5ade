"""This package is the simulator: kernels are compiled for the host and run with every access
checked.

`simulate` runs a plan on CPU tensors, `simulate_source` any kernel written against prims.cuh. A
race, an out-of-bounds access, a deadlock and the like raise SimulationError, which names the kernel
line and the command that replays the run. docs/simulator.md explains how it works.
"""

from __future__ import annotations

from flashcore.compile.plant import Plant
from flashcore.sim.plants.fwd_sm90.pipeline import PLANTS_SM90
from flashcore.sim.plants.wmma import PLANTS
from flashcore.sim.report import Agent, SimReport, SimulationError
from flashcore.sim.run import simulate, simulate_source
from flashcore.sim.tensors import SimTensor

__all__ = [
    "PLANTS",
    "PLANTS_SM90",
    "Agent",
    "Plant",
    "SimReport",
    "SimTensor",
    "SimulationError",
    "simulate",
    "simulate_source",
]
