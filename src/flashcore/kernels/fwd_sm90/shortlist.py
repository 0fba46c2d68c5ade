"""List the tiles of the Hopper kernel that are worth trying where time is short.

By what earlier searches and docs/ladder.md found good somewhere, and their neighbours. A wide tile
with few row tiles an SM, a narrow one with many, shared keys for calls that leave SMs idle.
"""

from __future__ import annotations

from typing import Any


def _tile(block_m: int, block_n: int, **others: Any) -> dict[str, Any]:
    defaults = {"num_stages": 2, "min_blocks": 1, "ping_pong": False}
    defaults |= {"key_slices": 1, "q_buffers": 1}
    return {"block_m": block_m, "block_n": block_n, **defaults, **others}


_SHARED_KEYS: dict[str, Any] = {"key_slices": 2, "num_stages": 4}
_PING_PONG: dict[str, Any] = {"ping_pong": True}
_AHEAD: dict[str, Any] = {"q_buffers": 2}
# By the largest head_dim that a list is for.
_BY_HEAD_DIM: dict[int, list[dict[str, Any]]] = {
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


def of_head_dim(head_dim: int) -> list[dict[str, Any]]:
    """Return the list for a head_dim: fields of a plan by name, a tile each."""
    return next(found for most, found in _BY_HEAD_DIM.items() if head_dim <= most)
