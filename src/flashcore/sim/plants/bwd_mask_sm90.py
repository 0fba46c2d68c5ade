"""Plant bugs of the kernel of an additive mask's gradient for Hopper
(tests/plants/test_sim_plants_bwd_mask_sm90.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_DQ = "bwd_sm90/attn_bwd_dq_sm90.cuh"
_STEPS = "bwd_sm90/bwd_dkdv_steps_sm90.cuh"
_STRIP = "bwd_sm90/key_mask_sm90.cuh"
_KERNEL = "bwd_mask_sm90/attn_bwd_dmask_sm90.cuh"
_PARTS = "bwd_mask_sm90/bwd_dmask_sm90.cuh"

PLANTS_BWD_MASK_SM90 = by_name(
    Plant(
        name="chunk-not-awaited",
        title="a product reads a chunk of columns before it has arrived",
        file=_KERNEL,
        find="    mbar_wait(bar.full + stage_of",
        replace="    if (false) mbar_wait(bar.full + stage_of",
        caught_by="race",
        or_by=("uninitialized-read", "async-pending", "mbarrier", "deadlock"),
    ),
    Plant(
        name="chunk-released-early",
        title="a chunk's stage is released while its product is under way",
        file=_KERNEL,
        find="      wgmma_wait<1>();\n",
        replace="\n",
        caught_by="wgmma",
        or_by=("race",),
    ),
    Plant(
        name="last-dp-not-awaited",
        title="the last chunks of dP are released, and dP is read, while they are under way",
        file=_KERNEL,
        find="  wgmma_wait<0>();\n",
        replace="\n",
        caught_by="wgmma",
        or_by=("race",),
    ),
    Plant(
        name="mask-tile-of-first-head",
        title="the mask of the first head is added to every head's scores",
        file=_KERNEL,
        find="mask_of(p, piece.first.batch_idx, piece.first.head_idx)",
        replace="mask_of(p, piece.first.batch_idx, 0)",
        caught_by="wrong-result",
    ),
    Plant(
        name="sums-kept",
        title="a tile's sum begins with that of the tile before",
        file=_KERNEL,
        find="    clear(c.sums);\n",
        replace="    if (number < num_blocks()) clear(c.sums);\n",
        caught_by="wrong-result",
    ),
    Plant(
        name="empty-rows-added",
        title="NaN that arrives at a row that sees nothing is added",
        file=_KERNEL,
        find="        if (is_empty[row_of_element(i)]) c.dprobs[n].x[i] = 0.0f;",
        replace="        if (false) c.dprobs[n].x[i] = 0.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="delta-of-the-other-row",
        title="a lane's second row has the delta of its first",
        file=_KERNEL,
        find="c.dprobs[n].x[i] - stats.delta[row_of_element(i)];",
        replace="c.dprobs[n].x[i] - stats.delta[0];",
        caught_by="wrong-result",
    ),
    Plant(
        name="last-step-forgotten",
        title="a tile's walk ends one step early",
        file=_PARTS,
        find="    left = piece.end - piece.begin;",
        replace="    left = max_i(0, piece.end - piece.begin - 1);",
        caught_by="wrong-result",
    ),
    Plant(
        name="shares-overlap",
        title="the last step of a share is the first of the next, too",
        file=_PARTS,
        find="  piece.begin = int(int64_t(num_steps) * piece.share / g.num_shares);",
        replace="  piece.begin = max_i(0, num_steps * piece.share / g.num_shares - 1);",
        caught_by="wrong-result",
    ),
    Plant(
        name="one-head-too-many",
        title="a walk goes on to a head behind its last",
        file=_PARTS,
        find="    if (++block.head_idx < end_head) return;",
        replace="    if (++block.head_idx <= end_head) return;",
        caught_by="wrong-result",
        or_by=("out-of-bounds",),
    ),
    Plant(
        name="diagonal-tile-skipped",
        title="the last tile of keys that a tile of queries sees is left out",
        file=_PARTS,
        find="n_block < keys.end;",
        replace="n_block < keys.end - 1;",
        caught_by="wrong-result",
    ),
    Plant(
        name="rows-behind-the-end",
        title="lse and delta are read of rows that there are not",
        file=_PARTS,
        find="    if (row >= p.seqlen_q) continue;\n    const int64_t at = lse_offset",
        replace="\n    const int64_t at = lse_offset",
        caught_by="out-of-bounds",
        or_by=("wrong-result",),
    ),
    Plant(
        name="gradient-read-early",
        title="a warp's part of the gradient is read before all lanes have written theirs",
        file=_PARTS,
        find="  warp_sync();  // orders the writes above before the reads below\n",
        replace="\n",
        caught_by="race",
        or_by=("uninitialized-read",),
    ),
    Plant(
        name="gradient-overwritten",
        title="the mask of the next tile overwrites a gradient that is still read",
        file=_PARTS,
        find="  warp_sync();  // orders the reads before the next tile's mask\n",
        replace="\n",
        caught_by="race",
    ),
    Plant(
        name="warp-sums-read-early",
        title="warps' sums of their rows are added before all of them are there",
        file=_PARTS,
        find="named_barrier_sync(SUMS_BARRIER, NUM_CONSUMERS * 128);  // orders the writes",
        replace="if (false) named_barrier_sync(SUMS_BARRIER, 128);  // orders the writes",
        caught_by="race",
        or_by=("uninitialized-read", "misuse"),
    ),
    Plant(
        name="warp-sums-overwritten",
        title="warps' sums are overwritten by those of the next tile while they are added",
        file=_PARTS,
        find="named_barrier_sync(SUMS_BARRIER, NUM_CONSUMERS * 128);  // orders them",
        replace="if (false) named_barrier_sync(SUMS_BARRIER, 128);  // orders them",
        caught_by="race",
        or_by=("misuse",),
    ),
)
# Bugs that show under a mask that all queries share; the others need one of every query.
OF_ROWS = ("shares-overlap", "warp-sums-read-early", "warp-sums-overwritten")

# Of a mask on its way to the scores of the kernels of dq, and of dk and dv.
PLANTS_BWD_MASKED_DQ_SM90 = by_name(
    Plant(
        name="mask-of-this-tile-again",
        title="the mask of a key tile is fetched again for the next one",
        file=_DQ,
        find="    c.mask.fetch(p, c.warp_row, key_begin / BLOCK_N - 1);",
        replace="    c.mask.fetch(p, c.warp_row, key_begin / BLOCK_N);",
        caught_by="async-pending",
        or_by=("wrong-result",),
    ),
    Plant(
        name="mask-overwritten-by-the-next",
        title="the next key tile's mask is copied over one that lanes still read",
        file=_DQ,
        find="    warp_sync();  // orders every lane's reads before the next copies\n",
        replace="\n",
        caught_by="race",
    ),
    Plant(
        name="mask-of-other-rows",
        title="a warp copies the mask of the rows of the one before it",
        file=_DQ,
        find="      c.mask.fetch(sequence, c.warp_row, own.end - 1);",
        replace="      c.mask.fetch(sequence, c.warp_row / 32 * 32, own.end - 1);",
        caught_by="wrong-result",
    ),
)
PLANTS_BWD_MASKED_SM90 = by_name(
    Plant(
        name="strip-not-awaited",
        title="a mask is read while it is copied",
        file=_STRIP,
        find="    cp_async_wait<0>();\n",
        replace="\n",
        caught_by="async-pending",
        or_by=("race", "uninitialized-read"),
    ),
    Plant(
        name="strip-of-own-copies",
        title="a lane reads what other lanes have copied, unordered",
        file=_STRIP,
        find="    warp_sync();  // orders every lane's arrived copies before the reads\n",
        replace="\n",
        caught_by="race",
        or_by=("uninitialized-read", "async-pending"),
    ),
    Plant(
        name="strip-overwritten",
        title="the next tile's mask is copied over one that lanes still read",
        file=_STEPS,
        find="    warp_sync();  // orders every lane's reads before the next copies\n",
        replace="\n",
        caught_by="race",
    ),
    Plant(
        name="strip-of-this-tile-again",
        title="the mask of a tile of queries is fetched again for the next one",
        file="bwd_sm90/attn_bwd_dkdv_sm90.cuh",
        find="fetch_next(c.mask, p, m_begin + BLOCK_M,",
        replace="fetch_next(c.mask, p, m_begin,",
        caught_by="wrong-result",
    ),
    Plant(
        name="strip-of-the-first-keys",
        title="every warp of a warpgroup copies the mask of the first one's keys",
        file=_STEPS,
        find="KEY_MASK_WARP_ELEMENTS, key_row + warp * 16};",
        replace="KEY_MASK_WARP_ELEMENTS, key_row};",
        caught_by="wrong-result",
    ),
)
