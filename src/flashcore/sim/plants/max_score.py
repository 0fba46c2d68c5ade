"""This module plants bugs in how both kernels find the largest score of each head."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_KERNEL = "fwd_sm90/attn_fwd_sm90.cuh"
_MAX_SCORE = "tile/max_score.cuh"

PLANTS_MAX_SCORE = by_name(
    Plant(
        name="max-score-stored",
        title="the largest score is stored, not raised by an atomic",
        file=_MAX_SCORE,
        find="  gmem_atomic_max(max_score_of(p, block, row), ",
        replace="  gmem_store(max_score_of(p, block, row), ",
        caught_by="race",
    ),
    Plant(
        name="max-score-of-padding",
        title="rows behind the last query count, with folded heads for a head that follows",
        file=_MAX_SCORE,
        find="    if (lane_idx() % 4 != 0 || !is_row(p, row)) continue;",
        replace="    if (lane_idx() % 4 != 0) continue;",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="max-score-of-one-head",
        title="folded heads count as the first of them",
        file=_MAX_SCORE,
        find="  return p.max_score + (head * (p.seqlen_q / p.num_queries) + row / p.num_queries);",
        replace="  return p.max_score + head * (p.seqlen_q / p.num_queries);",
        caught_by="wrong-result",
    ),
)

PLANTS_MAX_SCORE_SM90 = by_name(
    Plant(
        name="max-score-of-first-slice",
        title="of warpgroups that share keys only the one that adds up tells its largest score",
        file=_KERNEL,
        find="    if (RETURNS_MAX_SCORE) raise_max_score(",
        replace="    if (RETURNS_MAX_SCORE && slice == 0) raise_max_score(",
        caught_by="wrong-result",
    ),
)
