// bwd_sm90/bwd_dkdv_sm90.cuh - the kernel of dK and dV: where in shared memory what lies, and who
// loads it. Mirrored by kernels/bwd_sm90/plan.py.
#pragma once

#include "prims_sm90.cuh"
#include "tile/band.cuh"
#include "tile/mask.cuh"
#include "tile/params.cuh"
#include "tile/schedule.cuh"
#include "tile/schedule_varlen.cuh"
#include "tile/sequence.cuh"
#include "tile/smem_tile.cuh"
#include "fwd_sm90/schedule_sm90.cuh"
#include "bwd_sm90/bwd_sm90.cuh"
#include "bwd_sm90/key_mask_sm90.cuh"

constexpr int NUM_KEY_GROUPS = BLOCK_N / 64;  // of 64 keys
// Warpgroups: one a group of keys, or two that share its products
// (bwd_sm90/bwd_dkdv_roles_sm90.cuh).
constexpr int NUM_CONSUMERS = NUM_KEY_GROUPS * (HAS_ROLES ? 2 : 1);
static_assert(!HAS_ROLES || NUM_KEY_GROUPS == 1, "two warpgroups share 64 keys");
constexpr int QUERY_FRAGS = BLOCK_M / 16;
constexpr bool DQ_SHARED = ALSO_DQ && !DQ_ROLE;  // consumers compute dQ, a part of it each
// Exponentials end before products are waited for, or ptxas waits first, and nothing runs beside
// them. (With four products a tile, and at head_dim 96 under a bound, that is slower.)
constexpr bool HOLDS_PROBS = ALSO_DQ && !EARLY_DP && !(IS_BOUNDED && QK_FRAGS > 4);
// A window hides keys by a branch that ends before the exponentials begin, so that ptxas issues dP
// amid these. A branch around the exponentials would hold dP back until they are done. (At head_dim
// 96 the former is 1 % slower, and up to 64 it spills 64 bytes and more. The slopes of soft-capping
// would have to be kept from before the branch.)
constexpr bool HIDES_APART = DQ_SHARED && IS_BOUNDED && !HAS_SOFTCAP;
// Slopes take the registers of what would be loaded ahead.
constexpr bool LSE_AHEAD = !HAS_SOFTCAP || IS_BOUNDED;
// In float16 the difference of dP and delta might overflow. (With four products a tile pairs are
// not faster, and a rounding more.)
//@if gate ds dk dq
constexpr bool BY_PAIRS = false;  // a gate reads dS in float32
//@else
constexpr bool BY_PAIRS = ALSO_DQ && !KEEPS_P && !IS_FLOAT16<Element>;
//@end

// Of what is added up of dQ: 64 rows, or the columns of one of the consumers that share it.
constexpr int NUM_PARTS = !ALSO_DQ ? 0 : DQ_SHARED ? NUM_CONSUMERS : (BLOCK_M + 63) / 64;
// Two threads of the producer's warpgroup add: every other tile or, where a tile has more rows, 64
// of them each. An add, until it is complete, and its count take a tile's time, some 3000 clocks.
constexpr int ADDERS_OF_PART = BLOCK_M <= 64 ? 2 : 1;  // which take turns
static_assert(NUM_PARTS <= 2, "where adders take no turns each adds one part of a tile");
constexpr int NUM_PLACES = ALSO_DQ ? 2 : 0;  // of parts on their way out
constexpr int NUM_SUMS_FULL = NUM_PARTS * ADDERS_OF_PART;
// With dQ the query tiles of a key tile are walked over from the last one on. So of two key tiles
// side by side that start together the first one comes to a tile of queries first, or both at once,
// whatever hides keys: none waits long for its turn to add. At each query tile come the heads of a
// group: if each head's tiles were walked over by themselves, a block would wait at every head for
// the block before, whose walk is longer under a causal mask.

// The query tile number `i` of a walk over some.
FC_DEVICE int walked_tile(const Range& tiles, int i) {
  return ALSO_DQ ? tiles.end - 1 - i : tiles.begin + i;
}

// The parameters as the sequence of a key tile sees them.
FC_DEVICE decltype(auto) own_params(const AttnParams& p, const BlockCoord& block) {
  return sequence_params<VARLEN, true>(p, block);
}

// --- shared memory -------------------------------------------------------------------------------

using QTile = SmemTile<BLOCK_M, HEAD_DIM>;
using DoTile = SmemTile<BLOCK_M, HEAD_DIM_V>;
constexpr int PROBS_WORDS = HAS_ROLES ? BLOCK_M * 64 / 2 : 0;  // P^T between the two roles
// dS^T, a chunk of 64 queries after the other, and dQ of 64 of them each on its way out.
using DsTile = SmemTile<BLOCK_N, BLOCK_M, Element, 64>;
constexpr int NUM_DS_TILES = ALSO_DQ ? NUM_DS_STAGES : 0;
constexpr int ROW_GROUPS = (BLOCK_M + 63) / 64;
static_assert(!ALSO_DQ || (BLOCK_M % 64 == 0 && !HAS_ROLES), "dQ is computed by 64 rows");
// Column fragments of dQ that one warpgroup computes; if it is shared, whole chunks.
constexpr int DQ_FRAGS = DQ_SHARED ? QK_CHUNKS / NUM_CONSUMERS * (CHUNK / 16) : QK_FRAGS;
static_assert(!DQ_SHARED || (ROW_GROUPS == 1 && QK_CHUNKS % NUM_CONSUMERS == 0),
              "each consumer has chunks of dQ");
static_assert(!DQ_SHARED || (OVERLAPS && !EARLY_DP), "the order in which shared_tile issues");
static_assert(!DQ_SHARED || NUM_DS_STAGES > 1, "dS is handed over before dQ of the tile before");
constexpr int PLACE_FLOATS = 4 * DQ_FRAGS * SUMS_OF_FRAG;  // of what is added apart
constexpr int DQ_FLOATS = DQ_ROLE ? NUM_PLACES * PLACE_FLOATS : 0;
// dV and dK on their way out, and in between, if it is shared, dQ. With roles dK and dV leave
// through the places of K and V.
using OutGroup = SmemTile<64, (HEAD_DIM > HEAD_DIM_V ? HEAD_DIM : HEAD_DIM_V)>;
constexpr int NUM_OUT_GROUPS = HAS_ROLES ? 0 : NUM_KEY_GROUPS;
static_assert(!DQ_SHARED || OutGroup::BYTES / 4 == PLACE_FLOATS, "room for dQ");
// Under a bound dK leaves through the place of dS and dV through that of V, so that neither waits
// for the other, nor for a turn to add dQ. (Without one that takes 2 % more time.)
constexpr bool ENDS_IN_PLACE = DQ_SHARED && IS_BOUNDED;
constexpr int KV_BYTES = QkGroup::BYTES + (ENDS_IN_PLACE ? 0 : VGroup::BYTES);  // at a time
// Of a stage: lse in log2 units, delta, and with dQ the tile's first row and head (for registers).
constexpr int STATS_FLOATS = 2 * BLOCK_M + (ALSO_DQ ? 4 : 0);

constexpr int V_OFFSET = NUM_KEY_GROUPS * QkGroup::BYTES;
constexpr int Q_OFFSET = V_OFFSET + NUM_KEY_GROUPS * VGroup::BYTES;
constexpr int DO_OFFSET = Q_OFFSET + NUM_STAGES * QTile::BYTES;
constexpr int OUT_OFFSET = DO_OFFSET + NUM_DO_STAGES * DoTile::BYTES;
constexpr int DS_OFFSET = OUT_OFFSET + NUM_OUT_GROUPS * OutGroup::BYTES;
constexpr int DQ_OFFSET = DS_OFFSET + NUM_DS_TILES * DsTile::BYTES;
constexpr int PROBS_OFFSET = DQ_OFFSET + DQ_FLOATS * 4;
constexpr int MASK_OFFSET = PROBS_OFFSET + PROBS_WORDS * 4;
constexpr int MASK_ELEMENTS = MASK_KIND == 0 ? 0 : NUM_KEY_GROUPS * 4 * KEY_MASK_WARP_ELEMENTS;
constexpr int STATS_OFFSET = MASK_OFFSET + MASK_ELEMENTS * KEY_MASK_BYTES;
constexpr int FEED_OFFSET = STATS_OFFSET + NUM_STAGES * STATS_FLOATS * 4;  // at 16 bytes
constexpr int BARRIERS_OFFSET = FEED_OFFSET + FEED_BYTES;
constexpr int NUM_BARRIERS =
    8 + 3 * NUM_STAGES + 2 * NUM_DO_STAGES + 2 * NUM_DS_TILES + NUM_SUMS_FULL + NUM_PLACES;
constexpr int COORDS_OFFSET = BARRIERS_OFFSET + NUM_BARRIERS * 8;
static_assert(SMEM_BYTES == COORDS_OFFSET + COORD_SLOTS * COORD_INTS * 4,
              "the plan and the kernel disagree on shared memory");

struct Buffers {
  QkGroup k;  // one of 64 keys
  VGroup v;
  QTile q;  // one a stage
  DoTile dout;
  OutGroup out;  // one a consumer: dV and dK on their way out, one after the other
  DsTile ds;     // one a stage of its own
  SmemPtr<float> dq;
  SmemPtr<uint32_t> probs;
  SmemPtr<MaskElement> mask;  // of each warp that computes P^T
  SmemPtr<float> stats;
  SmemPtr<int32_t> coords;  // of the key tiles at hand
  Feed feed;  // from which the producer has them, where they are dealt out
};

// A `full` barrier completes when what it guards has arrived, an `empty` one when all have read it.
struct Barriers {
  SmemPtr<uint64_t> coord_full;  // two in turn, for who has read one may not yet have met the next
  SmemPtr<uint64_t> kv_full, kv_empty;  // of K alone if it ENDS_IN_PLACE,
  SmemPtr<uint64_t> v_full, v_empty;    // and these of V
  SmemPtr<uint64_t> probs_full, probs_empty;  // with roles
  SmemPtr<uint64_t> q_full, q_empty;  // one a stage
  SmemPtr<uint64_t> tile_full;        // one a stage of Q: of that, dO, lse and delta
  SmemPtr<uint64_t> do_full, do_empty;
  SmemPtr<uint64_t> ds_full, ds_empty;  // where dQ is computed too
  SmemPtr<uint64_t> sums_full, sums_empty;  // one a part of dQ and adder of it; one a place
};

enum NamedBarrier {
  STORE_BARRIER = 1,  // + consumer: the warps of a warpgroup
};

FC_DEVICE Barriers barriers() {
  const auto first = smem_view<uint64_t>(BARRIERS_OFFSET, NUM_BARRIERS, "barriers");
  const auto of_q = first + 8;
  const auto of_do = of_q + 3 * NUM_STAGES;
  const auto of_ds = of_do + 2 * NUM_DO_STAGES;
  const auto of_sums = of_ds + 2 * NUM_DS_TILES;
  return {first, first + 2, first + 3, first + 4, first + 5, first + 6, first + 7,
          of_q, of_q + NUM_STAGES, of_q + 2 * NUM_STAGES, of_do, of_do + NUM_DO_STAGES,
          of_ds, of_ds + NUM_DS_TILES, of_sums, of_sums + NUM_SUMS_FULL};
}

// By one thread.
FC_DEVICE void init_barriers(const Barriers& bar) {
  mbar_init(bar.coord_full, 1);
  mbar_init(bar.coord_full + 1, 1);
  mbar_init(bar.kv_full, 1);
  // One: who loads lse and delta. Four: who computes dQ. And who adds it.
  mbar_init(bar.kv_empty, NUM_CONSUMERS * 4 + 1 + (DQ_ROLE ? 4 : 0) + (ALSO_DQ ? 2 : 0));
  mbar_init(bar.v_full, 1);
  mbar_init(bar.v_empty, NUM_CONSUMERS * 4);
  mbar_init(bar.probs_full, 128);
  mbar_init(bar.probs_empty, 128);
  for (int stage = 0; stage < NUM_STAGES; ++stage) {
    mbar_init(bar.q_full + stage, 1);
    mbar_init(bar.q_empty + stage, NUM_CONSUMERS * 4);
    mbar_init(bar.tile_full + stage, 32);
  }
  for (int stage = 0; stage < NUM_DO_STAGES; ++stage) {
    mbar_init(bar.do_full + stage, 1);
    mbar_init(bar.do_empty + stage, NUM_CONSUMERS * 4);
  }
  for (int stage = 0; ALSO_DQ && stage < NUM_DS_STAGES; ++stage) {
    mbar_init(bar.ds_full + stage, NUM_CONSUMERS * 4);
    mbar_init(bar.ds_empty + stage, DQ_SHARED ? NUM_CONSUMERS * 4 : 4);
  }
  for (int i = 0; i < NUM_SUMS_FULL; ++i) mbar_init(bar.sums_full + i, 4);
  for (int place = 0; place < NUM_PLACES; ++place) mbar_init(bar.sums_empty + place, 1);
  mbar_init_fence();
}

// The place of a block's key tile number `turn`, whose first key is m_begin; NO_TILE there at the
// end.
FC_DEVICE BlockCoord await_coord(const Barriers& bar, const Buffers& smem, int turn) {
  mbar_wait(bar.coord_full + turn % 2, turn / 2 % 2);
  return coord_or_end(coord_slot(smem.coords, turn));
}

// Where the gradients of 64 keys of a block's tile go; `num_keys` is the sequence's.
FC_DEVICE RowsInTensor rows_of_keys(const TensorMap& map, const AttnParams& p,
                                    const BlockCoord& block, int key_row, int num_keys) {
  const BoxOrigin box = PACKED ? key_box<true>(p, block, 0) : BoxOrigin{0, block.batch_idx};
  return {map, box, key_row, block.head_idx_kv, !PACKED || key_row < num_keys};
}

// Keys behind a sequence's last one have gradient 0, whatever was added up in their rows, of which
// `first_row` is the first.
template <int FRAGS>
FC_DEVICE void clear_behind(WmmaAccum (&x)[FRAGS], int num_keys, int first_row) {
  if (!KEY_LENGTHS || first_row + 64 <= num_keys) return;
  const int row = first_row + warp_idx() % 4 * 16 + accum_row(opaque(lane_idx()), 0);
#pragma unroll
  for (int n = 0; n < FRAGS; ++n) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row + accum_row(0, i) >= num_keys) x[n].x[i] = 0.0f;
    }
  }
}

// --- the producers -------------------------------------------------------------------------------

// Key tiles in the order of the numbers that blocks draw, the first one too. A block may wait for
// those who have drawn before it, whether or not all blocks of the grid run at once. Heads go in
// sections, of each first the first key tile: blocks that start together have mostly other heads.
struct TicketWalk : TileWalk {
  FC_DEVICE Place place(const AttnParams& p, const TileSchedule& schedule) const {
    return place_in_section(p, schedule);
  }

  FC_DEVICE void ask(const AttnParams& p, const TileSchedule&) {
    drawn = gmem_atomic_add(p.tile_counter, 1);
  }

  FC_DEVICE void advance(const AttnParams& p, const TileSchedule& schedule) {
    number = drawn;
    // Each block draws until it finds no tile. The last draw of all sets the counter back to 0.
    if (drawn == num_tiles(p, schedule) + num_blocks() - 1) {
      gmem_atomic_add(p.tile_counter, -(drawn + 1));
    }
  }
};

FC_DEVICE auto first_key_tile(const AttnBwdSm90Params& params, const Feed& feed) {
  if constexpr (ALSO_DQ) {
    TicketWalk tile;
    tile.ask(params.attn, params.schedule);
    tile.advance(params.attn, params.schedule);
    return tile;
  } else {
    return own_tiles<true>(params.attn, feed);
  }
}

// The key tile that a walk is at. Under a right bound the first keys are seen by most queries.
template <class Walk>
FC_DEVICE BlockCoord key_tile_coord(const AttnBwdSm90Params& params, const Walk& tile) {
  const AttnParams& p = params.attn;
  if constexpr (PACKED) {
    return tile.coord(p, params.schedule);
  } else {
    const auto at = tile.place(p, params.schedule);
    const bool ascends = !ALSO_DQ && !DRAWS_TILES;
    const int n_block = ascends ? at.m_block : p.num_m_blocks - 1 - at.m_block;
    const int number = ALSO_DQ ? params.first_head_kv + at.head : at.head;
    const BatchAndHead head = batch_and_head(p, number, p.num_heads_kv);
    BlockCoord block;
    block.head_idx_kv = head.head;
    block.head_idx = head.head * (p.num_heads_q / p.num_heads_kv);
    block.batch_idx = head.batch;
    block.m_begin = n_block * BLOCK_N;
    return block;
  }
}

// Whether the kernel of dQ still runs. Then all but delta is there: that kernel lets this one start
// once it has waited for those before it.
FC_DEVICE bool runs_beside_dq(const AttnBwdSm90Params& params) {
  return !ALSO_DQ && !is_null(params.delta_count);
}

// By one warp of each block, before it reads delta. The last one to have waited sets the counters
// back to 0.
FC_DEVICE void await_delta(const AttnBwdSm90Params& params) {
  const AttnParams& p = params.attn;
  const int heads_per_kv = p.num_heads_q / p.num_heads_kv;
  // Packed sequences share the rows of a head, of which there are seqlen_q in all.
  const int num_heads = PACKED ? p.num_heads_q : params.schedule.num_heads * heads_per_kv;
  const int num_rows = num_heads * p.seqlen_q;
  const auto count = params.delta_count;
  gmem_await(count, num_rows);
  warp_sync();  // orders every lane's wait before the next launch's counts
  if (lane_idx() == 0 && gmem_atomic_add(count + 1, 1) == num_blocks() - 1) {
    gmem_atomic_add(count, -num_rows);
    gmem_atomic_add(count + 1, -num_blocks());
  }
}

// One thread: walks over the block's key tiles, and has TMA load K and V, and Q and dO as far ahead
// as the stages allow.
FC_DEVICE void produce(const AttnBwdSm90Params& params, const Barriers& bar, const Buffers& smem) {
  const AttnParams& p = params.attn;
  const int heads_per_kv = p.num_heads_q / p.num_heads_kv;
  uint32_t count = 0;
  auto tile = first_key_tile(params, smem.feed);
  for (int turn = 0;; ++turn, tile.advance(p, params.schedule)) {
    const auto coord = coord_slot(smem.coords, turn);
    if (tile.done(p, params.schedule)) {
      smem_store(coord, NO_TILE);
      mbar_arrive(bar.coord_full + turn % 2);
      if (runs_beside_dq(params)) grid_dependency_wait();  // so the kernel behind waits for both
      grid_launch_dependents();
      return;
    }
    const BlockCoord block = key_tile_coord(params, tile);
    store_coord(coord, block);
    mbar_arrive(bar.coord_full + turn % 2);

    mbar_wait(bar.kv_empty, turn % 2 ^ 1);
    const auto& own = own_params(p, block);
    const Range tiles = query_tiles(own, block.m_begin);
    // Behind a sequence's last key no box may start (make_ragged in fwd_sm90/params.py).
    const bool has_keys = !KEY_LENGTHS || block.m_begin < own.seqlen_k;
    if (has_keys) {
      mbar_arrive_expect_tx(bar.kv_full, NUM_KEY_GROUPS * KV_BYTES);
    } else {
      mbar_arrive(bar.kv_full);
    }
    const BoxOrigin q_box = query_box<true>(p, block);
    const BoxOrigin k_box = key_box<true>(p, block, p.lengths.k_rows_per_batch);
    const BoxOrigin v_box = key_box<true>(p, block, p.lengths.v_rows_per_batch);
    const auto row_of = [&](int group) {
      const int row = block.m_begin + group * 64;
      return VARLEN != 0 ? min_i(row, own.seqlen_k - 1) : row;
    };
    // Not by `load`: with four calls of it ptxas orders the whole kernel anew.
    for (int group = 0; has_keys && group < NUM_KEY_GROUPS; ++group) {
      for (int c = 0; c < QK_CHUNKS; ++c) {
        tma_load(smem.k.chunk_of(group, c), params.k_map, bar.kv_full, c * CHUNK,
                 k_box.row + row_of(group), block.head_idx_kv, k_box.batch);
      }
    }
    const auto v_full = ENDS_IN_PLACE ? bar.v_full : bar.kv_full;
    if (ENDS_IN_PLACE) {
      mbar_wait(bar.v_empty, turn % 2 ^ 1);  // dV has left
      mbar_arrive_expect_tx(v_full, NUM_KEY_GROUPS * VGroup::BYTES);
    }
    for (int group = 0; has_keys && group < NUM_KEY_GROUPS; ++group) {
      for (int c = 0; c < V_CHUNKS; ++c) {
        tma_load(smem.v.chunk_of(group, c), params.v_map, v_full, c * CHUNK,
                 v_box.row + row_of(group), block.head_idx_kv, v_box.batch);
      }
    }

    const int num_tiles = tiles.end - tiles.begin;
    int left = heads_per_kv * num_tiles;
    if (left == 0) tile.ask(p, params.schedule);
    for (int outer = 0; outer < (ALSO_DQ ? num_tiles : heads_per_kv); ++outer) {
      for (int inner = 0; inner < (ALSO_DQ ? heads_per_kv : num_tiles); ++inner, ++count) {
        if (--left == 0) tile.ask(p, params.schedule);
        const int head = ALSO_DQ ? inner : outer;
        const int row = q_box.row + walked_tile(tiles, ALSO_DQ ? outer : inner) * BLOCK_M;
        const int q_stage = stage_of<NUM_STAGES>(count);
        const auto q_full = bar.q_full + q_stage;
        mbar_wait(bar.q_empty + q_stage, parity_of<NUM_STAGES>(count) ^ 1);
        mbar_arrive_expect_tx(q_full, QTile::BYTES);
        smem.q.load(q_stage, params.q_map, q_full, row, block.head_idx + head, q_box.batch);
        const int do_stage = stage_of<NUM_DO_STAGES>(count);
        const auto do_full = bar.do_full + do_stage;
        mbar_wait(bar.do_empty + do_stage, parity_of<NUM_DO_STAGES>(count) ^ 1);
        mbar_arrive_expect_tx(do_full, DoTile::BYTES);
        smem.dout.load(do_stage, params.dout_map, do_full, row, block.head_idx + head,
                       q_box.batch);
      }
    }
  }
}

constexpr int ROWS_OF_LANE = (BLOCK_M + 31) / 32;

// Clears the rows of dO that see no key.
FC_DEVICE void clear_rows(const Buffers& smem, int stage, const bool (&is_empty)[ROWS_OF_LANE]) {
#pragma unroll
  for (int i = 0; i < ROWS_OF_LANE; ++i) {
    if (!is_empty[i]) continue;
    const DoTile row = smem.dout.row_of(stage, i * 32 + lane_idx());
    for (int c = 0; c < V_CHUNKS; ++c) {
      for (int col = 0; col < CHUNK; col += 8) {
        smem_store_packet(row.at_start(c, col), Packet<16>{});
      }
    }
  }
  fence_proxy_async();
}

// One warp: brings lse and delta of each query tile to shared memory. A row that is none, or sees
// no key, gets lse +inf: its probabilities are 0. Then the warp says that the tile is there.
FC_DEVICE void load_stats(const AttnBwdSm90Params& params, const Barriers& bar,
                          const Buffers& smem) {
  const AttnParams& p = params.attn;
  const GmemPtr<const float> lse_gmem = {p.tensors.lse.address};
  const GmemPtr<const float> delta_gmem = {params.delta.address};
  const int heads_per_kv = p.num_heads_q / p.num_heads_kv;
  uint32_t count = 0;
  if (runs_beside_dq(params)) await_delta(params);
  for (int turn = 0;; ++turn) {
    BlockCoord block = await_coord(bar, smem, turn);
    if (block.m_begin == NO_TILE) return;
    const auto& own = own_params(p, block);
    const Range tiles = query_tiles(own, block.m_begin);
    const int first_row = PACKED ? query_rows<true>(p, block.batch_idx).begin : 0;
    const int num_tiles = tiles.end - tiles.begin;
    const int first_head = block.head_idx;
    for (int outer = 0; outer < (ALSO_DQ ? num_tiles : heads_per_kv); ++outer) {
      for (int inner = 0; inner < (ALSO_DQ ? heads_per_kv : num_tiles); ++inner, ++count) {
        block.head_idx = first_head + (ALSO_DQ ? inner : outer);
        float lse[ROWS_OF_LANE], delta[ROWS_OF_LANE];
        bool is_empty[ROWS_OF_LANE];
        bool some_empty = false;
#pragma unroll
        for (int i = 0; i < ROWS_OF_LANE; ++i) {
          const int m_begin = walked_tile(tiles, ALSO_DQ ? outer : inner) * BLOCK_M;
          const int row = m_begin + i * 32 + lane_idx();
          lse[i] = POS_INF;
          delta[i] = 0.0f;
          is_empty[i] = false;
          if (row >= own.seqlen_q) continue;
          if (BLOCK_M % 32 != 0 && i * 32 + lane_idx() >= BLOCK_M) continue;
          const int64_t at = lse_offset(p, block, first_row + row);
          lse[i] = gmem_load(lse_gmem + at) * LOG2_E;
          delta[i] = gmem_load(delta_gmem + at);
          is_empty[i] = lse[i] == NEG_INF;
          if (is_empty[i]) lse[i] = POS_INF;
          some_empty |= is_empty[i];
        }
        const int stage = stage_of<NUM_STAGES>(count);
        mbar_wait(bar.q_empty + stage, parity_of<NUM_STAGES>(count) ^ 1);
        const auto stats = smem.stats + stage * STATS_FLOATS;
#pragma unroll
        for (int i = 0; i < ROWS_OF_LANE; ++i) {
          const int row = i * 32 + lane_idx();
          if (BLOCK_M % 32 != 0 && row >= BLOCK_M) continue;
          smem_store(stats + row, lse[i]);
          smem_store(stats + (BLOCK_M + row), delta[i]);
        }
        if (ALSO_DQ && lane_idx() == 0) {
          smem_store_packet(stats + 2 * BLOCK_M,
                            to_packet(int32_t(walked_tile(tiles, outer) * BLOCK_M)));
          smem_store_packet(stats + (2 * BLOCK_M + 1), to_packet(int32_t(inner)));
        }
        // Consumers then wait once a tile: beside products each wait costs them 50 to 200 clocks.
        mbar_wait(bar.q_full + stage, parity_of<NUM_STAGES>(count));
        const int do_stage = stage_of<NUM_DO_STAGES>(count);
        mbar_wait(bar.do_full + do_stage, parity_of<NUM_DO_STAGES>(count));
        if (warp_any(some_empty)) clear_rows(smem, do_stage, is_empty);
        mbar_arrive(bar.tile_full + stage);
      }
    }
    // Nobody may be a tile ahead: K and V of this one are there, so those of the last are released.
    mbar_wait(bar.kv_full, turn % 2);
    warp_sync();  // orders every lane's look at the place before its slot is free
    if (lane_idx() == 0) mbar_arrive(bar.kv_empty);
  }
}
