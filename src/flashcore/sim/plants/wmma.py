"""Planted bugs are text replacements on the real kernel, so that the checks are checked.

Each is a mistake that someone made or could make. The simulator, or the comparison with the float64
oracle, must find every one of them with every seed (tests/plants/test_sim_plants.py), and
`flashcore isolate --plant NAME` shows how that looks.
"""

from __future__ import annotations

from flashcore.compile.plant import Plant, by_name

_KERNEL = "fwd_wmma/attn_fwd_wmma.cuh"
_PV_LOOP = """\
#pragma unroll
  for (int n = 0; n < KEY_FRAGS; ++n) {
    WmmaA<Element> p_frag;
    wmma_accum_to_a(p_frag, probs[n]);
#pragma unroll
    for (int d = 0; d < OUT_FRAGS; ++d) {
      WmmaBRow<Element> v_frag;
      wmma_load_b_row(v_frag, v_smem + (n * 16 * V_STRIDE + d * 16), V_STRIDE);
      wmma_mma(out[d], p_frag, v_frag);
    }
  }
"""
_PV_LOOP_HEAD = """\
  for (int n = 0; n < KEY_FRAGS; ++n) {
    WmmaA<Element> p_frag;
    wmma_accum_to_a(p_frag, probs[n]);
"""
_ARRIVAL_BARRIER = "    block_sync();  // orders every thread's arrived copies"

# The fault of the code that this project began with: every warp multiplies P by its share of the
# keys, for all rows, and adds its part of the product to U in shared memory by atomics. One string
# a kernel line.
_PV_ATOMIC = (
    "  constexpr int P_STRIDE = smem_stride(BLOCK_N), U_STRIDE = OUT_FRAGS * 16;"
    ' const auto p_smem = smem_view<Element>(SMEM_BYTES, BLOCK_M * P_STRIDE, "p_smem");'
    " const auto u_smem = smem_view<float>(SMEM_BYTES + BLOCK_M * P_STRIDE * 2, BLOCK_M * U_STRIDE,"
    ' "u_smem");',
    "  for (int i = 0; i < 8; ++i) {"
    " const int m = warp_idx() * 16 + accum_row(lane_idx(), i), c = accum_col(lane_idx(), i);"
    " for (int n = 0; n < KEY_FRAGS; ++n)"
    " smem_store(p_smem + (m * P_STRIDE + n * 16 + c), from_float<Element>(probs[n].x[i]));"
    " for (int d = 0; d < OUT_FRAGS; ++d)"
    " smem_store(u_smem + (m * U_STRIDE + d * 16 + c), out[d].x[i]); } block_sync();",
    "  for (int n = warp_idx(); n < KEY_FRAGS; n += NUM_WARPS) {"
    " for (int strip = 0; strip < BLOCK_M; strip += 16) {",
    "    WmmaA<Element> p_frag;"
    " wmma_load_a(p_frag, p_smem + (strip * P_STRIDE + n * 16), P_STRIDE);",
    "    for (int d = 0; d < OUT_FRAGS; ++d) {",
    "      WmmaBRow<Element> v_frag;",
    "      wmma_load_b_row(v_frag, v_smem + (n * 16 * V_STRIDE + d * 16), V_STRIDE);",
    "      WmmaAccum part; wmma_fill(part, 0.0f); wmma_mma(part, p_frag, v_frag);",
    "      for (int i = 0; i < 8; ++i) smem_atomic_add(u_smem + ((strip + accum_row(lane_idx(), i))"
    " * U_STRIDE + d * 16 + accum_col(lane_idx(), i)), part.x[i]);",
    "    } } } block_sync();",
    "  for (int d = 0; d < OUT_FRAGS; ++d) for (int i = 0; i < 8; ++i)"
    " out[d].x[i] = smem_load(u_smem + ((warp_idx() * 16 + accum_row(lane_idx(), i)) * U_STRIDE"
    " + d * 16 + accum_col(lane_idx(), i)));",
)

_ALL = (
    Plant(
        name="pv-atomic",
        title="P@V split over the keys, the parts added by atomics from several warps",
        file=_KERNEL,
        find=_PV_LOOP,
        replace="\n".join(_PV_ATOMIC) + "\n",
        caught_by="atomic-order",
        extra_smem_bytes=192 * 1024,
    ),
    Plant(
        name="accum-map",
        title="softmax takes the accumulator's elements for those of other rows",
        file="tile/softmax.cuh",
        find="return i % 4 / 2; }",
        replace="return i / 4; }",
        caught_by="wrong-result",
    ),
    Plant(
        name="k-overlap",
        title="P@V split over the keys in two halves that share 16 keys",
        file=_KERNEL,
        find=_PV_LOOP_HEAD,
        replace="""\
  for (int step = 0; step <= KEY_FRAGS; ++step) {
    const int n = max_i(0, step < KEY_FRAGS / 2 ? step : step - 1); WmmaA<Element> p_frag;
    wmma_accum_to_a(p_frag, probs[n]);
""",
        caught_by="wrong-result",
    ),
    Plant(
        name="k-gap",
        title="P@V split over the keys in two halves with 16 keys between them",
        file=_KERNEL,
        find=_PV_LOOP_HEAD,
        replace="""\
  for (int step = 0; step < KEY_FRAGS - 1; ++step) {
    const int n = step < KEY_FRAGS / 2 ? step : step + 1; WmmaA<Element> p_frag;
    wmma_accum_to_a(p_frag, probs[n]);
""",
        caught_by="wrong-result",
    ),
    Plant(
        name="no-barrier",
        title="no barrier between the copies' arrival and the first read of K",
        file=_KERNEL,
        find=_ARRIVAL_BARRIER,
        replace="    // orders every thread's arrived copies",
        caught_by="race",
    ),
    Plant(
        name="tail-oob",
        title="rows past the sequence's end are stored",
        file="tile/copy.cuh",
        find="if (row < num_valid_rows) {",
        replace="if (row < num_valid_rows + 1) {",
        caught_by="out-of-bounds",
    ),
    Plant(
        name="uninit-smem",
        title="the last rows of a tile are not loaded",
        file="tile/copy.cuh",
        find="row < ROWS; row += ROWS_PER_PASS",
        replace="row < ROWS - ROWS_PER_PASS; row += ROWS_PER_PASS",
        caught_by="uninitialized-read",
    ),
    Plant(
        name="deadlock",
        title="one warp leaves before the others' barrier",
        file=_KERNEL,
        find=_ARRIVAL_BARRIER,
        replace="    if (warp_idx() == NUM_WARPS - 1) return; block_sync();"
        "  // orders every thread's arrived copies",
        caught_by="deadlock",
    ),
)

PLANTS = by_name(*_ALL)
