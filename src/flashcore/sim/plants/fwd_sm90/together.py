"""This module plants bugs in shares that blocks add up together, and in how a block knows its first
piece ahead; see plants.py (tests/plants/test_sim_plants_split.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

# The call that shows them: two pieces for each of three blocks, of two groups of rows, whose shares
# are large enough that adding up together pays. Two of the blocks leave their first row tile, and
# all wait for the second. Slices are of unequal length.
CALL: dict[str, Any] = {
    "num_heads_q": 1,
    "num_heads_kv": 1,
    "seqlen_q": 165,
    "seqlen_k": 250,
    "head_dim": 32,
    "head_dim_v": 200,
    "spread": 4.0,
}
TILE: dict[str, Any] = {
    "block_m": 128,
    "block_n": 32,
    "num_stages": 2,
    "min_blocks": 1,
    "num_splits": 3,
    "key_slices": 1,
    "ping_pong": False,
}
_FILE = "tile/shares.cuh"
_KERNEL = "fwd_sm90/attn_fwd_sm90.cuh"

PLANTS_TOGETHER = by_name(
    Plant(
        name="together-relaxed",
        title="a share is counted by an atomic that orders nothing",
        file=_FILE,
        find="int seen = gmem_atomic_add_acq_rel(counter, 1) + 1;",
        replace="int seen = gmem_atomic_add(counter, 1) + 1;",
        caught_by="race",
    ),
    Plant(
        name="together-plain-look",
        title="the counter is looked at by a plain load",
        file=_FILE,
        find="    seen = gmem_load_acquire(counter);",
        replace="    seen = gmem_load(GmemPtr<const int32_t>{counter.address});",
        caught_by="race",
    ),
    Plant(
        name="together-told-late",
        title="warps look what there is to add up before that is known",
        file=_FILE,
        find="  sync();  // tells",
        replace="  // tells",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="together-leaves-silently",
        title="a group leaves and does not say so",
        file=_FILE,
        find="gmem_atomic_cas(counter, seen, seen + ONE_LEFT) == seen;",
        replace="true;",
        caught_by="unwritten-output",
        or_by=("counter-left",),
    ),
    Plant(
        name="together-first-slice-of-who-left",
        title="of the groups that have not left the first takes the second slice",
        file=_FILE,
        find="number = departure = gmem_atomic_add(counter + 1, 1);",
        replace="number = 1 + (departure = gmem_atomic_add(counter + 1, 1));",
        caught_by="unwritten-output",
    ),
    Plant(
        name="together-all-are-there",
        title="slices are as small as if no group had left",
        file=_FILE,
        find="    const int num_groups = num_splits - seen / ONE_LEFT;",
        replace="    const int num_groups = num_splits;",
        caught_by="unwritten-output",
        or_by=("counter-left",),
    ),
    Plant(
        name="together-slices-too-short",
        title="slices lack their last strip",
        file=_FILE,
        find="  const int end = min_i(num_parts, (number + 1) * of_group);",
        replace="  const int end = min_i(num_parts, (number + 1) * of_group - 1);",
        caught_by="unwritten-output",
    ),
    Plant(
        name="together-slice-past-the-end",
        title="the last slice is as long as the others",
        file=_FILE,
        find="  const int end = min_i(num_parts, (number + 1) * of_group);",
        replace="  const int end = (number + 1) * of_group;",
        caught_by="double-write",
        or_by=("out-of-bounds", "uninitialized-read", "race"),
    ),
    Plant(
        name="together-reset-early",
        title="the first that has seen all shares puts the counter back",
        file=_FILE,
        find="  if (counts && departure == num_groups - 1) {",
        replace="  if (counts && departure == 0) {",
        caught_by="unwritten-output",
        or_by=("counter-left", "double-write"),
    ),
    Plant(
        name="together-departures-left",
        title="the count of those that have seen all shares is not put back",
        file=_FILE,
        find="    gmem_atomic_add(counter + 1, -num_groups);",
        replace="",
        caught_by="counter-left",
    ),
    Plant(
        name="together-one-counter",
        title="the second counter of a group is the next group's first",
        file=_FILE,
        find="(adds_up_together(p) ? 2 * place : place);",
        replace="(adds_up_together(p) ? place : place);",
        caught_by="unwritten-output",
        or_by=("counter-left", "uninitialized-read", "race", "double-write"),
    ),
    Plant(
        name="together-last-share-again",
        title="lanes that have no share add up the last one",
        file=_FILE,
        find="      if (begin + s * SHARES_OF_WARP + own > last) continue;",
        replace="",
        caught_by="wrong-result",
    ),
    Plant(
        name="together-without-weight",
        title="lanes' sums are added as if their maxima were the same",
        file=_FILE,
        find="  const float factor = exp2_approx((own_max - finite_max) * scale_log2);",
        replace="  const float factor = 1.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="together-lanes-not-added",
        title="half of the lanes' sums are left out",
        file=_FILE,
        find="    sum += shfl_xor(sum, bit);",
        replace="    sum += bit < 8 ? shfl_xor(sum, bit) : 0.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="together-padding-stored",
        title="columns behind head_dim_v are stored, too",
        file=_FILE,
        find="  if (own != 0 || col >= HEAD_DIM_V) return;",
        replace="  if (own != 0) return;",
        caught_by="double-write",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="first-q-not-awaited",
        title="a block's first Q is read before it has arrived",
        file=_KERNEL,
        find="    if (is_known) mbar_wait(bar.q_full + c.q_slot, q_parity(turn));",
        replace="",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
)
