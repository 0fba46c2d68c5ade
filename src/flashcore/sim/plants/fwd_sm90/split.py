"""This module plants bugs in the code for keys that are split over blocks; see plants.py
(tests/plants/test_sim_plants_split.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_SPLIT = "fwd_sm90/split_sm90.cuh"

_ALL = (
    Plant(
        name="split-relaxed",
        title="shares are counted by an atomic that orders nothing",
        file=_SPLIT,
        find="gmem_atomic_add_acq_rel(counter, 1)",
        replace="gmem_atomic_add(counter, 1)",
        caught_by="race",
    ),
    Plant(
        name="split-no-barrier",
        title="a share is counted when one warp has written its rows of it",
        file=_SPLIT,
        find="  named_barrier_sync(barrier, 128);  // orders all",
        replace="  // orders all",
        caught_by="race",
    ),
    Plant(
        name="split-arrival-not-awaited",
        title="warps look whether theirs was the last share before that is known",
        file=_SPLIT,
        find="  named_barrier_sync(barrier, 128);  // hands on",
        replace="  // hands on",
        caught_by="race",
        or_by=("uninitialized-read",),  # in a block's first row tile
    ),
    Plant(
        name="split-last-too-early",
        title="the last share but one is taken for the last",
        file=_SPLIT,
        find="gmem_atomic_add_acq_rel(counter, 1) == p.splits.num_splits - 1;",
        replace="gmem_atomic_add_acq_rel(counter, 1) == p.splits.num_splits - 2;",
        caught_by="uninitialized-read",
    ),
    Plant(
        name="split-never-last",
        title="no share is taken for the last",
        file=_SPLIT,
        find="gmem_atomic_add_acq_rel(counter, 1) == p.splits.num_splits - 1;",
        replace="gmem_atomic_add_acq_rel(counter, 1) == p.splits.num_splits;",
        caught_by="unwritten-output",
    ),
    Plant(
        name="split-counter-left",
        title="the counter is not put back for the next launch",
        file=_SPLIT,
        find="    if (last) gmem_atomic_add(counter, -p.splits.num_splits);",
        replace="",
        caught_by="counter-left",
    ),
    Plant(
        name="split-one-counter",
        title="the row tiles of a head share a counter",
        file=_SPLIT,
        find="const int row_tile = head * p.num_m_blocks + block.m_begin / BLOCK_M;",
        replace="const int row_tile = head * p.num_m_blocks;",
        caught_by="uninitialized-read",
        or_by=("unwritten-output", "race"),
    ),
    Plant(
        name="split-share-dropped",
        title="the first share does not count",
        file=_SPLIT,
        find="        const float weight = exp2_approx(",
        replace="        const float weight = begin + s == 0 ? 0.0f : exp2_approx(",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-without-weight",
        title="shares are added as if their maxima were the same",
        file=_SPLIT,
        find="exp2_approx((stats[s][i].row_max - finite_max) * scale_log2);",
        replace="1.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-sums-not-rescaled",
        title="a later share's larger maximum does not change the sums so far",
        file=_SPLIT,
        find="      const float factor = exp2_approx((old_max - finite_max) * scale_log2);",
        replace="      const float factor = 1.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-last-share-again",
        title="the last share is added again for those that there are not",
        file=_SPLIT,
        find="        if (begin + s >= p.splits.num_splits) continue;",
        replace="",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-gap",
        title="key tiles that do not divide evenly are in no piece",
        file=_SPLIT,
        find="(block.split < one_more ? 1 : 0)}",
        replace="0}",
        caught_by="wrong-result",
    ),
    Plant(
        name="split-rows-past-the-end",
        title="rows that do not exist have a share, too",
        file=_SPLIT,
        find="    if (row >= p.seqlen_q) continue;",
        replace="",
        caught_by="double-write",  # by the next head
        or_by=("out-of-bounds",),
    ),
)

PLANTS_SPLIT = by_name(*_ALL)
