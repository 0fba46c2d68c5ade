"""List the stages by which `isolate` takes the portable kernel apart, one for each debug gate and
the kernel itself, and to which of them its functions belong."""

from __future__ import annotations

from flashcore.kernels.stage import Stage

STAGES: tuple[Stage, ...] = (
    Stage(
        "qk",
        "qk",
        "S = Q@K^T",
        "raw scores",
        "the copies of Q and K to shared memory and their strides, the barrier before they are "
        "read, the Q and K fragments, the accumulator element map",
    ),
    Stage(
        "softmax",
        "softmax",
        "online softmax",
        "P, running max and running sum after every key tile",
        "the scale, masks and windows, the running max, the rescale of the sum, which lanes share "
        "a row",
    ),
    Stage(
        "pv",
        "pv",
        "P@V",
        "P@V for given P; with P = 1/seqlen_k all output rows must be identical",
        "who owns an output element (several warps adding to one?), the split of the keys (overlap "
        "or gap), the accumulator-to-A-fragment map, V's tile and stride, the store of the output",
    ),
    Stage(
        "tile",
        "tile",
        "one key tile",
        "attention over the first key tile only: nothing is rescaled, one pipeline stage",
        "the rescale of O and where it stands, the final normalisation, the lse",
    ),
    Stage(
        "pv_serial",
        "pv_serial",
        "P@V in warp 0",
        "the whole attention, with P@V of all warps done by one",
        "what happens between key tiles: the rescale of O, the double buffering of K and V",
    ),
    Stage(
        "full",
        None,
        "whole kernel",
        "output and lse",
        "what the gates replace: the split of P@V over warps, and the sums of very many keys, a "
        "chunk after the other (fwd_wmma/totals_wmma.cuh)",
    ),
)

# Where an alarm can come from besides the stages.
SCHEDULE = {
    "schedule": "tile/schedule*.cuh, tile/sequence.cuh: which row tiles a block takes, which "
    "sequence each is of, which keys it sees, and the counter that tiles are drawn from"
}
OUTSIDE = SCHEDULE | {
    "load": "tile/copy.cuh: bounds, strides and the order of copies, waits and barriers",
    "store": "store_output and tile/copy.cuh: which rows and columns exist, who "
    "writes them, and whether somebody takes every row tile",
}

# The phase of a function: of those that the forward kernels share (kernels/tile/), and of
# the portable kernel's own. "load" and "store" are not stages of their own: every gate runs them.
SHARED_PHASES = {
    "mask_scores": "softmax",
    "strip_needs_mask": "softmax",
    "VisibleColumns": "softmax",
    "contain": "softmax",
    "lane_max": "softmax",
    "exponentiate": "softmax",
    "raise_max": "softmax",
    "is_far_above": "softmax",
    "rescale_output": "pv",
    "scale_max": "softmax",
    "subtract_large_max": "softmax",
    "apply_softcap": "softmax",
    "capped_exactly": "softmax",
    "softmax_step": "softmax",
    "quad_max": "softmax",
    "load_keys": "load",
    "store_output": "store",
    "max_score_of": "store",
    "raise_max_score": "store",
    "raise_max_score_of": "store",
    "finish_softmax": "store",
    "natural_lse": "store",
    "sink_of": "store",
    "join_sink": "store",
    "quad_sum": "store",
}
PHASES = SHARED_PHASES | {
    "compute_scores": "qk",
    "accumulate_output": "pv",
    "gate_accumulate_serially": "pv_serial",
    "load_tile": "load",
    "zero_padding": "load",
    "store_rows": "store",
}
