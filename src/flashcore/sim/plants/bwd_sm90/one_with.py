"""Plant bugs of dq in the kernel of dk and dv for Hopper, of what not every call does
(tests/plants/test_sim_plants_bwd_one_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_SUM = "bwd_sm90/bwd_dkdv_dq_sm90.cuh"
_KERNEL = "bwd_sm90/attn_bwd_dkdv_sm90.cuh"

# Where blocks add up dQ in any order.
PLANTS_BWD_ANY_ORDER_SM90 = by_name(
    Plant(
        name="rows-added-twice",
        title="in any order: a part of dQ is added twice",
        file=_SUM,
        find="        bulk_add(own_to, own_from, bytes);",
        replace="        bulk_add(own_to, own_from, bytes); bulk_add(own_to, own_from, bytes);",
        caught_by="wrong-result",
    ),
    Plant(
        name="first-stores-in-any-order",
        title="in any order: the block of the first keys stores over what others have added",
        file=_SUM,
        find="      if (ORDERED && rank == 0) {",
        replace="      if (rank == 0) {",
        caught_by="atomic-order",
    ),
    Plant(
        name="part-added-to-the-next-rows",
        title="in any order: dQ of 64 rows is added to the next 64 rows'",
        file=_SUM,
        find="    const auto to = sums + (int64_t(row / 64) * SUMS_OF_GROUP",
        replace="    const auto to = sums + (int64_t(row / 64 + 1) * SUMS_OF_GROUP",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),
    ),
)
# With a mask, of which every head of a group has its own.
PLANTS_BWD_ONE_MASKED_SM90 = by_name(
    Plant(
        name="mask-of-the-first-head",
        title="all heads of a group get the mask of the first one",
        file=_KERNEL,
        find="c.first_head + (is_last ? 0 : head)",
        replace="c.first_head",
        caught_by="wrong-result",
    ),
    Plant(
        name="mask-walked-up",
        title="the mask of the tile behind is fetched, where the tile before comes next",
        file=_KERNEL,
        find="is_last ? m_begin - BLOCK_M : m_begin;",
        replace="is_last ? m_begin + BLOCK_M : m_begin;",
        caught_by="wrong-result",
        or_by=("async-pending",),  # fetched behind the walk's last tile, too
    ),
    Plant(
        name="mask-of-the-last-tile-kept",
        title="the mask of the walk's last tile is not fetched",
        file=_KERNEL,
        find="fetch_next(c.mask, p, next, next >= end);",
        replace="fetch_next(c.mask, p, next, next > end);",
        caught_by="wrong-result",
    ),
)
# With soft-capping.
PLANTS_BWD_ONE_CAPPED_SM90 = by_name(
    Plant(
        name="slope-left-out",
        title="dS is not multiplied by the slope of soft-capping",
        file=_KERNEL,
        find="(HAS_SOFTCAP ? c.capped_probs : c.probs)[n]",
        replace="c.probs[n]",
        caught_by="wrong-result",
    ),
)
