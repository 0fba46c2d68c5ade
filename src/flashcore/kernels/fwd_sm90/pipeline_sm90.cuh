// fwd_sm90/pipeline_sm90.cuh - the mbarriers between the producer and the consumers, the place of
// each in the ring of stages, and the barriers among consumers. Under CONVERTS a warpgroup stands
// between the two (fwd_sm90/float8/float8_sm90.cuh), and there are rings before and behind it.
#pragma once

#include "prims_sm90.cuh"

// Of 8-bit tiles that are converted there are more on their way than consumers have: LOAD_STAGES,
// else NUM_STAGES.
constexpr bool CONVERTS = NUM_CONVERTERS > 0;
// 8-bit tiles that are not: rows are few, 8 for each of STRIPS, and each warp makes operands of
// bytes in registers (fwd_sm90/float8/few_rows_sm90.cuh), for WARP_STRIPS of them.
constexpr bool FEW_ROWS = STRIPS > 0;
constexpr int CONVERTING_WARPS = CONVERTS ? NUM_CONVERTERS * 2 : 1;  // share a tile of K, or of V
constexpr int NUM_ROW_GROUPS = FEW_ROWS ? 1 : BLOCK_M / 64;  // each the 64 of a warpgroup
constexpr int NUM_CONSUMERS = NUM_ROW_GROUPS * KEY_SLICES;  // warpgroups
static_assert(KEY_SLICES == 1 || NUM_ROW_GROUPS == 1, "one group of rows shares the keys");
constexpr int NUM_Q_SLOTS = Q_BUFFERS * NUM_ROW_GROUPS;
constexpr int NUM_MERGE_BARRIERS = KEY_SLICES > 1 ? 2 : 0;
constexpr int NUM_BARRIERS =
    2 * NUM_Q_SLOTS + 4 * NUM_STAGES + NUM_MERGE_BARRIERS + (CONVERTS ? 4 * LOAD_STAGES : 0);
constexpr int NUM_THREADS = (1 + NUM_CONSUMERS + NUM_CONVERTERS) * 128;
static_assert(!FLOAT8 || KEY_SLICES == 1, "what converts fills one ring");
static_assert(FEW_ROWS ? FLOAT8 && !CONVERTS && BLOCK_M == 8 * STRIPS : CONVERTS == FLOAT8,
              "8-bit tiles are converted, or shared by the warps of one warpgroup");

// A `full` barrier completes when the bytes announced by the producer have arrived; an `empty` one
// when all consumers have read the buffer.
struct Barriers {
  SmemPtr<uint64_t> q_full, q_empty;                   // one a slot, see q_slot
  SmemPtr<uint64_t> k_full, k_empty, v_full, v_empty;  // one a stage
  SmemPtr<uint64_t> merge_full, merge_empty;           // with KEY_SLICES, see split_sm90.cuh
  // Of what the producer loads: the same as k_full and so on unless CONVERTS.
  SmemPtr<uint64_t> k_load_full, k_load_empty, v_load_full, v_load_empty;
};

FC_DEVICE Barriers barriers(int byte_offset) {
  const auto first = smem_view<uint64_t>(byte_offset, NUM_BARRIERS, "barriers");
  const auto ring = first + 2 * NUM_Q_SLOTS;
  const auto loads = CONVERTS ? ring + (4 * NUM_STAGES + NUM_MERGE_BARRIERS) : ring;
  return {first,
          first + NUM_Q_SLOTS,
          ring,
          ring + NUM_STAGES,
          ring + 2 * NUM_STAGES,
          ring + 3 * NUM_STAGES,
          ring + 4 * NUM_STAGES,
          ring + (4 * NUM_STAGES + 1),
          loads,
          loads + LOAD_STAGES,
          loads + 2 * LOAD_STAGES,
          loads + 3 * LOAD_STAGES};
}

// Must be called by one thread. The counts say how many threads arrive at an `empty` barrier.
FC_DEVICE void init_barriers(const Barriers& bar, int kv_empty_count, int q_empty_count) {
  for (int slot = 0; slot < NUM_Q_SLOTS; ++slot) {
    mbar_init(bar.q_full + slot, 1);
    mbar_init(bar.q_empty + slot, q_empty_count);
  }
  for (int stage = 0; stage < NUM_STAGES; ++stage) {
    mbar_init(bar.k_full + stage, CONVERTS ? CONVERTING_WARPS : 1);
    mbar_init(bar.v_full + stage, CONVERTS ? CONVERTING_WARPS : 1);
    mbar_init(bar.k_empty + stage, kv_empty_count);
    mbar_init(bar.v_empty + stage, kv_empty_count);
  }
  for (int stage = 0; CONVERTS && stage < LOAD_STAGES; ++stage) {
    mbar_init(bar.k_load_full + stage, 1);
    mbar_init(bar.v_load_full + stage, 1);
    mbar_init(bar.k_load_empty + stage, CONVERTING_WARPS);
    mbar_init(bar.v_load_empty + stage, CONVERTING_WARPS);
  }
  if (KEY_SLICES > 1) {
    mbar_init(bar.merge_full, (KEY_SLICES - 1) * 128);
    mbar_init(bar.merge_empty, 128);
  }
  mbar_init_fence();
}

// Which 64 rows of the Q buffers belong to a group of rows of a block's row tile number `turn`; and
// the parity of their phase.
FC_DEVICE int q_slot(int turn, int group) { return turn % Q_BUFFERS * NUM_ROW_GROUPS + group; }
FC_DEVICE int q_parity(int turn) { return turn / Q_BUFFERS % 2; }

// Consumers that share the keys of some rows have a ring of stages each.
constexpr uint32_t STAGES_PER_RING = NUM_STAGES / KEY_SLICES;
static_assert(NUM_STAGES % KEY_SLICES == 0, "the rings are of one size");
static_assert(STAGES_PER_RING >= 2, "a consumer holds one V while it waits for the next");
constexpr uint32_t LOADS_PER_RING = LOAD_STAGES / KEY_SLICES;

// The count of tiles that went through a ring of stages gives the next one's, and the parity of the
// phase in which its `full` barrier completes. A wait for `empty` is for the other parity: a
// fresh barrier counts as completed in phase -1.
template <uint32_t STAGES>
struct RingState {
  int ring = 0;
  uint32_t count = 0;  // unsigned, for short remainders: the next product waits for them

  FC_DEVICE int stage() const {
    return (KEY_SLICES > 1 ? ring * int(STAGES) : 0) + int(count % STAGES);
  }
  FC_DEVICE int parity() const { return int(count / STAGES % 2); }

  // Tells the compiler that all lanes have the same count, once a row tile; else each product may
  // wait for a shuffle, and for a move to a uniform register.
  FC_DEVICE void make_uniform() { count = uint32_t(warp_uniform(int(count))); }
};
using PipelineState = RingState<STAGES_PER_RING>;
using LoadState = RingState<LOADS_PER_RING>;

// A consumer warp is done with the stage.
FC_DEVICE void release(SmemPtr<uint64_t> empty, PipelineState state) {
  if (lane_idx() == 0) mbar_arrive(empty + state.stage());
}

// True where there are registers to spare: nothing but windows and lengths takes some.
constexpr bool IS_PLAIN = !SPLIT_KV && !HAS_SOFTCAP && MASK_KIND == 0;

// Q is released right after its last Q K^T, so that the next Q arrives under softmax, P V and the
// store. To know which is the last takes a register.
constexpr bool RELEASES_Q_EARLY = IS_PLAIN;

// True where a tile's softmax may try old maxima (has_outgrown), or else asks for its scores again.
constexpr bool MAY_TRY_OLD_MAX = LAZY_RESCALE && OLD_MAX_SERVES;

// True where softmax_step asks less: causal calls, and only those that were measured with it. (The
// same change made loops of other text up to 7 % slower or faster: docs/ladder.md.)
constexpr bool ASKS_ONCE = MAY_TRY_OLD_MAX && IS_PLAIN && VARLEN == 0 && HAS_WINDOW_RIGHT &&
                           !HAS_WINDOW_LEFT && HEAD_DIM <= 128;

// The right bound runs through a row tile's first key tile: the warps of its upper rows see nothing
// of the second part. Shorter key tiles are taken as one.
constexpr bool SPLITS_FIRST_TILE = ASKS_ONCE && BLOCK_N > 64;

// True where key tiles that a boolean mask hides are passed over. They come in runs: above a
// triangle, beside a document. So after a hidden one a consumer looks at the mask before it issues
// the next one's products. Whether a tile is hidden it asks of the first one that it visits, and
// then of each HIDDEN_STEP-th: to agree costs a warpgroup a barrier.
//@if gate
constexpr bool SKIPS_HIDDEN = false;
//@else
constexpr bool SKIPS_HIDDEN =
    MASK_KIND == 1 && (HEAD_DIM_V <= 192 || MASK_LOAD_BYTES == 16);  // or registers would spill
//@end
constexpr int HIDDEN_STEP = 4;  // of a consumer's own

enum NamedBarrier {
  ISSUE_BARRIER = 1,                              // + consumer: it may issue products
  STORE_BARRIER = ISSUE_BARRIER + NUM_CONSUMERS,  // + consumer: the warps of a warpgroup
};
