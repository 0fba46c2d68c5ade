"""This module plants bugs in what the Hopper kernel does under a right bound: row tiles drawn from
a counter, and key tiles that a consumer passes over because none of its rows sees them."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_KERNEL = "fwd_sm90/attn_fwd_sm90.cuh"
_CONSUMER = "fwd_sm90/consumer_sm90.cuh"
_SCHEDULE = "fwd_sm90/schedule_sm90.cuh"

PLANTS_CAUSAL_SM90 = by_name(
    Plant(
        name="draws-left",
        title="the counter of row tiles is not put back for the next launch",
        file=_SCHEDULE,
        find="gmem_atomic_add(p.tile_counter, -(drawn + 1));",
        replace=";",
        caught_by="counter-left",
    ),
    Plant(
        name="first-tiles-drawn-again",
        title="draws count from the first row tile on, though every block starts with one",
        file=_SCHEDULE,
        find="    number = num_blocks() + drawn;",
        replace="    number = drawn;",
        caught_by="double-write",
    ),
    Plant(
        name="passed-over-unawaited",
        title="a key tile that is passed over is given back before it is there",
        file=_CONSUMER,
        find="""\
  mbar_wait(bar.k_full + c.k_state.stage(), c.k_state.parity());
  mbar_wait(bar.v_full + c.k_state.stage(), c.k_state.parity());
  warp_sync();""",
        replace="\n\n  warp_sync();",
        caught_by="mbarrier",
        or_by=("race", "wgmma", "wrong-result"),
        plan={"block_m": 192, "block_n": 32, "ping_pong": False},  # several at once
    ),
    Plant(
        name="passed-over-kept",
        title="V of a key tile that is passed over is not given back",
        file=_CONSUMER,
        find="  release(bar.v_empty, c.k_state);",
        replace="",
        caught_by="deadlock",
    ),
    Plant(
        name="passed-over-turn",
        title="a consumer that passes over a key tile keeps its turn",
        file=_KERNEL,
        find="        if (PING_PONG && n_block < keys.end - 1) pass_issue(c);",
        replace="",
        caught_by="deadlock",
        plan={"block_m": 192, "block_n": 32},  # a second one gets no turn
    ),
    Plant(
        name="passed-over-too-many",
        title="what a consumer's first 32 rows see counts for its 64",
        file="tile/band.cuh",
        find="own = key_tiles<ROWS>(p, row_begin);",
        replace="own = key_tiles<ROWS / 2>(p, row_begin);",
        caught_by="wrong-result",
    ),
)
