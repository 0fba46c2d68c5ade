"""The stages that isolate runs, in order: one for each debug gate of the kernel, and the kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the isolation. `gate` is the kernel's debug gate, None for the kernel itself;
    `suspects` is where to look when this stage is the first wrong one."""

    name: str
    gate: str | None
    title: str
    checks: str
    suspects: str


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
        "or gap), the accumulator-to-A-fragment map, V's tile and stride",
    ),
    Stage(
        "tile",
        "tile",
        "one key tile",
        "attention over the first key tile only: nothing is rescaled, one pipeline stage",
        "the final normalisation, the lse, the store of the output",
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
        "what the gates replace: the split of P@V over warps",
    ),
)
