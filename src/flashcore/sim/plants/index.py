"""List the planted bugs of every kernel, by name. isolate/registry.py adds the call that shows
each."""

from __future__ import annotations

from collections.abc import Mapping

from flashcore.compile.plant import Plant
from flashcore.kernels.append.params import AppendPlan
from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.kernels.bwd_sm90.plan_one import DELTA_KERNEL, ROUND_KERNEL
from flashcore.kernels.fwd_sm90.plan import KERNEL as SM90_KERNEL
from flashcore.kernels.fwd_wmma.plan import KERNEL as WMMA_KERNEL
from flashcore.sim.plants.append import PLANTS_APPEND
from flashcore.sim.plants.bwd_mask_sm90 import (
    PLANTS_BWD_MASK_SM90,
    PLANTS_BWD_MASKED_DQ_SM90,
    PLANTS_BWD_MASKED_SM90,
)
from flashcore.sim.plants.bwd_sm90.beside import (
    PLANTS_BWD_BESIDE_DQ_SM90,
    PLANTS_BWD_BESIDE_SM90,
)
from flashcore.sim.plants.bwd_sm90.kernels import (
    PLANTS_BWD_DKDV_SM90,
    PLANTS_BWD_DQ_SM90,
    PLANTS_BWD_ROLES_SM90,
)
from flashcore.sim.plants.bwd_sm90.lengths import (
    PLANTS_BWD_PACKED_DQ_SM90,
    PLANTS_BWD_PACKED_SM90,
    PLANTS_BWD_PADDED_SM90,
)
from flashcore.sim.plants.bwd_sm90.one import (
    PLANTS_BWD_DELTA_SM90,
    PLANTS_BWD_ONE_SM90,
    PLANTS_BWD_ORDER_SM90,
    PLANTS_BWD_ROUND_SM90,
    PLANTS_BWD_SHARED_SM90,
)
from flashcore.sim.plants.bwd_sm90.one_with import (
    PLANTS_BWD_ANY_ORDER_SM90,
    PLANTS_BWD_ONE_CAPPED_SM90,
    PLANTS_BWD_ONE_MASKED_SM90,
)
from flashcore.sim.plants.fwd_sm90.causal import PLANTS_CAUSAL_SM90
from flashcore.sim.plants.fwd_sm90.float8 import (
    PLANTS_FEW_SHORT_SM90,
    PLANTS_FEW_SM90,
    PLANTS_FLOAT8_SM90,
    PLANTS_GROWN_SM90,
    PLANTS_ROWS_SM90,
    PLANTS_SHORT_SM90,
    PLANTS_WIDE_SM90,
)
from flashcore.sim.plants.fwd_sm90.folded import PLANTS_FOLDED_SM90
from flashcore.sim.plants.fwd_sm90.mask import PLANTS_MASK_SM90
from flashcore.sim.plants.fwd_sm90.old_max import PLANTS_OLD_MAX_SM90
from flashcore.sim.plants.fwd_sm90.packed import PLANTS_PACKED
from flashcore.sim.plants.fwd_sm90.pipeline import PLANTS_SM90
from flashcore.sim.plants.fwd_sm90.split import PLANTS_SPLIT, PLANTS_STREAM
from flashcore.sim.plants.fwd_sm90.together import PLANTS_TOGETHER
from flashcore.sim.plants.max_score import PLANTS_MAX_SCORE, PLANTS_MAX_SCORE_SM90
from flashcore.sim.plants.merge import PLANTS_MERGE, PLANTS_MERGE_BACKWARD
from flashcore.sim.plants.numerics import (
    PLANTS_LARGE_SCORES,
    PLANTS_OLD_LARGE_MAX_SM90,
    PLANTS_TOTALS,
)
from flashcore.sim.plants.pages import (
    PLANTS_PAGES,
    PLANTS_PAGES_SM90,
    PLANTS_PAGES_WIDE,
    PLANTS_PAGES_WMMA,
)
from flashcore.sim.plants.pieces import OF_PACKED, OF_WALK, PLANTS_FLOAT8_WMMA
from flashcore.sim.plants.schedules import PLANTS_SCHEDULES, PLANTS_SCHEDULES_SM90
from flashcore.sim.plants.sinks import PLANTS_SINKS, PLANTS_SINKS_SPLIT
from flashcore.sim.plants.trees import OF_SM90 as TREES_SM90
from flashcore.sim.plants.trees import OF_WMMA as TREES_WMMA
from flashcore.sim.plants.trees import PLANTS_PACKED_TREES, PLANTS_PACKED_TREES_SM90
from flashcore.sim.plants.varlen import PLANTS_VARLEN, PLANTS_VARLEN_SM90
from flashcore.sim.plants.wmma import PLANTS

BY_KERNEL: Mapping[str, Mapping[str, Plant]] = {
    WMMA_KERNEL: {
        **PLANTS,
        **PLANTS_SCHEDULES,
        **PLANTS_VARLEN,
        **PLANTS_LARGE_SCORES,
        **PLANTS_TOTALS,
        **PLANTS_MAX_SCORE,
        **PLANTS_SINKS,
        **PLANTS_PAGES,
        **PLANTS_PAGES_WMMA,
        **OF_WALK,
        **OF_PACKED,
        **PLANTS_FLOAT8_WMMA,
        **TREES_WMMA,
        **PLANTS_PACKED_TREES,
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
        **PLANTS_TOGETHER,
        **PLANTS_STREAM,
        **PLANTS_VARLEN_SM90,
        **PLANTS_MAX_SCORE,
        **PLANTS_MAX_SCORE_SM90,
        **PLANTS_SINKS,
        **PLANTS_SINKS_SPLIT,
        **PLANTS_PAGES,
        **PLANTS_PAGES_SM90,
        **PLANTS_PAGES_WIDE,
        **PLANTS_FLOAT8_SM90,
        **PLANTS_FEW_SM90,
        **PLANTS_ROWS_SM90,
        **PLANTS_FEW_SHORT_SM90,
        **PLANTS_GROWN_SM90,
        **TREES_SM90,
        **PLANTS_PACKED_TREES,
        **PLANTS_PACKED_TREES_SM90,
        **PLANTS_WIDE_SM90,
        **PLANTS_SHORT_SM90,
        **PLANTS_FOLDED_SM90,
        **PLANTS_PACKED,
    },
    DQ_KERNEL: {
        **PLANTS_BWD_DQ_SM90,
        **PLANTS_BWD_BESIDE_DQ_SM90,
        **PLANTS_BWD_PACKED_DQ_SM90,
        **PLANTS_BWD_MASKED_DQ_SM90,
    },
    DMASK_KERNEL: PLANTS_BWD_MASK_SM90,
    DKDV_KERNEL: {
        **PLANTS_BWD_DKDV_SM90,
        **PLANTS_BWD_BESIDE_SM90,
        **PLANTS_BWD_ROLES_SM90,
        **PLANTS_BWD_ONE_SM90,
        **PLANTS_BWD_ONE_MASKED_SM90,
        **PLANTS_BWD_ONE_CAPPED_SM90,
        **PLANTS_BWD_ORDER_SM90,
        **PLANTS_BWD_ANY_ORDER_SM90,
        **PLANTS_BWD_SHARED_SM90,
        **PLANTS_BWD_PACKED_SM90,
        **PLANTS_BWD_PADDED_SM90,
        **PLANTS_BWD_MASKED_SM90,
    },
}

# Of kernels that isolate does not take apart, with the test that runs each.
_BESIDE: Mapping[str, tuple[Mapping[str, Plant], str]] = {
    AppendPlan.kernel: (PLANTS_APPEND, "tests/plants/test_sim_plants_append.py"),
    "merge_results": (PLANTS_MERGE, "tests/kernels/test_merge_kernels.py"),
    "merge_results_backward": (PLANTS_MERGE_BACKWARD, "tests/kernels/test_merge_kernels.py"),
    DELTA_KERNEL: (PLANTS_BWD_DELTA_SM90, "tests/plants/test_sim_plants_bwd_one_sm90.py"),
    ROUND_KERNEL: (PLANTS_BWD_ROUND_SM90, "tests/plants/test_sim_plants_bwd_one_sm90.py"),
}
BESIDE: Mapping[str, Mapping[str, Plant]] = {
    kernel: plants for kernel, (plants, _) in _BESIDE.items()
}
TEST_OF_BESIDE = {kernel: test for kernel, (_, test) in _BESIDE.items()}


def check_is_taken_apart(name: str, kernel: str) -> None:
    """Raise ValueError where isolate does not take a planted bug's kernel apart."""
    if kernel in BESIDE:
        raise ValueError(
            f"plant={name!r} is a bug of {kernel}, which isolate does not take apart; "
            f"{TEST_OF_BESIDE[kernel]} runs it"
        )


def names() -> list[str]:
    """Return the name of every planted bug, once."""
    found = (*BY_KERNEL.values(), *BESIDE.values())
    return list(dict.fromkeys(name for plants in found for name in plants))


def kernels_of(name: str) -> list[str]:
    """Return the kernels that a planted bug is one of.

    Raises:
        ValueError: an unknown name.
    """
    found = [kernel for kernel, plants in (*BY_KERNEL.items(), *BESIDE.items()) if name in plants]
    if not found:
        raise ValueError(f"plant={name!r} is not one of {', '.join(names())}")
    return found


def find_plant(name: str, kernel: str) -> Plant:
    """Return the planted bug of that name in a kernel.

    Raises:
        ValueError: an unknown name, or a bug of another kernel.
    """
    owners = kernels_of(name)
    if kernel not in owners:
        raise ValueError(f"plant={name!r} is not a bug of {kernel}, but of {owners[0]}")
    return BY_KERNEL[kernel][name]


def check_backend(name: str, backend: str) -> None:
    """Raise ValueError unless the backend is the simulator."""
    if backend != "sim":
        raise ValueError(f"plant={name!r} needs backend='sim': bugs are planted in the simulator")
