"""Give planted bugs the calls that show them, where not every call does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flashcore.checks.drawing import draw
from flashcore.compile.plant import Plant
from flashcore.isolate.backward_calls import (
    BACKWARD,
    BACKWARD_MASKED,
    BACKWARD_PACKED,
    BACKWARD_PADDED,
    BACKWARD_ROLES,
    BACKWARD_SHARED,
    BACKWARD_WINDOW,
    MASK_GRADIENT,
    TILE_IN_ANY_ORDER,
    TILE_OF_DKDV,
    TILE_OF_DQ,
    TILE_OF_ONE,
    TILE_OF_ROLES,
    TILE_OF_SHARED,
)
from flashcore.kernels.bwd_mask_sm90.plan import DMASK_KERNEL
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.kernels.fwd_sm90.plan import KERNEL as _SM90
from flashcore.kernels.fwd_wmma.plan import KERNEL as _WMMA
from flashcore.kernels.fwd_wmma.plan import SIM_ARCH
from flashcore.kernels.registry import BY_NAME
from flashcore.sim.plants import pages, pieces, trees
from flashcore.sim.plants.bwd_mask_sm90 import (
    OF_ROWS,
    PLANTS_BWD_MASK_SM90,
    PLANTS_BWD_MASKED_DQ_SM90,
    PLANTS_BWD_MASKED_SM90,
)
from flashcore.sim.plants.bwd_sm90 import one, one_with
from flashcore.sim.plants.bwd_sm90.kernels import PLANTS_BWD_ROLES_SM90
from flashcore.sim.plants.bwd_sm90.lengths import (
    PLANTS_BWD_PACKED_DQ_SM90,
    PLANTS_BWD_PACKED_SM90,
    PLANTS_BWD_PADDED_SM90,
)
from flashcore.sim.plants.fwd_sm90 import float8, folded, packed, split, together
from flashcore.sim.plants.fwd_sm90.causal import PLANTS_CAUSAL_SM90
from flashcore.sim.plants.fwd_sm90.mask import PLANTS_MASK_SM90
from flashcore.sim.plants.fwd_sm90.old_max import PLANTS_OLD_MAX_SM90
from flashcore.sim.plants.fwd_sm90.pipeline import PLANTS_SM90
from flashcore.sim.plants.max_score import PLANTS_MAX_SCORE, PLANTS_MAX_SCORE_SM90
from flashcore.sim.plants.numerics import PLANTS_OLD_LARGE_MAX_SM90, PLANTS_TOTALS
from flashcore.sim.plants.sinks import PLANTS_SINKS, PLANTS_SINKS_SPLIT
from flashcore.sim.plants.varlen import PLANTS_VARLEN, PLANTS_VARLEN_SM90

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
_CAUSAL = {"causal": "lower_right"}
_CHUNKS = {"block_m": 64, "block_n": 32, "keys_of_chunk": 64}
_MAX_SCORE = _SHORT | {"return_max_score": True}
_ONE_QUERY = {"seqlen_q": 1, "num_heads_q": 4, "num_heads_kv": 1}
# The first of four key tiles has the largest scores.
_IN_SECOND_SLICE = _MAX_SCORE | {"seqlen_k": 128, "growth": "slow"}
_IN_SLICES = {"block_m": 64, "block_n": 32, "num_stages": 4, "key_slices": 2}
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
_TRIANGLE = {"mask": "triangle", "seqlen_k": 167, "growth": "none"}  # its edge: left of last keys
_UNDER_A_BOUND = {"no-max-yet-unseen", *(name for name in PLANTS_OLD_MAX_SM90 if "part" in name)}
_GROWTHS = dict.fromkeys(_UNDER_A_BOUND, "none") | {"outgrown-in-one-warp": "far peak"}

# By name of a bug, fields of its Planted.
_Calls = dict[str, dict[str, Any]]


def _calls(plants: Mapping[str, Plant], tile: Mapping[str, Any], **fields: Any) -> _Calls:
    """Give plants one call, with the tile that each needs."""
    return {name: fields | {"tile": {**tile, **plant.plan}} for name, plant in plants.items()}


def _drawn(kernel: str, cases: Mapping[str, int]) -> _Calls:
    """Give plants the case of `verify` that finds each."""
    calls: _Calls = {}
    for name, number in cases.items():
        drawn = draw(0, number, "sim", BY_NAME[kernel].only_arch or SIM_ARCH)
        options = {f.name: getattr(drawn.case, f.name) for f in dataclasses.fields(drawn.case)}
        calls[name] = {"options": options, "tile": drawn.tile, "drawn": number}
    return calls


def _masked(plants: Mapping[str, Plant]) -> _Calls:
    calls: _Calls = {}
    for name, plant in plants.items():
        options = _SHIFTED_ROWS if plant.plan.get("mask_is_shifted", False) else _ROWS
        calls[name] = {"options": options, "tile": _SHORT_KEY_TILES}
    return calls


def _growing(plants: Mapping[str, Plant]) -> _Calls:
    calls: _Calls = {}
    for name, plant in plants.items():
        options = {**_GROWING, "growth": _GROWTHS.get(name, "far")}
        of_plan = dict(plant.plan)
        options |= {key: of_plan.pop(key) for key in ("mask",) if key in of_plan}
        options |= _CAUSAL if name in _UNDER_A_BOUND else _TRIANGLE if "hidden-" in name else {}
        calls[name] = {"options": options, "tile": _SHORT_KEY_TILES | _IN_TURNS | of_plan}
    return calls


def _of_sm90() -> _Calls:
    # With as many key tiles in each share nothing else orders the shares of two row tiles. Nor is
    # every V there in time for two consumers.
    calls: _Calls = {
        name: {"options": _EVEN_SHARES if "share" in name or name == "no-is-yes" else {}}
        for name in PLANTS_SM90
    }
    for name, tile in _TILES.items():
        calls[name]["tile"] = tile
    return calls


def _paged(plants: Mapping[str, Plant], tile: dict[str, Any], options: dict[str, Any]) -> _Calls:
    return _calls(plants, tile, options=options, is_paged=True)


_WITH_LARGE_SCORES: _Calls = {name: {"options": _SHORT | more} for name, more in _LARGE.items()}
_WITH_MAX_SCORE = _calls(PLANTS_MAX_SCORE, {}, options=_MAX_SCORE)
for _name in ("max-score-of-one-head", "max-score-of-padding"):
    _WITH_MAX_SCORE[_name]["options"] = _MAX_SCORE | _ONE_QUERY
# By kernel, the calls of bugs that not every call shows.
CALLS: Mapping[str, _Calls] = {
    _WMMA: {
        **_drawn(_WMMA, {"one-stage-unordered": 6, "one-ahead": 8}),
        **_calls(PLANTS_VARLEN, {}, options=_PACKED, is_packed=True),
        "no-clamp": {"options": _PACKED | {"overrun": 1000}, "is_packed": True},
        **_calls(pages.OF_WMMA, {}, options=pages.CALL, is_paged=True),
        **_calls(pieces.OF_WALK, split.STREAM_TILE, options=split.STREAM_CASE, is_paged=True),
        **_calls(pieces.OF_PACKED, pieces.PACKED_TILE, options=pieces.PACKED_CALL, is_packed=True),
        **_calls(pieces.PLANTS_FLOAT8_WMMA, pieces.TILE, options=pieces.CALL, is_paged=True),
        **_calls(trees.OF_WMMA, {}, options=trees.CALL, is_paged=True),
        **_paged(trees.PLANTS_PACKED_TREES, {"block_m": 64}, trees.PACKED_CALL),
        **_WITH_LARGE_SCORES,
        **_calls(PLANTS_TOTALS, _CHUNKS, options={"seqlen_q": 70, "seqlen_k": 333}),
        **_WITH_MAX_SCORE,
        **_calls(PLANTS_SINKS, {}, options=_SINKS),
    },
    _SM90: {
        **_of_sm90(),
        **_calls(
            PLANTS_CAUSAL_SM90,
            _TWO_CONSUMERS | _IN_TURNS,
            options=_EVEN_SHARES | {"causal": "lower_right"},
        ),
        **_growing(PLANTS_OLD_MAX_SM90),
        **_masked(PLANTS_MASK_SM90),
        **_drawn(_SM90, _CASES_SM90),
        **_WITH_LARGE_SCORES,
        **_calls(PLANTS_OLD_LARGE_MAX_SM90, _SHORT_KEY_TILES, options=_LEVEL),
        "large-max-of-first-part": {"options": _LEVEL | _CAUSAL, "tile": _SHORT_KEY_TILES},
        **_calls(split.PLANTS_SPLIT, _SHARED_BY_BLOCKS, options=_SPLIT),
        **_calls(together.PLANTS_TOGETHER, together.TILE, options=together.CALL),
        **_calls(split.PLANTS_STREAM, split.STREAM_TILE, options=split.STREAM_CASE, is_paged=True),
        **_calls(PLANTS_VARLEN_SM90, _SHORT_KEY_TILES | _IN_TURNS, options=_PACKED, is_packed=True),
        **_calls(pages.OF_SM90, _SHORT_KEY_TILES, options=pages.CALL, is_paged=True),
        **_calls(pages.PLANTS_PAGES_WIDE, _SHORT_KEY_TILES, options=pages.WIDE_CALL, is_paged=True),
        **_calls(trees.OF_SM90, trees.TILE, options=trees.CALL, is_paged=True),
        **_paged(trees.PLANTS_PACKED_TREES, trees.TILE, trees.PACKED_CALL),
        **_paged(trees.PLANTS_PACKED_TREES_SM90, trees.TILE, trees.FOLDED_CALL),
        **{name: call for group in float8.GROUPS for name, call in _paged(*group).items()},
        **_calls(folded.PLANTS_FOLDED_SM90, folded.TILE, options=folded.CALL, is_packed=True),
        **_calls(packed.PLANTS_PACKED, packed.TILE, options=packed.CALL, is_packed=True),
        **_WITH_MAX_SCORE,
        **_calls(PLANTS_MAX_SCORE_SM90, _IN_SLICES, options=_IN_SECOND_SLICE),
        **_calls(PLANTS_SINKS, {}, options=_SINKS),
        **_calls(PLANTS_SINKS_SPLIT, _SHARED_BY_BLOCKS, options=_SPLIT | {"sinks": True}),
    },
    DKDV_KERNEL: {
        **_calls(PLANTS_BWD_ROLES_SM90, TILE_OF_ROLES, options=BACKWARD_ROLES),
        **_calls(one.PLANTS_BWD_ONE_SM90, TILE_OF_ONE, options=BACKWARD | {"seqlen_q": 200}),
        **_calls(
            one_with.PLANTS_BWD_ONE_MASKED_SM90, TILE_OF_ONE, options=BACKWARD | {"mask": "bool"}
        ),
        **_calls(one.PLANTS_BWD_ORDER_SM90, TILE_OF_ONE, options=BACKWARD_WINDOW),
        **_calls(
            one_with.PLANTS_BWD_ONE_CAPPED_SM90, TILE_OF_ONE, options=BACKWARD | {"softcap": 2.0}
        ),
        **_calls(one_with.PLANTS_BWD_ANY_ORDER_SM90, TILE_IN_ANY_ORDER, options=BACKWARD_WINDOW),
        **_calls(one.PLANTS_BWD_SHARED_SM90, TILE_OF_SHARED, options=BACKWARD_SHARED | _CAUSAL),
        **_calls(PLANTS_BWD_PACKED_SM90, TILE_OF_DKDV, options=BACKWARD_PACKED, is_packed=True),
        **_calls(PLANTS_BWD_PADDED_SM90, TILE_OF_DKDV, options=BACKWARD_PADDED),
        **_calls(PLANTS_BWD_MASKED_SM90, TILE_OF_DKDV | {"block_n": 64}, options=BACKWARD_MASKED),
    },
    DMASK_KERNEL: _calls(
        {name: PLANTS_BWD_MASK_SM90[name] for name in OF_ROWS},
        {"num_shares": 3, "sums_rows": True},
        options=BACKWARD | {"mask": "additive"},
    ),
    DQ_KERNEL: {
        **_calls(
            PLANTS_BWD_PACKED_DQ_SM90,
            TILE_OF_DQ | {"block_m": 128},
            options=BACKWARD_PACKED,
            is_packed=True,
        ),
        **_calls(PLANTS_BWD_MASKED_DQ_SM90, TILE_OF_DQ, options=BACKWARD_MASKED),
    },
}
# The call of all other bugs of a kernel; of those of a forward kernel, isolate's own.
DEFAULTS: Mapping[str, dict[str, Any]] = {
    DMASK_KERNEL: {"options": MASK_GRADIENT},
    DQ_KERNEL: {"options": BACKWARD, "tile": TILE_OF_DQ},
    DKDV_KERNEL: {"options": BACKWARD, "tile": TILE_OF_DKDV},
}
