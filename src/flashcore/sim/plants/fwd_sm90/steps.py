"""This module plants bugs in shares that are added up in two steps; see plants.py
(tests/plants/test_sim_plants_split.py)."""

from __future__ import annotations

from typing import Any

from flashcore.compile.plant import Plant, by_name

# The call that shows them: as many shares, of as many rows, as are added up in two steps; most have
# no key.
CALL: dict[str, Any] = {
    "seqlen_q": 70,
    "seqlen_k": 250,
    "head_dim": 32,
    "head_dim_v": 40,
    "spread": 4.0,
}
TILE: dict[str, Any] = {
    "block_m": 64,
    "block_n": 32,
    "num_stages": 2,
    "min_blocks": 1,
    "num_splits": 44,
    "key_slices": 1,
    "ping_pong": False,
}
_FILE = "tile/shares.cuh"

PLANTS_STEPS = by_name(
    Plant(
        name="steps-one-counter",
        title="all shares of a first step are counted together",
        file=_FILE,
        find="const int own = shares.to < 0 ? 0 : 1 + shares.to - p.splits.num_splits;",
        replace="const int own = shares.to < 0 ? 0 : 1;",
        caught_by="uninitialized-read",
        or_by=("race", "double-write", "unwritten-output", "counter-left"),
    ),
    Plant(
        name="steps-last-group-waits",
        title="the last group waits for as many shares as the others have",
        file=_FILE,
        find="min_i(p.splits.shares_at_once, all_splits - first)",
        replace="p.splits.shares_at_once",
        caught_by="unwritten-output",
        or_by=("counter-left",),
    ),
    Plant(
        name="steps-sum-over-share",
        title="the sum of a first step overwrites a share",
        file=_FILE,
        find="partial_row(p, block, shares.to, row[i]);",
        replace="partial_row(p, block, shares.first, row[i]);",
        caught_by="double-write",
        or_by=("race",),
    ),
    Plant(
        name="steps-shares-again",
        title="the second step adds up the first few shares",
        file=_FILE,
        find="{all_splits, p.splits.share_groups, -1};",
        replace="{0, p.splits.share_groups, -1};",
        caught_by="wrong-result",
    ),
    Plant(
        name="steps-without-maxima",
        title="the sum of a first step has no maxima beside it",
        file=_FILE,
        find="      if (col[i] == 0) {",
        replace="      if (col[i] < 0) {",
        caught_by="uninitialized-read",
    ),
    Plant(
        name="steps-first-alone",
        title="what a first step adds up is taken for the result",
        file=_FILE,
        find="    if (IN_STEPS && shares.to >= 0) {",
        replace="    if (IN_STEPS && shares.to >= 1000) {",
        caught_by="double-write",
        or_by=("uninitialized-read",),
    ),
)
