"""This module plants bugs in how the Hopper kernel's softmax does without a key tile's maxima, in
what it does where that fails, and in how it takes a row tile's first key tile in two parts."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_KERNEL = "fwd_sm90/attn_fwd_sm90.cuh"
_CONSUMER = "fwd_sm90/consumer_sm90.cuh"
_SOFTMAX = "tile/softmax.cuh"
_VOTE = "named_barrier_any(STORE_BARRIER + c.index, 128, outgrown)"
_MAX_LOG2 = """\
    const float max_log2[2] = {c.softmax.row_max[0] * c.scale_log2,
                               c.softmax.row_max[1] * c.scale_log2};"""

_MASKED = {"mask": "bool"}

PLANTS_OLD_MAX_SM90 = by_name(
    Plant(
        name="outgrown-unmasked",
        title="scores that are asked for again are not masked again",
        file=_KERNEL,
        find="      if constexpr (MASK_KIND != 0) c.mask.add_to(scores, p, c.warp_row, n_block);",
        replace="",
        caught_by="wrong-result",
        plan=_MASKED,
    ),
    Plant(
        name="outgrown-mask-overwritten",
        title="the next mask tile is fetched before it is known that this one is not needed again",
        file=_KERNEL,
        find="if constexpr (MASK_KIND != 0 && !TRIES_OLD_MAX) c.mask",
        replace="if constexpr (MASK_KIND != 0) c.mask",
        caught_by="wrong-result",
        or_by=("race", "async-pending"),  # it is fetched once more
        plan=_MASKED,
    ),
    Plant(
        name="hidden-tile-in-one-warp",
        title="warps whose rows see nothing of a key tile leave the others alone with its products",
        file=_CONSUMER,
        find="  return !any_of_warpgroup(c, sees);",
        replace="  return !warp_any(sees);",
        caught_by="deadlock",
        or_by=("wgmma",),
        plan=_MASKED,
    ),
    Plant(
        name="hidden-tile-by-last-key",
        title="a key tile is taken for hidden when a lane's last element hides its key",
        file="fwd_sm90/mask_tile_sm90.cuh",
        find="all &= hides_key(elements.of(i));",
        replace="all = hides_key(elements.of(i));",
        caught_by="wrong-result",
        plan=_MASKED,
    ),
    Plant(
        name="hidden-tile-after-any",
        title="a key tile is passed over as if the one before had been hidden",
        file=_KERNEL,
        find="if (SKIPS_HIDDEN && c.hidden && is_hidden(",
        replace="if (SKIPS_HIDDEN && is_hidden(",
        caught_by="wrong-result",
        plan=_MASKED,
    ),
    Plant(
        name="hidden-tile-of-no-sum",
        title="a key tile of which one row sees something is taken for hidden",
        file=_CONSUMER,
        find="any_of_warpgroup(c, sum[0] + sum[1] != 0.0f);",
        replace="any_of_warpgroup(c, sum[0] != 0.0f);",
        caught_by="wrong-result",
        plan=_MASKED,
    ),
    Plant(
        name="hidden-tile-v-kept",
        title="V's stage of the key tile before a hidden one is not given back",
        file=_CONSUMER,
        find="  release(bar.v_empty, c.v_state());\n  c.mask",
        replace="  \n  c.mask",
        caught_by="deadlock",
        plan=_MASKED,
    ),
    Plant(
        name="hidden-tile-turn-kept",
        title="a consumer that passes over a hidden key tile keeps its turn",
        file=_CONSUMER,
        find="  if (PING_PONG) pass_issue(c);\n  await_key_tile",
        replace="  \n  await_key_tile",
        caught_by="deadlock",
        or_by=("wrong-result",),
        plan=_MASKED,
    ),
    Plant(
        name="hidden-tile-counts",
        title="terms of a key tile that the mask hides count, though they have no maximum",
        file=_KERNEL,
        find="          tile_sum[0] = tile_sum[1] = 0.0f;",
        replace="",
        caught_by="wrong-result",
        plan=_MASKED,
    ),
    Plant(
        name="outgrown-unseen",
        title="terms that are far too large for the old maximum are taken as they are",
        file=_SOFTMAX,
        find="  const bool has_max = !has_large<true>(max_log2);\n"
        "  return (tile_sum[0] > 1024.0f) | (tile_sum[1] > 1024.0f) | !has_max;",
        replace="\n  return has_large<true>(max_log2);",
        caught_by="wrong-result",
    ),
    Plant(
        name="no-max-yet-unseen",
        title="a row that has no maximum yet is taken for one whose maximum is 0",
        file=_KERNEL,
        find=_MAX_LOG2,
        replace="    float max_log2[2];\n    scale_max(c.softmax, c.scale_log2, max_log2);",
        caught_by="wrong-result",
    ),
    Plant(
        name="outgrown-in-one-warp",
        title="warps that need the scores again issue Q K^T without the others of their warpgroup",
        file=_KERNEL,
        find=_VOTE,
        replace="warp_any(outgrown)",
        caught_by="deadlock",
        or_by=("wgmma",),
    ),
    Plant(
        name="outgrown-k-kept",
        title="K's stage is not given back",
        file=_KERNEL,
        find="    release_inputs();\n    if constexpr (MASK_KIND",
        replace="    \n    if constexpr (MASK_KIND",
        caught_by="deadlock",
    ),
    Plant(
        name="outgrown-k-overwritten",
        title="K's stage is given back before the scores are asked for again",
        file=_KERNEL,
        find="  const auto release_inputs = [&] {\n    release(bar.k_empty, c.k_state);",
        replace="  release(bar.k_empty, c.k_state); const auto release_inputs = [&] {\n",
        caught_by="race",
    ),
    Plant(
        name="outgrown-sums-kept",
        title="sums of the terms that were too large are kept",
        file=_KERNEL,
        find="      moved = softmax_step",
        replace="      c.softmax.row_sum[0] += tile_sum[0]; moved = softmax_step",
        caught_by="wrong-result",
    ),
    Plant(
        name="outgrown-no-fence",
        title="no wgmma_fence between the exponentials and the products that overwrite them",
        file=_KERNEL,
        find="      wgmma_fence();\n      issue_scores(",
        replace="\n      issue_scores(",
        caught_by="wgmma",
    ),
    Plant(
        name="outgrown-not-awaited",
        title="the scores that were asked for again are not waited for",
        file=_KERNEL,
        find="      wgmma_commit();\n      wgmma_wait<0>();",
        replace="      wgmma_commit();\n",
        caught_by="wgmma",
    ),
    Plant(
        name="unseen-part-of-the-warp-before",
        title="what the rows of the warp before see of a key tile's second part counts",
        file=_SOFTMAX,
        find="warp_any(window_reaches<16>(p, row_begin, key_begin + BEGIN * 16));",
        replace="warp_any(window_reaches<16>(p, row_begin - 16, key_begin + BEGIN * 16));",
        caught_by="wrong-result",
        plan={"block_n": 128},  # shorter key tiles are taken as one
    ),
    Plant(
        name="unseen-part-kept",
        title="scores of a key tile's second part that no row of a warp sees are taken for P",
        file=_KERNEL,
        find="    if (n >= FIRST_PART && !second.is_seen) wmma_clear(c.probs[n]);",
        replace="",
        caught_by="wrong-result",
        plan={"block_n": 128},  # shorter key tiles are taken as one
    ),
    Plant(
        name="second-part-not-hidden",
        title="of a key tile in two parts, the window hides scores of the first alone",
        file=_SOFTMAX,
        find="    if (is_seen) hide_scores<BEGIN, NUM_FRAGS>(scores, p, row_begin, key_begin);",
        replace="",
        caught_by="wrong-result",
        plan={"block_n": 128},  # shorter key tiles are taken as one
    ),
)
