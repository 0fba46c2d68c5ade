// fwd_sm90/layout_sm90.cuh - what one launch of the Hopper kernel is told, and where in shared
// memory what lies. Mirrored by kernels/fwd_sm90/params.py and kernels/fwd_sm90/plan.py.
#pragma once

#include "prims.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "tile/smem_tile.cuh"
#include "fwd_sm90/mask_tile_sm90.cuh"
#include "fwd_sm90/pipeline_sm90.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "fwd_sm90/split_sm90.cuh"

FC_DEVICE constexpr int common_divisor(int a, int b) {
  return b == 0 ? a : common_divisor(b, a % b);
}

// Of a key tile, as far as it lies in one page.
constexpr int BOX_ROWS = PAGED ? common_divisor(BLOCK_N, PAGE_SIZE) : BLOCK_N;

template <bool FIRST, class A, class B>
struct ChoiceOf {
  using Type = A;
};
template <class A, class B>
struct ChoiceOf<false, A, B> {
  using Type = B;
};
template <bool FIRST, class A, class B>
using Choice = typename ChoiceOf<FIRST, A, B>::Type;

struct AttnSm90Params {
  TensorMap q_map;  // boxes of 64 rows x CHUNK columns of q
  TensorMap k_map;  // boxes of BOX_ROWS rows x CHUNK columns of k, or, WHOLE_ROWS, all columns
  TensorMap v_map;  // the same of v
  TensorMap o_map;  // boxes of 64 rows x CHUNK columns of out
  TileSchedule schedule;
  AttnParams attn;
};

constexpr int ROWS_OF_GROUP = FEW_ROWS ? 8 * STRIPS : 64;  // that a warpgroup computes
using QGroup = SmemTile<ROWS_OF_GROUP, HEAD_DIM>;
using TileElement = Choice<FEW_ROWS, CacheElement, MathElement>;
constexpr int TILE_CHUNK = FEW_ROWS ? LOAD_CHUNK : CHUNK;
// Under WHOLE_ROWS a box has all columns of its rows: of K in groups of 8, as products take rows
// that are equally far apart; of V it is a group, as it may end after any row.
constexpr int K_GROUP = WHOLE_ROWS ? 8 : BLOCK_N;
constexpr int V_GROUP = WHOLE_ROWS ? BOX_ROWS : BLOCK_N;
using KTile = SmemTile<BLOCK_N, HEAD_DIM, TileElement, TILE_CHUNK, K_GROUP>;
using VTile = SmemTile<BLOCK_N, HEAD_DIM_V, TileElement, TILE_CHUNK, V_GROUP>;
// As the producer loads them: the same, or, under CONVERTS, bytes that are still to be converted.
using KLoad = SmemTile<BLOCK_N, HEAD_DIM, CacheElement, LOAD_CHUNK, K_GROUP>;
using VLoad = SmemTile<BLOCK_N, HEAD_DIM_V, CacheElement, LOAD_CHUNK, V_GROUP>;
static_assert(!FEW_ROWS || NUM_Q_SLOTS * QGroup::BYTES % 1024 == 0, "tiles begin with a pattern");
static_assert(KLoad::ELEMENTS == KTile::ELEMENTS && VLoad::ELEMENTS == VTile::ELEMENTS, "alike");
constexpr int QK_CHUNKS = KTile::CHUNKS;
constexpr int V_CHUNKS = VTile::CHUNKS;
constexpr int KEY_FRAGS = BLOCK_N / 16;
constexpr int Q_FRAGS = (HEAD_DIM + 15) / 16;
constexpr int OUT_FRAGS = (HEAD_DIM_V + 15) / 16;  // the last chunk's other columns are padding
// Each warp's results under FEW_ROWS: rows of O, and their maxima and sums.
constexpr int ROW_FLOATS = OUT_FRAGS * 16 + 4;  // 4 for banks
constexpr int WARP_FLOATS = 8 * WARP_STRIPS * (ROW_FLOATS + 2);

constexpr int O_CHUNKS = (V_CHUNKS + O_PARTS - 1) / O_PARTS;  // of each part but maybe the last
using OGroup = SmemTile<64, O_CHUNKS * CHUNK>;
// Else O leaves by global memory.
constexpr int NUM_O_GROUPS = SPLIT_KV || FEW_ROWS ? 0 : NUM_ROW_GROUPS;

// O leaves through a buffer of its own, so that the next Q need not wait for it: all at once, or in
// O_PARTS parts one after another where the whole would not fit beside the stages.
constexpr int K_OFFSET = NUM_Q_SLOTS * QGroup::BYTES;
constexpr int V_OFFSET = K_OFFSET + NUM_STAGES * KTile::BYTES;
constexpr int O_OFFSET = V_OFFSET + NUM_STAGES * VTile::BYTES;
constexpr int LOADS_OFFSET = O_OFFSET + NUM_O_GROUPS * OGroup::BYTES;
constexpr int K_LOAD_OFFSET = CONVERTS ? LOADS_OFFSET : K_OFFSET;
constexpr int V_LOAD_OFFSET = CONVERTS ? LOADS_OFFSET + LOAD_STAGES * KLoad::BYTES : V_OFFSET;
constexpr int MERGE_OFFSET =
    LOADS_OFFSET + (CONVERTS ? LOAD_STAGES * (KLoad::BYTES + VLoad::BYTES) : 0);
constexpr int MERGE_FLOATS =
    FEW_ROWS ? 4 * WARP_FLOATS : (KEY_SLICES - 1) * SLICE_FLOATS<OUT_FRAGS>;
constexpr int MASK_OFFSET = MERGE_OFFSET + MERGE_FLOATS * 4;
constexpr int MASK_ELEMENTS = MASK_KIND == 0 ? 0 : NUM_CONSUMERS * 4 * MASK_WARP_ELEMENTS;
constexpr int BARRIERS_OFFSET = MASK_OFFSET + MASK_ELEMENTS * MASK_ELEMENT_BYTES;
constexpr int COORDS_OFFSET = BARRIERS_OFFSET + NUM_BARRIERS * 8;
constexpr int FEED_OFFSET = COORDS_OFFSET + COORD_SLOTS * COORD_INTS * 4;
// Packed row tiles are dealt out, unless each block has a range of its own.
constexpr bool HAS_FEED = PACKED && !STREAM_K;
constexpr int ARRIVAL_OFFSET = FEED_OFFSET + (HAS_FEED ? FEED_BYTES : 0);
constexpr int ENDS_OFFSET = ARRIVAL_OFFSET + ARRIVAL_BYTES;
constexpr int NUM_ENDS = CONVERTS ? 2 * LOAD_STAGES : 0;
static_assert(SMEM_BYTES == ENDS_OFFSET + NUM_ENDS * 4,
              "the plan and the kernel disagree on shared memory");

struct Buffers {
  QGroup q;  // one a slot, see q_slot
  KTile k;   // one a stage
  VTile v;
  OGroup o;  // one a group of rows
  SmemPtr<float> merge;     // slices of keys of the same rows, or what warps have of FEW_ROWS
  SmemPtr<MaskElement> mask;  // of each consumer warp, see fwd_sm90/mask_tile_sm90.cuh
  SmemPtr<int32_t> coords;  // of the row tiles at hand; they come with Q
  Feed feed;                // from which the producer has them, where they are dealt out
  SmemPtr<int32_t> arrival;  // see hand_over_partial
  KLoad k_loads;  // what the producer loads: k and v unless CONVERTS
  VLoad v_loads;
  SmemPtr<int32_t> ends;  // under CONVERTS: whether a stage of K, or V, is none, but the end
};
