"""This module plants bugs in how both kernels keep their digits: with scores that are large, and in
sums over very many keys."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_KERNEL = "fwd_wmma/attn_fwd_wmma.cuh"
_SOFTMAX = "tile/softmax.cuh"
_TOTALS = "fwd_wmma/totals_wmma.cuh"

PLANTS_LARGE_SCORES = by_name(
    Plant(
        name="large-max-product",
        title="the rounded product of a large maximum is subtracted, as of any other",
        file=_SOFTMAX,
        find="  if (!warp_any(has_large<BRANCHLESS>(max_log2))) return false;",
        replace="  if (true) return false;",
        caught_by="wrong-result",
    ),
    Plant(
        name="large-max-twice",
        title="a large maximum is subtracted from the scores, and then its product again",
        file=_SOFTMAX,
        find="    max_log2[r] = large ? 0.0f : max_log2[r];",
        replace="",
        caught_by="wrong-result",
    ),
)

PLANTS_OLD_LARGE_MAX_SM90 = by_name(
    Plant(
        name="large-max-left",
        title="a large maximum is not seen where terms are taken relative to an old one",
        file=_SOFTMAX,
        find="  const bool has_max = !has_large<true>(max_log2);",
        replace="  const bool has_max = (max_log2[0] > NEG_INF) & (max_log2[1] > NEG_INF);",
        caught_by="wrong-result",
    ),
    Plant(
        name="large-max-of-first-part",
        title="a large maximum of a tile's first part is not taken from the second's scores",
        file=_SOFTMAX,
        find="warp_any(is_far(max, state, scale_log2) | warp_has_large)",
        replace="warp_any(is_far(max, state, scale_log2))",
        caught_by="wrong-result",
    ),
)

PLANTS_TOTALS = by_name(
    Plant(
        name="totals-not-rescaled",
        title="totals stay relative to the maximum that they had",
        file=_TOTALS,
        find="      factor[r] = exp2_approx((old_max - finite_max) * scale_log2);",
        replace="      factor[r] = 1.0f;",
        caught_by="wrong-result",
    ),
    Plant(
        name="totals-counted-twice",
        title="O goes on with what was added to the totals",
        file=_KERNEL,
        find="      for (int d = 0; d < OUT_FRAGS; ++d) wmma_fill(out[d], 0.0f);\n    }",
        replace="      for (int d = 0; d < OUT_FRAGS; ++d) wmma_fill(out[d], out[d].x[0]);\n    }",
        caught_by="wrong-result",
    ),
    Plant(
        name="totals-lost",
        title="only the last chunk of keys is in the result",
        file=_KERNEL,
        find="  totals.end(state, out, scale_log2);",
        replace="",
        caught_by="wrong-result",
    ),
)

PLANTS_NUMERICS = PLANTS_LARGE_SCORES | PLANTS_OLD_LARGE_MAX_SM90 | PLANTS_TOTALS
