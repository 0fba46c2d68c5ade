"""List the stages that isolate runs, in order: of a forward kernel one for each debug gate, and the
kernel; of the backward kernels one for each tensor."""

from __future__ import annotations

import dataclasses

from flashcore.kernels.bwd_sm90 import stages as stages_bwd_sm90
from flashcore.kernels.bwd_sm90.plan import DKDV_KERNEL, DQ_KERNEL
from flashcore.kernels.fwd_sm90 import plan as plan_sm90
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
        "chunk after the other (tile/totals.cuh)",
    ),
)

_SUSPECTS_SM90 = {
    "qk": "the boxes of Q and K and their mbarriers (bytes, parity, stage), the WGMMA descriptors "
    "and their advance over column chunks, the fence, commit and wait around the product",
    "softmax": "the scale, masks and windows, which key tiles need no mask, the running max, the "
    "rescale of the sum, which lanes share a row",
    "pv": "V's boxes, mbarriers and descriptor, P as operand A, what is touched while a product is "
    "under way, the swizzle of O",
    "tile": "the rescale of O and where it stands, the final normalisation, the lse",
    "full": "what the gates switch off: the rescale of O, the lazy one above all, scores that are "
    "asked for once more, the warpgroups' turns (ping-pong), the keys that they share, and the key "
    "tiles that they pass over",
}
_STAGES_SM90 = tuple(
    dataclasses.replace(stage, suspects=_SUSPECTS_SM90[stage.name])
    for stage in STAGES
    if stage.name in _SUSPECTS_SM90
)

# Where an alarm can come from besides the stages.
_SCHEDULE = {
    "schedule": "tile/schedule*.cuh, tile/sequence.cuh: which row tiles a block takes, which "
    "sequence each is of, which keys it sees, and the counter that tiles are drawn from"
}
_OUTSIDE = _SCHEDULE | {
    "load": "tile/copy.cuh: bounds, strides and the order of copies, waits and barriers",
    "store": "store_output and tile/copy.cuh: which rows and columns exist, who "
    "writes them, and whether somebody takes every row tile",
}
_OUTSIDE_SM90 = _SCHEDULE | {
    "setup": "the initialisation of the mbarriers and its fence, the registers of the roles",
    "load": "produce: which stage, which parity, how many bytes, and who gave the stage back",
    "store": "store_output: the swizzle of O, proxy fence and barrier before its store by TMA, "
    "who waits for that store, and whether somebody takes every row tile; shares of the keys and "
    "how they are added up",
}


_BACKWARD = stages_bwd_sm90.STAGES  # isolate runs all of the kernels
_STAGES_OF = {
    plan_sm90.KERNEL: _STAGES_SM90,
    DQ_KERNEL: _BACKWARD,
    DKDV_KERNEL: _BACKWARD,
}
_OUTSIDE_OF = {
    plan_sm90.KERNEL: _OUTSIDE_SM90,
    DQ_KERNEL: stages_bwd_sm90.OUTSIDE,
    DKDV_KERNEL: stages_bwd_sm90.OUTSIDE,
}


def stages_of(kernel: str) -> tuple[Stage, ...]:
    """Return the stages of a kernel, in order."""
    return _STAGES_OF.get(kernel, STAGES)


def suspects_of(kernel: str, name: str) -> str | None:
    """Return where to look when a stage, or a phase outside of the stages, is the first wrong
    one."""
    stages = {stage.name: stage.suspects for stage in stages_of(kernel)}
    return (stages | _OUTSIDE_OF.get(kernel, _OUTSIDE)).get(name)
