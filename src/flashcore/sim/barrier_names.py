"""Name the Hopper kernel's mbarriers, which lie in one shared array.

The order is that of `barriers()` in kernels/fwd_sm90/pipeline_sm90.cuh; a test compares the two.
"""

from __future__ import annotations

import re

from flashcore.kernels.fwd_sm90.plan import Sm90Plan
from flashcore.kernels.fwd_sm90.tiles import ROWS_OF_CONSUMER
from flashcore.sim.report import SimulationError

ARRAY = "barriers"
_ENTRY = re.compile(rf"\b{ARRAY}\[(\d+)\]")


def barrier_places(plan: Sm90Plan) -> list[tuple[str, int]]:
    """Return for each mbarrier the member of `Barriers` that it belongs to, and its index there."""
    slots = plan.q_buffers * plan.block_m // ROWS_OF_CONSUMER
    members = {"q_full": slots, "q_empty": slots}
    members |= dict.fromkeys(("k_full", "k_empty", "v_full", "v_empty"), plan.num_stages)
    if plan.key_slices > 1:
        members |= {"merge_full": 1, "merge_empty": 1}
    return [(name, index) for name, count in members.items() for index in range(count)]


def name_barriers(error: SimulationError, plan: Sm90Plan) -> None:
    """Replace places in the array of mbarriers by names, in all that an alarm says."""
    places = barrier_places(plan)

    def named(text: str) -> str:
        def name(found: re.Match[str]) -> str:
            number = int(found[1])
            return "{}[{}]".format(*places[number]) if number < len(places) else found[0]

        return _ENTRY.sub(name, text)

    error.message, error.details = named(error.message), named(error.details)
    error.args = (error.message,)
    if error.array == ARRAY and 0 <= error.element < len(places):
        error.array, error.element = places[error.element]
