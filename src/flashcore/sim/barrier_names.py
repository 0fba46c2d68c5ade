"""Name a kernel's mbarriers, which lie in one shared array, in what an alarm says."""

from __future__ import annotations

import re

from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.registry import kernel_of
from flashcore.sim.report import SimulationError

ARRAY = "barriers"
_ENTRY = re.compile(rf"\b{ARRAY}\[(\d+)\]")


def name_barriers(error: SimulationError, plan: Plan) -> None:
    """Replace places in the array of mbarriers by names, in all that an alarm says."""
    places = kernel_of(plan).barrier_places(plan)

    def named(text: str) -> str:
        def name(found: re.Match[str]) -> str:
            number = int(found[1])
            return "{}[{}]".format(*places[number]) if number < len(places) else found[0]

        return _ENTRY.sub(name, text)

    error.message, error.details = named(error.message), named(error.details)
    error.args = (error.message,)
    if error.array == ARRAY and 0 <= error.element < len(places):
        error.array, error.element = places[error.element]
