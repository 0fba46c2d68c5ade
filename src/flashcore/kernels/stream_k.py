"""Tell a launch how the device cuts the keys of all row tiles into ranges, one a block
(tile/stream_k.cuh), whichever kernel it is of: how many ranges, and the memory that blocks hand
their shares over in. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashcore.kernels.fwd_wmma import params
from flashcore.kernels.fwd_wmma.params import AttnParams
from flashcore.problem.folding import as_launched, packed_rows

if TYPE_CHECKING:
    from flashcore.kernels.fwd_wmma.plan import Plan
    from flashcore.problem import Problem

ROWS_OF_GROUP = 64  # that hand over and add up together (tile/shares.cuh)
# Ranges that the device cuts have at least so many bytes of K and V; see splits.MIN_KEY_TILES.
LEAST_BYTES = 64 * 1024
# Pieces of batch-invariant calls have so many bytes of K and V: fewer take longer to hand over and
# to add up, more leave SMs idle.
PIECE_BYTES = 256 * 1024
# SMs of an architecture's GPUs, that there are and may be; of those not listed as many as of any.
MOST_SMS = {90: 144, 100: 160, 120: 192}
# Of blocks, if heads are read side by side: memory is as busy with few less.
_BUSY_BLOCKS = 0.95
# K and V of a call that takes 3 us less, of 9, if the device need not look at all lengths first
# (H200, 2026-11-29: B3 H1 D64 of at most 2048 keys, and B8 H2/1 D64 of 1024).
FEW_BYTES = 8 * 2**20
MOST_TILES = 2**30  # that the device counts in 32 bits
# The weight of a byte of a share when one SM alone adds up. With 64 bytes a thread and load under
# way the 508 KB of B1 H32/1 S1/16384 took some 12 us: 43 KB/us, which latency explains. Now it is
# 128 bytes, so 86 KB/us: the weight is 26 / 86 and something for the arithmetic. With it, and
# 3 us for start and end, the model gives 11.8 us for 4 row tiles of 33 splits; measured: 11.8
# (docs/ladder-decoding.md).
SHARE_WEIGHT = 0.35
# For `explain`.
NOTE = (
    "the keys that there are, of all sequences, are cut into equal parts, one a block, on the "
    "device; see kernels/tile/stream_k.cuh"
)


def key_tile_bytes(block_n: int, head_dim: int, head_dim_v: int, element_bytes: int = 2) -> int:
    """Return the bytes of K and V of a key tile."""
    return block_n * (head_dim + head_dim_v) * element_bytes


def share_row_bytes(head_dim_v: int) -> int:
    """Return the bytes of a row of a share: O and the softmax's state, float32."""
    return (head_dim_v + 2) * 4


def visible_keys(problem: Problem) -> int:
    """Return the number of keys that some query sees; where only the device knows a sequence's
    length, as many as there can be."""
    begin, end = 0, problem.seqlen_k
    if problem.varlen == "none":
        if problem.window_left >= 0:
            begin = max(begin, problem.diag_offset - problem.window_left)
        if problem.window_right >= 0:
            last_query = problem.seqlen_q - 1 + problem.diag_offset
            end = min(end, last_query + problem.window_right + 1)
    return max(0, end - begin)


def least_tiles(plan: Plan) -> int:
    """Return the key tiles of a range at least."""
    return -(-LEAST_BYTES // key_tile_bytes(plan.block_n, plan.head_dim, plan.head_dim_v))


def piece_tiles(plan: Plan) -> int:
    """Return the key tiles of a piece where all have one length."""
    if not plan.batch_invariant:
        return max(1, plan.keys_of_chunk // plan.block_n)
    return max(1, PIECE_BYTES // key_tile_bytes(plan.block_n, plan.head_dim, plan.head_dim_v))


def num_lines(num_heads: int, num_blocks: int) -> int:
    """Return how many heads are read side by side, a divisor of their number: as many as leave
    next to no block without a range."""
    enough = _BUSY_BLOCKS * num_blocks
    divisors = (n for n in range(min(num_heads, num_blocks), 1, -1) if num_heads % n == 0)
    return next((n for n in divisors if num_blocks // n * n >= enough), 1)


def num_pieces(problem: Problem, plan: Plan) -> int:
    """Return into how many ranges the key tiles of all row tiles may be cut, were all sequences as
    long as can be; at most as many as there may be blocks at once."""
    keys = problem.seqlen_k
    if problem.varlen == "none":  # all lengths that share a plan have one grid: backends/growing.py
        keys = 1 << (max(64, keys) - 1).bit_length()
    key_tiles = max(1, -(-keys // plan.block_n))
    ranges = -(-params.grid_size(problem, plan) * key_tiles // least_tiles(plan))
    return min(ranges, MOST_SMS.get(plan.arch, max(MOST_SMS.values())) * plan.min_blocks)


def share_shapes(problem: Problem, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of counters and shares, by field of AttnParams."""
    p = as_launched(problem, plan.folds_heads)
    groups_of_tile = -(-plan.block_m // ROWS_OF_GROUP)
    if plan.has_fixed_pieces:
        pieces = max(1, -(-problem.seqlen_k // (plan.block_n * piece_tiles(plan))))
        rows: tuple[int, ...] = (pieces, p.batch, p.num_heads_q, p.seqlen_q)
        num_groups = params.grid_size(problem, plan) * groups_of_tile
    else:
        num_blocks = num_pieces(problem, plan)
        rows_of_slot = plan.block_m if p.packs_queries else min(plan.block_m, p.seqlen_q)
        rows = (2 * num_blocks, rows_of_slot)
        num_groups = num_blocks * groups_of_tile
    return {
        "split_out": (*rows, plan.out_cols),
        "split_stats": (*rows, 2),
        "tile_counter": (num_groups,),
    }


def set_ranges(argument: AttnParams, problem: Problem, plan: Plan, num_blocks: int) -> None:
    """Write what a launch of so many blocks is told of ranges."""
    launched = as_launched(problem, plan.folds_heads)
    num_heads, num_rows = launched.num_heads_q, launched.seqlen_q
    if problem.packs_queries:  # which are folded by the kernel, and as many as a sequence has
        folded = max(1, plan.folds_heads)
        num_heads, num_rows = num_heads // folded, packed_rows(problem, folded)
    share = min(plan.block_m, num_rows) * share_row_bytes(plan.head_dim_v)
    tile_bytes = key_tile_bytes(plan.block_n, plan.head_dim, plan.head_dim_v)
    lines = num_lines(num_heads, num_blocks)
    argument.num_splits = 1
    argument.num_lines = lines
    argument.heads_of_line = num_heads // lines
    argument.num_ranges = num_blocks // lines
    argument.least_tiles = least_tiles(plan)
    if plan.has_fixed_pieces:
        argument.least_tiles = piece_tiles(plan)
    else:
        argument.adding_up = SHARE_WEIGHT * share / tile_bytes
