"""Give the tiles of the two backward kernels for Hopper, by rules made from measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flashcore.problem import Problem

# With two consumers: of a consumer's, a producer's and dq's threads up to head_dim 64, and above,
# where dq takes more accumulators. 512 together.
DQ_ROLE_REGISTERS = {False: (200, 40, 72), True: (192, 40, 88)}

# Constants by which headers shared with the forward cut the keys of a tile among blocks and
# warpgroups: here none are.
UNCUT = {"KEY_SLICES": 1, "SPLIT_KV": False, "STREAM_K": False, "FIXED_PIECES": False}


_SMS = 132  # of an H200


def padded_to_16(cols: int) -> int:
    """Return the columns of the fragments that hold so many."""
    return -(-cols // 16) * 16


class BwdTile(NamedTuple):
    """A tile holds the fields of a plan that the problem does not decide."""

    block_m: int
    block_n: int
    num_stages: int
    other_stages: int
    overlaps: bool = True
    early_dp: bool = True
    keeps_p: bool = True


# The tiles that `tiles` below and plan_one.py take, and their neighbours.
SHORTLIST_DQ = (
    BwdTile(192, 64, 4, 3),
    BwdTile(192, 96, 3, 3),
    BwdTile(128, 128, 3, 2),
    BwdTile(128, 96, 3, 2),
    BwdTile(128, 80, 3, 2),
    BwdTile(128, 64, 3, 2),
    BwdTile(128, 64, 2, 1, False),
    BwdTile(128, 48, 2, 1, False),
    BwdTile(64, 64, 4, 3),
    BwdTile(64, 64, 2, 2),
)
SHORTLIST_DKDV = (
    BwdTile(128, 128, 3, 2, False, True, False),
    BwdTile(128, 128, 3, 2, False, False, False),
    BwdTile(128, 128, 2, 2, False, False, False),
    BwdTile(96, 128, 3, 2, False, True, True),
    BwdTile(64, 128, 4, 3, False),
    BwdTile(64, 128, 3, 3, True, False, False),
    BwdTile(64, 128, 3, 2, True, False, False),
    BwdTile(64, 128, 3, 2, False, True, False),
    BwdTile(64, 128, 3, 2, False, False, False),
    BwdTile(64, 64, 3, 3),
    BwdTile(96, 64, 2, 2),
    BwdTile(80, 64, 3, 2),
    BwdTile(64, 64, 2, 2),
    BwdTile(48, 64, 3, 3),
)


def tiles(problem: Problem) -> tuple[BwdTile, BwdTile]:
    """Return the tile of the kernel of dq, and that of the kernel of dk and dv. Measured on an H200
    (2026-11-29, scripts/time_backward.py), 16k tokens, hidden 2048, bfloat16."""
    dim = max(problem.head_dim, problem.head_dim_v)
    is_crowded = problem.softcap != 0.0
    if problem.mask is not None and (problem.softcap != 0.0 or problem.varlen != "none"):
        # The tiles below spill 24 to 168 bytes at some head_dims; not measured on a GPU.
        dq = BwdTile(128, 64, 3, 2) if dim <= 128 else _masked_wide_dq(problem)
        return dq, BwdTile(64, 128, 4, 3, False) if dim <= 64 else _crowded_dkdv(dim)
    if problem.mask is not None:
        return _masked(problem, dim)
    if not is_crowded and problem.varlen == "none" and dim <= 128:
        found = _few(problem, dim)
        if found is not None:
            return found
    if dim <= 64:
        dkdv = (
            BwdTile(64, 128, 4, 3, False)
            if is_crowded
            else BwdTile(128, 128, 3, 2, False, True, False)
        )
        if problem.varlen == "packed" and max(problem.window_left, problem.window_right) >= 0:
            # With three consumers the producer's warps spill 16 bytes; not measured on a GPU.
            return BwdTile(128, 128, 3, 2), dkdv
        return BwdTile(192, 64, 4, 3), dkdv
    if dim <= 128 and is_crowded:
        return BwdTile(128, 64, 3, 2), _crowded_dkdv(dim)
    if dim <= 128 and problem.varlen == "keys" and problem.window_right >= 0:
        # With products that overlap, ptxas spills 8 bytes; not measured on a GPU.
        return BwdTile(128, 64, 3, 2), BwdTile(64, 128, 3, 2, False, True, False)
    if dim <= 128:
        return BwdTile(128, 64, 3, 2), BwdTile(64, 128, 3, 2, True, False, False)
    if dim <= 192:
        return BwdTile(128, 64, 3, 2), BwdTile(64 if is_crowded else 96, 64, 2, 2)
    return BwdTile(128, 64, 2, 1, False), BwdTile(64, 64, 2, 2)


def _few(problem: Problem, dim: int) -> tuple[BwdTile, BwdTile] | None:
    """Return the tiles of a plain call with so few that their number counts, or None. Blocks of
    both kernels run side by side. Where there are SMs for all of them, smaller tiles take more SMs;
    and where there are two blocks an SM, they are better shared out if a bound makes them unequal.
    Where there are a few tiles an SM, dq takes those that leave the fewest SMs idle at the end: 128
    rows take 0.8 of the time of 192."""
    heads_q, heads_kv = problem.batch * problem.num_heads_q, problem.batch * problem.num_heads_kv
    in_192, in_128, in_64 = (heads_q * -(-problem.seqlen_q // rows) for rows in (192, 128, 64))
    is_bounded = max(problem.window_left, problem.window_right) >= 0
    blocks_at_once = 2 * _SMS if is_bounded and problem.seqlen_q > 256 else _SMS
    if in_64 + heads_kv * -(-problem.seqlen_k // 64) <= blocks_at_once:
        if dim <= 64:
            return BwdTile(64, 64, 4, 3), BwdTile(128, 64, 3, 2, False, True, False)
        return BwdTile(64, 64, 3, 2), BwdTile(64, 64, 3, 2, True, False, False)
    if dim <= 64 and 0.8 * -(-in_128 // _SMS) < -(-in_192 // _SMS):
        return BwdTile(128, 64, 4, 3), BwdTile(128, 128, 3, 2, False, True, False)
    return None


def _masked(problem: Problem, dim: int) -> tuple[BwdTile, BwdTile]:
    """Return the tiles with a mask tensor, parts of which take shared memory. Up to head_dim 64 the
    larger tile of dk and dv would spill 56 bytes with a bound; above, products that overlap would
    spill up to 104 with one, and 20 in float16."""
    is_bounded = max(problem.window_left, problem.window_right) >= 0
    if dim <= 64:
        rows = 96 if is_bounded else 128
        return BwdTile(192, 64, 4, 3), BwdTile(rows, 128, 3, 2, False, True, False)
    if dim <= 128:
        overlaps = not is_bounded and problem.dtype == "bfloat16"
        return BwdTile(128, 64, 3, 2), BwdTile(64, 128, 3, 2, overlaps, not overlaps, False)
    if dim <= 192:
        return BwdTile(128, 48, 3, 2), BwdTile(64, 64, 2, 2)
    return _masked_wide_dq(problem), BwdTile(64, 64, 2, 2)


def _masked_wide_dq(problem: Problem) -> BwdTile:
    """Return the tile of dq with a mask tensor where head_dim leaves little shared memory."""
    is_wide = problem.mask is not None and problem.mask.dtype == "float32"
    return BwdTile(128, 32 if is_wide else 48, 2, 1, False)


def _crowded_dkdv(dim: int) -> BwdTile:
    """Return the tile of dk and dv with soft-capping, above head_dim 64. At 256 tiles of 64 rows
    would spill 40 bytes with a mask."""
    return BwdTile(64, 64, 3, 3) if dim <= 128 else BwdTile(64 if dim <= 224 else 48, 64, 2, 2)
