"""This module has planted bugs that show with some tiles, schedules, lengths or scores alone: what
`verify` draws must reach each of them (tests/plants/test_planted_bugs.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_WMMA = "fwd_wmma/attn_fwd_wmma.cuh"
_SM90 = "fwd_sm90/attn_fwd_sm90.cuh"
_CONSUMER = "fwd_sm90/consumer_sm90.cuh"
_BAND = "tile/band.cuh"
_SOFTMAX = "tile/softmax.cuh"

PLANTS_SCHEDULES_SM90 = by_name(
    Plant(
        name="passed-over-unsynced",
        title="lanes that pass over a key tile do not wait for each other before it is given back",
        file=_CONSUMER,
        find="  warp_sync();  // or the next phase could pass a lane that still waits",
        replace="  // or the next phase could pass a lane that still waits",
        caught_by="mbarrier",
        or_by=("race", "deadlock"),
    ),
    Plant(
        name="passed-over-turn-too-many",
        title="a consumer that passes over a row tile's first key tile gives a turn for it",
        file=_SM90,
        find="        if (PING_PONG && n_block < keys.end - 1) pass_issue(c);",
        replace="        if (PING_PONG) pass_issue(c);",
        caught_by="deadlock",
        or_by=("named-barrier",),
    ),
    Plant(
        name="outgrown-one-group-early",
        title="the wait for the scores that were asked for again leaves one group under way",
        file=_SM90,
        find="      wgmma_commit();\n      wgmma_wait<0>();",
        replace="      wgmma_commit();\n      wgmma_wait<1>();",
        caught_by="wgmma",
    ),
    Plant(
        name="sum-of-the-neighbour",
        title="a row's sum gets the terms of the lane's other row",
        file=_SM90,
        find="      c.softmax.row_sum[1] += tile_sum[1];",
        replace="      c.softmax.row_sum[1] += tile_sum[0];",
        caught_by="wrong-result",
    ),
    Plant(
        name="turns-of-two",
        title="turns go round among two consumers, however many there are",
        file=_CONSUMER,
        find="named_barrier_arrive(ISSUE_BARRIER + (c.index + 1) % NUM_CONSUMERS, 256);",
        replace="named_barrier_arrive(ISSUE_BARRIER + (c.index + 1) % 2, 256);",
        caught_by="deadlock",
        or_by=("named-barrier",),
    ),
    Plant(
        name="unseen-q-kept",
        title="a consumer whose rows see no key does not give Q back",
        file=_SM90,
        find="    if (!RELEASES_Q_EARLY || !sees_keys) {",
        replace="    if (!RELEASES_Q_EARLY) {",
        caught_by="deadlock",
    ),
    Plant(
        name="ring-of-all-stages",
        title="the parity of a stage is counted as if one ring had all of them",
        file="fwd_sm90/pipeline_sm90.cuh",
        find="return int(count / STAGES % 2); }",
        replace="return int(count / NUM_STAGES % 2); }",
        caught_by="deadlock",
        or_by=("mbarrier", "race"),
    ),
    Plant(
        name="third-share-unseen",
        title="the third share's maximum does not count",
        file="fwd_sm90/split_sm90.cuh",
        find="      softmax.row_max[r] = max_f(softmax.row_max[r], their_max);",
        replace="      if (s < 2) softmax.row_max[r] = max_f(softmax.row_max[r], their_max);",
        caught_by="wrong-result",
    ),
    Plant(
        name="second-part-alone",
        title="a maximum that rises twice in a key tile rescales the output by the second rise",
        file=_SOFTMAX,
        find="rescale[r] = moved ? rescale[r] * factor[r] : factor[r];",
        replace="rescale[r] = factor[r];",
        caught_by="wrong-result",
    ),
    Plant(
        name="first-part-kept",
        title="terms of a key tile's first part stay relative to the maximum before its second",
        file=_SOFTMAX,
        find="      for (int i = 0; i < 8; ++i) scores[n].x[i] *= factor[row_of_element(i)];",
        replace="      ;",
        caught_by="wrong-result",
    ),
    Plant(
        name="unmasked-too-far-right",
        title="a key tile whose last key one row may not see counts as one without a mask",
        file=_BAND,
        find="end = min_i(end, last_column(first) + 1);",
        replace="end = min_i(end, last_column(first) + 2);",
        caught_by="wrong-result",
    ),
    Plant(
        name="unmasked-too-far-left",
        title="a key tile that a window begins in counts as one without a mask",
        file=_BAND,
        find="tiles.begin = min_i(tiles.end, (begin + SIZE - 1) / SIZE);",
        replace="tiles.begin = min_i(tiles.end, begin / SIZE);",
        caught_by="wrong-result",
    ),
    Plant(
        name="last-key-alone",
        title="a key tile of which a row tile sees one key is left out",
        file=_BAND,
        find="last_column(min_i(last, num_lines() - 1)) + 1);",
        replace="last_column(min_i(last, num_lines() - 1)));",
        caught_by="wrong-result",
    ),
    Plant(
        name="folded-as-rows",
        title="a row of folded heads has the bounds of its number, not of its query",
        file="tile/folded_rows.cuh",
        find="return FOLDED ? row % p.num_queries : row;",
        replace="return row;",
        caught_by="wrong-result",
    ),
)

PLANTS_SCHEDULES = by_name(
    Plant(
        name="one-stage-unordered",
        title="with one stage, its copy starts while other warps still read it",
        file=_WMMA,
        find="      block_sync();  // orders the last step's reads",
        replace="      // orders the last step's reads",
        caught_by="race",
        or_by=("async-pending",),
    ),
    Plant(
        name="one-ahead",
        title="copies are one key tile ahead, whatever the number of stages",
        file=_WMMA,
        find="if (NUM_STAGES > 1) load_keys(n_block + NUM_STAGES - 1);",
        replace="if (NUM_STAGES > 1) load_keys(n_block + 1);",
        caught_by="race",
        or_by=("async-pending", "wrong-result", "uninitialized-read"),
    ),
)
