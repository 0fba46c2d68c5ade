"""This module plants bugs in the kernels that merge two results and their gradients; see plants.py
(tests/kernels/test_merge_kernels.py)."""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_ROWS = "merge/merge_rows.cuh"
_FORWARD = "merge/merge_results.cuh"
_BACKWARD = "merge/merge_results_backward.cuh"

PLANTS_MERGE = by_name(
    Plant(
        name="merge-row-past-the-end",
        title="lanes behind the last row store",
        file=_FORWARD,
        find="  if (!at.exists) return;\n",
        replace="\n",
        caught_by="double-write",
    ),
    Plant(
        name="merge-every-lane-writes-lse",
        title="each lane of a row stores its lse",
        file=_FORWARD,
        find="if (at.col == 0) gmem_store",
        replace="gmem_store",
        caught_by="double-write",
    ),
    Plant(
        name="merge-empty-side-counts",
        title="what lies in a row that sees nothing is multiplied by 0",
        file=_ROWS,
        find="x[i] = has ? x[i] : 0.0f;",
        replace="x[i] = x[i];",
        caught_by="wrong-result",
    ),
    Plant(
        name="merge-shares-swapped",
        title="the smaller side gets the larger share",
        file=_ROWS,
        find="exp2_approx(-ahead",
        replace="exp2_approx(+ahead",
        caught_by="wrong-result",
    ),
    Plant(
        name="merge-head-of-rows",
        title="a row's head is taken modulo the rows of a head",
        file=_ROWS,
        find="% p.num_heads",
        replace="% p.rows_of_head",
        caught_by="out-of-bounds",
    ),
)
PLANTS_MERGE_BACKWARD = by_name(
    Plant(
        name="merge-lanes-left-out",
        title="the sum of a row begins with half of its lanes",
        file=_BACKWARD,
        find="lanes = LANES / 2;",
        replace="lanes = LANES / 4;",
        caught_by="wrong-result",
    ),
    Plant(
        name="merge-leaves-before-the-sum",
        title="lanes behind the last row leave before the others add up",
        file=_BACKWARD,
        find="  float difference = 0.0f;",
        replace="  if (!at.exists) return; float difference = 0.0f;",
        caught_by="divergence",
    ),
    Plant(
        name="merge-dlse-forgotten",
        title="the gradient that arrives through lse is left out",
        file=_BACKWARD,
        find="fma_rn(shares.b, difference, dlse)",
        replace="fma_rn(shares.b, difference, 0.0f)",
        caught_by="wrong-result",
    ),
)
