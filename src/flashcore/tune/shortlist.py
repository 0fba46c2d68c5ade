"""List the tiles worth trying where time is short: a list by head_dim, instead of all that is
legal.

By what earlier searches and docs/ladder.md found good somewhere, and their neighbours. A wide tile
with few row tiles an SM, a narrow one with many, shared keys for calls that leave SMs idle.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flashcore.kernels.fwd_sm90.plan import Sm90Plan, with_o_fitted
from flashcore.kernels.fwd_wmma.plan import Plan
from flashcore.kernels.limits import blocks_that_fit
from flashcore.selection.space import is_legal, may_avoid_spills, tiles


def _tile(block_m: int, block_n: int, **others: Any) -> dict[str, Any]:
    defaults = {"num_stages": 2, "min_blocks": 1, "ping_pong": False}
    defaults |= {"key_slices": 1, "q_buffers": 1}
    return {"block_m": block_m, "block_n": block_n, **defaults, **others}


_SHARED_KEYS: dict[str, Any] = {"key_slices": 2, "num_stages": 4}
_PING_PONG: dict[str, Any] = {"ping_pong": True}
_AHEAD: dict[str, Any] = {"q_buffers": 2}
# By the largest head_dim that a list is for.
_SM90: dict[int, list[dict[str, Any]]] = {
    64: [
        _tile(64, 128, **_SHARED_KEYS),
        _tile(64, 64, key_slices=3, num_stages=6),
        _tile(64, 64, key_slices=3, num_stages=9),
        _tile(64, 64, min_blocks=3, num_stages=3),
        _tile(64, 64, min_blocks=3, num_stages=3, **_AHEAD),
        _tile(64, 64, min_blocks=2, num_stages=3),
        _tile(64, 128, min_blocks=2),
        _tile(64, 128, min_blocks=2, **_AHEAD),
        _tile(128, 64),
        _tile(128, 128),
        _tile(128, 128, **_PING_PONG),
        _tile(128, 128, **_PING_PONG, **_AHEAD),
        _tile(192, 128, **_PING_PONG),
        _tile(192, 128, num_stages=3, **_PING_PONG),
        _tile(192, 128, num_stages=3, **_PING_PONG, **_AHEAD),
    ],
    96: [
        _tile(64, 64, **_SHARED_KEYS),
        _tile(64, 64, min_blocks=3),
        _tile(64, 64, min_blocks=2),
        _tile(128, 64, **_PING_PONG),
        _tile(128, 96, **_PING_PONG),
        _tile(128, 128, **_PING_PONG),
        _tile(128, 128, **_PING_PONG, **_AHEAD),
        _tile(128, 128),
        _tile(192, 96, **_PING_PONG),
        _tile(192, 112, **_PING_PONG),
        _tile(192, 112, **_PING_PONG, **_AHEAD),
    ],
    128: [
        _tile(64, 64, **_SHARED_KEYS),
        _tile(64, 80, **_SHARED_KEYS),
        _tile(64, 64, min_blocks=2),
        _tile(128, 64, **_PING_PONG),
        _tile(128, 64, **_PING_PONG, **_AHEAD),
        _tile(128, 96, **_PING_PONG),
        _tile(128, 128, **_PING_PONG),
        _tile(128, 128, **_PING_PONG, **_AHEAD),
        _tile(128, 128),
        _tile(192, 80, **_PING_PONG),
        _tile(192, 80),
    ],
    192: [
        _tile(64, 32, **_SHARED_KEYS),
        _tile(64, 48, min_blocks=2),
        _tile(64, 64),
        _tile(64, 64, **_AHEAD),
        _tile(64, 96),
        _tile(128, 64, **_PING_PONG),
        _tile(128, 64, **_PING_PONG, **_AHEAD),
        _tile(128, 80, **_PING_PONG),
        _tile(128, 96, **_PING_PONG),
        _tile(128, 96),
    ],
    256: [
        _tile(64, 48),
        _tile(64, 64),
        _tile(64, 64, **_AHEAD),
        _tile(64, 80),
        _tile(128, 48, **_PING_PONG),
        _tile(128, 64, **_PING_PONG),
        _tile(128, 64),
        _tile(128, 48),
        _tile(64, 48, num_stages=3),
    ],
}


def shortlist(base: Plan) -> list[Plan]:
    """Return `base` first, then the plans worth trying with its problem; fields that the list does
    not name keep `base`'s values. For the portable kernel the list has all sizes of tiles."""
    if not isinstance(base, Sm90Plan):
        return tiles(base)
    dim = max(base.head_dim, base.head_dim_v)
    listed = next(found for most, found in _SM90.items() if dim <= most)
    plans: dict[Plan, None] = {base: None}
    for tile in listed:
        plan = with_o_fitted(dataclasses.replace(base, **tile))
        if _fits(plan) and may_avoid_spills(plan):
            plans[plan] = None
    return list(plans)


def _fits(plan: Sm90Plan) -> bool:
    """Return whether a plan is legal and an SM has room for as many blocks as it has registers
    for."""
    return is_legal(plan) and plan.min_blocks <= blocks_that_fit(plan.smem_bytes, plan.arch)
