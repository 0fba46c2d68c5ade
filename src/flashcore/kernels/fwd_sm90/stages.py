"""List the stages by which `isolate` takes the Hopper kernel apart: those of the portable one
(fwd_wmma/stages.py), with which it shares the functions of kernels/tile/, but for `pv_serial`."""

from __future__ import annotations

import dataclasses

from flashcore.kernels.fwd_wmma import stages
from flashcore.kernels.fwd_wmma.stages import SCHEDULE

_SUSPECTS = {
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
STAGES = tuple(
    dataclasses.replace(stage, suspects=_SUSPECTS[stage.name])
    for stage in stages.STAGES
    if stage.name in _SUSPECTS
)
OUTSIDE = SCHEDULE | {
    "setup": "the initialisation of the mbarriers and its fence, the registers of the roles",
    "load": "produce: which stage, which parity, how many bytes, and who gave the stage back",
    "store": "store_output: the swizzle of O, proxy fence and barrier before its store by TMA, "
    "who waits for that store, and whether somebody takes every row tile; shares of the keys and "
    "how they are added up",
}
PHASES = stages.SHARED_PHASES | {
    "attn_fwd_sm90": "setup",
    "init_barriers": "setup",
    "issue_scores": "qk",
    "issue_output": "pv",
    "last_output": "pv",
    "merge_slices": "store",
    "clear_rows_of_nobody": "setup",
    "produce": "load",
    "load_k": "load",
    "load_v": "load",
}
