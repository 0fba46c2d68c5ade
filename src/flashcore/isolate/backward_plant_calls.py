"""Hold the calls and tiles that show planted bugs of the backward kernels (isolate/registry.py)."""

from __future__ import annotations

from typing import Any

# Two heads of a group, rows that see nothing, keys that a warpgroup passes over, and more tiles of
# rows and of keys than the simulator has blocks.
BACKWARD: dict[str, Any] = {
    "batch": 2,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "seqlen_q": 170,
    "seqlen_k": 150,
    "head_dim": 32,
    "head_dim_v": 32,
    "dtype": "bfloat16",
    "causal": "lower_right",
}
BACKWARD_ROLES = BACKWARD | {"seqlen_q": 110, "head_dim": 136, "head_dim_v": 136}
# Two warpgroups of rows and of keys, of which some sequences fill one; rows behind the last one.
BACKWARD_PACKED: dict[str, Any] = {
    "lengths_q": (70, 5, 30),
    "lengths_k": (40, 130, 90),
    "tail": 70,
    "num_heads_q": 4,
    "num_heads_kv": 2,
    "head_dim": 32,
    "head_dim_v": 32,
    "dtype": "bfloat16",
    "causal": "lower_right",
}
# The last queries would see keys behind a sequence's last one, were there any.
BACKWARD_PADDED = BACKWARD | {
    "batch": 3,
    "num_heads_q": 2,
    "num_heads_kv": 1,
    "seqlen_q": 70,
    "causal": "none",
    "window": (-1, 5),
    "lengths_k": (40, 150, 97),
}
# Consumers share dq.
BACKWARD_SHARED = BACKWARD | {
    "seqlen_q": 200, "head_dim": 104, "head_dim_v": 16, "causal": "none",
}  # fmt: skip
BACKWARD_MASKED = BACKWARD | {"mask": "additive", "causal": "none"}
# Rows of a mask that begin anywhere, so that a lane writes other elements than it reads.
MASK_GRADIENT = BACKWARD | {
    "mask": "additive", "causal": "upper_left", "seqlen_k": 141, "seed": 1, "dtype": "float16",
}  # fmt: skip
TILE_OF_DQ = {"block_m": 64, "block_n": 32, "num_stages": 3, "other_stages": 2}
TILE_OF_DKDV = {"block_m": 32, "block_n": 128, "num_stages": 3, "other_stages": 2}
TILE_OF_DKDV |= {"overlaps": False, "early_dp": True, "keeps_p": False}
TILE_OF_ONE = TILE_OF_DKDV | {"block_m": 64, "overlaps": True, "also_dq": True}
TILE_OF_SHARED = TILE_OF_ONE | {"early_dp": False, "ds_stages": 2}
TILE_OF_ROLES = {"block_m": 32, "block_n": 64, "num_stages": 2, "other_stages": 2}
