"""List all planted bugs: the kernel each is in, and a call that shows it.

`flashcore isolate --plant NAME` takes that call unless it is told another one. Which stage is then
the first wrong one stands in plant_stages.py; tests/plants/test_planted_bugs.py holds isolate to
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from flashcore.backends.dispatch import KERNELS
from flashcore.backends.obstacles import SM90_ARCH
from flashcore.checks.drawing import draw
from flashcore.checks.varlen_cases import VarlenCase
from flashcore.compile.plant import Plant
from flashcore.isolate.plant_stages import STAGES
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.problem.case import Case
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

_WMMA, _SM90 = KERNELS["wmma"], KERNELS["sm90"]


@dataclass(frozen=True, slots=True)
class Planted:
    """Planted describes a planted bug of a kernel.

    `options` are the fields of the Case that shows it (of a VarlenCase, where `is_packed`) as far
    as they are not isolate's defaults, `tile` those of its plan; `drawn` is the number of that case
    among those of `verify` with seed 0, if it is one. `stage` is the stage, or the phase outside of
    the stages, that isolate then names.
    """

    plant: Plant
    kernel: str
    options: Mapping[str, Any] = field(default_factory=dict)
    tile: Mapping[str, Any] = field(default_factory=dict)
    is_packed: bool = False
    drawn: int | None = None
    stage: str = ""

    def case(self, base: Case, given: Collection[str] = ()) -> Case | VarlenCase:
        """Return the call that shows the bug: `base` with `options`, except for fields that are
        `given`."""
        options = {name: value for name, value in self.options.items() if name not in given}
        if self.is_packed:
            return VarlenCase(**options)
        return dataclasses.replace(base, **options)


# Beside others of its kind, two consumers for whom two row tiles follow each other, four key tiles
# for two stages.
_TWO_CONSUMERS = {"block_m": 128, "block_n": 64, "num_stages": 2, "min_blocks": 1, "key_slices": 1}
_SHORT_KEY_TILES = _TWO_CONSUMERS | {"block_n": 32, "q_buffers": 1}
_IN_TURNS = {"ping_pong": True}
_PACKED = {
    "lengths_q": (60, 0, 70, 1, 9),
    "lengths_k": (40, 3, 90, 17, 0),
    "num_heads_kv": 1,
    "causal": "lower_right",
}
_TILES: dict[str, Mapping[str, Any]] = {
    "no-is-yes": _TWO_CONSUMERS,
    "probs-written-early": {"lazy_rescale": False},
}
_EVEN_SHARES = {"seqlen_q": 200, "seqlen_k": 220}
_SPLIT = {"seqlen_q": 70, "seqlen_k": 250, "head_dim": 32, "head_dim_v": 40, "spread": 4.0}
_SHARED_BY_BLOCKS = {
    "block_m": 64,
    "block_n": 32,
    "num_stages": 2,
    "min_blocks": 3,
    "num_splits": 5,
    "key_slices": 1,
    "ping_pong": False,
}
_MASKED = {"seqlen_q": 150, "seqlen_k": 117, "head_dim": 64, "head_dim_v": 64}
# An odd seed aligns a mask's rows; of an odd number of keys, others start inside of a packet.
_ROWS = _MASKED | {"causal": "lower_right", "mask": "additive", "seed": 1}
_SHIFTED_ROWS = _MASKED | {"causal": "lower_right", "mask": "bool", "seed": 2}
_GROWING = {"seqlen_q": 150, "seqlen_k": 181, "head_dim": 64, "head_dim_v": 64, "dtype": "bfloat16"}
_SHORT: dict[str, Any] = {"seqlen_q": 70, "seqlen_k": 150, "head_dim": 64, "head_dim_v": 64}
# Products of a large maximum are rounded by so much here that a term is nothing, or infinite; to be
# taken twice it must be large only.
_LARGE: dict[str, dict[str, Any]] = {
    "large-max-product": {"dtype": "bfloat16", "spread": 1e18},
    "large-max-twice": {"spread": 1000.0},
}
# No row sees a larger score in a later key tile.
_LEVEL = _SHORT | {"dtype": "bfloat16", "spread": 0.0, "growth": "level"}
# Heads of a group are rows of one row tile, which they do not fill.
_SINKS = _SHORT | {"seqlen_q": 9, "num_heads_q": 4, "num_heads_kv": 2, "sinks": True}
_CHUNKS = {"block_m": 64, "block_n": 32, "keys_of_chunk": 64}
_CASES_SM90 = {
    "passed-over-unsynced": 37,
    "passed-over-turn-too-many": 1,
    "outgrown-one-group-early": 2,
    "sum-of-the-neighbour": 6,
    "turns-of-two": 1,
    "unseen-q-kept": 33,
    "ring-of-all-stages": 3,
    "third-share-unseen": 3,
    "second-part-alone": 37,
    "first-part-kept": 37,
    "unmasked-too-far-right": 29,
    "unmasked-too-far-left": 11,
    "last-key-alone": 53,
    "folded-as-rows": 16,
}
_GROWTHS = {"no-max-yet-unseen": "none", "outgrown-in-one-warp": "far peak"}


def _planted(plants: Mapping[str, Plant], kernel: str, **needs: Any) -> list[Planted]:
    tile = needs.pop("tile", {})
    return [
        Planted(plant, kernel, tile={**tile, **plant.plan}, stage=_stage(name, kernel), **needs)
        for name, plant in plants.items()
    ]


def _with_mask(name: str, plant: Plant) -> Planted:
    is_shifted = plant.plan.get("mask_is_shifted", False)
    options = _SHIFTED_ROWS if is_shifted else _ROWS
    return Planted(plant, _SM90, options, _SHORT_KEY_TILES, stage=_stage(name, _SM90))


def _with_growth(name: str, plant: Plant) -> Planted:
    options = {**_GROWING, "growth": _GROWTHS.get(name, "far")}
    if name == "no-max-yet-unseen":
        options["causal"] = "lower_right"
    tile = _SHORT_KEY_TILES | _IN_TURNS
    return Planted(plant, _SM90, options, tile, stage=_stage(name, _SM90))


def _with_large_scores(name: str, plant: Plant, kernel: str) -> Planted:
    return Planted(plant, kernel, {**_SHORT, **_LARGE[name]}, stage=_stage(name, kernel))


def _packed(name: str, plant: Plant, more: Mapping[str, Any]) -> Planted:
    options = {**_PACKED, **more}
    return Planted(plant, _WMMA, options, is_packed=True, stage=_stage(name, _WMMA))


def _drawn(plants: Mapping[str, Plant], kernel: str, cases: Mapping[str, int]) -> list[Planted]:
    """Give plants the case of `verify` that finds each."""
    found = []
    for name, plant in plants.items():
        number = cases[name]
        drawn = draw(0, number, "sim", SM90_ARCH if kernel == _SM90 else SIM_ARCH)
        options = {f.name: getattr(drawn.case, f.name) for f in dataclasses.fields(drawn.case)}
        stage = _stage(name, kernel)
        found.append(Planted(plant, kernel, options, drawn.tile, False, number, stage))
    return found


def _stage(name: str, kernel: str) -> str:
    return next((stage for stage, names in STAGES[kernel].items() if name in names), "")


PLANTED: tuple[Planted, ...] = (
    *_planted(PLANTS, _WMMA),
    *_drawn(PLANTS_SCHEDULES, _WMMA, {"one-stage-unordered": 6, "one-ahead": 8}),
    *(
        _packed(name, plant, {"overrun": 1000} if name == "no-clamp" else {})
        for name, plant in PLANTS_VARLEN.items()
    ),
    *(
        # With as many key tiles in each share nothing else orders the shares of two row tiles. Nor
        # is every V there in time for two consumers.
        Planted(
            plant,
            _SM90,
            _EVEN_SHARES if "share" in name or name == "no-is-yes" else {},
            _TILES.get(name, plant.plan),
            stage=stage,
        )
        for name, plant in PLANTS_SM90.items()
        for stage in [_stage(name, _SM90)]
    ),
    *_planted(
        PLANTS_CAUSAL_SM90,
        _SM90,
        options={"causal": "lower_right", "seqlen_q": 200, "seqlen_k": 220},
        tile=_TWO_CONSUMERS | _IN_TURNS,
    ),
    *(_with_growth(name, plant) for name, plant in PLANTS_OLD_MAX_SM90.items()),
    *(_with_mask(name, plant) for name, plant in PLANTS_MASK_SM90.items()),
    *_drawn(PLANTS_SCHEDULES_SM90, _SM90, _CASES_SM90),
    *(
        _with_large_scores(name, plant, kernel)
        for kernel in (_WMMA, _SM90)
        for name, plant in PLANTS_LARGE_SCORES.items()
    ),
    *_planted(PLANTS_OLD_LARGE_MAX_SM90, _SM90, options=_LEVEL, tile=_SHORT_KEY_TILES),
    *_planted(PLANTS_TOTALS, _WMMA, options={"seqlen_q": 70, "seqlen_k": 333}, tile=_CHUNKS),
    *_planted(PLANTS_SPLIT, _SM90, options=_SPLIT, tile=_SHARED_BY_BLOCKS),
    *(
        planted
        for kernel in (_WMMA, _SM90)
        for planted in _planted(PLANTS_SINKS, kernel, options=_SINKS)
    ),
    *_planted(PLANTS_SINKS_SPLIT, _SM90, options=_SPLIT | {"sinks": True}, tile=_SHARED_BY_BLOCKS),
    *_planted(
        PLANTS_VARLEN_SM90,
        _SM90,
        options=_PACKED,
        tile=_SHORT_KEY_TILES | _IN_TURNS,
        is_packed=True,
    ),
)


def names() -> list[str]:
    """Return the name of every planted bug, once."""
    return list(dict.fromkeys(planted.plant.name for planted in PLANTED))


def kernels_of(name: str) -> list[str]:
    """Return the kernels that a planted bug is one of."""
    return [planted.kernel for planted in PLANTED if planted.plant.name == name]


def find_plant(name: str, backend: str, kernel: str | None = None) -> Planted:
    """Return the planted bug of that name.

    Args:
        name: as `--plant` takes it.
        backend: must be "sim".
        kernel: it must be in; by default any.

    Raises:
        ValueError: an unknown name, a bug of another kernel, or a backend that is not the
            simulator.
    """
    if backend != "sim":
        raise ValueError(f"plant={name!r} needs backend='sim': bugs are planted in the simulator")
    found = [planted for planted in PLANTED if planted.plant.name == name]
    if not found:
        raise ValueError(f"plant={name!r} is not one of {', '.join(names())}")
    for planted in found:
        if kernel in (None, planted.kernel):
            return planted
    raise ValueError(f"plant={name!r} is not a bug of {kernel}, but of {found[0].kernel}")
