// Interval attention, forward, for sm_90a: one warp fetches keys and values with the copy engine, two warp groups multiply with wgmma.
//
// A block owns 128 queries of one head and walks over the steps of 128 keys that its table row names (kernels/triton_plan.py). Keys
// and values of a step have a ring of buffers each; `full` barriers end their phase when a tile has landed, `empty` ones when every
// consuming warp has let go of it. Steps of the main range are boxes of a tile map, landmarks are gathered by the same warp, piece by
// piece. The scores of step i are computed while the weights of step i - 1 meet their values (Shah et al. 2024, FlashAttention-3,
// algorithm 2). Full steps have no mask code.
#pragma once
#include <type_traits>

#include "attention_tiles.cuh"
#include "hopper_products.cuh"

// One call: maps of q, k, v, and for each step of keys STEP first queries, then STEP last ones; past the last key none.
struct HopperCall {
  TileMap q, k, v;
  AttentionCall attention;
  const int* lives;  // [steps 2 STEP]
};

constexpr int HOPPER_GROUPS = 2, HOPPER_THREADS = 128 * (HOPPER_GROUPS + 1);

template <int D>
struct HopperShape {
  static constexpr int OWN = 64 * HOPPER_GROUPS, STEP = 128, STAGES = D == 64 ? 4 : 2, TILE = STEP * D;
  static constexpr int SHARED = (OWN * D + 2 * STAGES * TILE) * 2 + STAGES * 2 * STEP * 4 + (1 + 4 * STAGES) * 8;
};

#if defined(WEFT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// What lies where in shared memory. Tiles are chunks of 64 channels, each [rows 64].
template <class T, int D>
struct HopperMemory {
  using S = HopperShape<D>;
  T *q, *k, *v;
  int* lives;
  Barrier *q_full, *k_full, *k_empty, *v_full, *v_empty;

  WEFT_DEVICE HopperMemory() {
    q = (T*)shared_bytes();
    k = q + S::OWN * D;
    v = k + S::STAGES * S::TILE;
    lives = (int*)(v + S::STAGES * S::TILE);
    q_full = (Barrier*)(lives + S::STAGES * 2 * S::STEP);
    k_full = q_full + 1;
    k_empty = k_full + S::STAGES;
    v_full = k_empty + S::STAGES;
    v_empty = v_full + S::STAGES;
  }
  WEFT_DEVICE void make_barriers() const {
    make_barrier(q_full, 1);
    for (int i = 0; i < S::STAGES; ++i) {
      make_barrier(k_full + i, 1);
      make_barrier(v_full + i, 1);
      make_barrier(k_empty + i, 4 * HOPPER_GROUPS);
      make_barrier(v_empty + i, 4 * HOPPER_GROUPS);
    }
    barriers_made();
  }
};

// The first step has mask code even if it is full, so that the loop over full steps is one loop.
template <int STEP>
WEFT_DEVICE bool masked(const KeyWalk<STEP>& walk, int i) {
  return i == 0 || !walk.full(i);
}

// A tile of ROWS rows by the copy engine.
template <int ROWS, int D, class T>
WEFT_DEVICE void fetch_tile(T* tile, const TileMap& map, int head, int row, Barrier* barrier) {
  WEFT_UNROLL
  for (int chunk = 0; chunk < D / 64; ++chunk) copy_tile(tile + chunk * ROWS * 64, map, chunk * 64, head, row, barrier);
}

// The same from rows that lie anywhere, by the 32 lanes of a warp: row r from place(r), zeros where that is negative.
template <int ROWS, int D, class T, class Place>
WEFT_DEVICE void gather_tile(T* tile, const T* source, int64_t stride, Place place) {
  constexpr int PIECES = D / 8;
  int lane = thread_again() % 32, piece = lane % PIECES;
  for (int row = lane / PIECES; row < ROWS; row += 32 / PIECES) {
    int from = place(row);
    copy_async<16>(piece_of<64>(tile + piece / 8 * ROWS * 64, row, piece % 8),
                   source + (int64_t)(from < 0 ? 0 : from) * stride + piece * 8, from >= 0);
  }
}

// The producing warp.
template <class T, int D>
WEFT_DEVICE void fetch_steps(const HopperCall& call, const HopperMemory<T, D>& memory, const KeyWalk<HopperShape<D>::STEP>& walk,
                             int head, int own) {
  using S = HopperShape<D>;
  const AttentionCall& c = call.attention;
  int lane = thread_index() % 32, kv_head = head / c.group, listed = walk.listed_tiles();
  if (lane == 0) {
    arrive_expecting(memory.q_full, S::OWN * D * 2);
    for (int g = 0; g < HOPPER_GROUPS; ++g) fetch_tile<64, D>(memory.q + g * 64 * D, call.q, head, own + g * 64, memory.q_full);
  }
  for (int i = 0; i < walk.tiles; ++i) {
    int stage = i % S::STAGES, parity = (i / S::STAGES & 1) ^ 1, key = walk.row[1] + (i - listed) * S::STEP;
    auto place = [&](int r) { return walk.place(i, r, c.at, c.total); };
    int* lives = memory.lives + stage * 2 * S::STEP;
    T *k_tile = memory.k + stage * S::TILE, *v_tile = memory.v + stage * S::TILE;
    wait(memory.k_empty + stage, parity);
    if (i < listed) {
      gather_tile<S::STEP, D>(k_tile, (const T*)c.k + kv_head * c.k_h, c.k_t, place);
      for (int r = lane; r < S::STEP; r += 32) {
        int from = place(r), safe = from < 0 ? 0 : from;
        copy_async<4>(lives + r, c.first + safe, from >= 0);
        copy_async<4>(lives + S::STEP + r, c.last + safe, from >= 0);
      }
      finish_copies();
      sync_warp();
      if (lane == 0) arrive(memory.k_full + stage);
    } else if (lane == 0) {
      bool mask = masked(walk, i);
      arrive_expecting(memory.k_full + stage, S::TILE * 2 + (mask ? 2 * S::STEP * 4 : 0));
      fetch_tile<S::STEP, D>(k_tile, call.k, kv_head, key, memory.k_full + stage);
      if (mask) copy_bulk(lives, call.lives + (int64_t)key * 2, 2 * S::STEP * 4, memory.k_full + stage);
    }
    wait(memory.v_empty + stage, parity);
    if (i < listed) {
      gather_tile<S::STEP, D>(v_tile, (const T*)c.v + kv_head * c.v_h, c.v_t, place);
      finish_copies();
      sync_warp();
      if (lane == 0) arrive(memory.v_full + stage);
    } else if (lane == 0) {
      arrive_expecting(memory.v_full + stage, S::TILE * 2);
      fetch_tile<S::STEP, D>(v_tile, call.v, kv_head, key, memory.v_full + stage);
    }
  }
}

// Scores become weights relative to the row's peak so far; what was summed before must shrink by `decay`.
template <bool MASKED, int N>
WEFT_DEVICE void weigh(float (&score)[N][4], float (&peak)[2], float (&sum)[2], float (&decay)[2], float factor) {
  WEFT_UNROLL
  for (int half = 0; half < 2; ++half) {
    float most = -INFINITY;
    WEFT_UNROLL
    for (int n = 0; n < N; ++n) most = fmaxf(most, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
    most = fmaxf(most, shuffle_xor(most, 1));
    most = fmaxf(most, shuffle_xor(most, 2));
    float next = fmaxf(peak[half], most * factor), shift = next;
    if (MASKED && next == -INFINITY) shift = 0.f;  // a query that saw no key yet
    float added = 0.f;
    WEFT_UNROLL
    for (int n = 0; n < N; ++n)
      WEFT_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) added += score[n][e] = power2(score[n][e] * factor - shift);
    decay[half] = power2(peak[half] - shift);
    sum[half] = sum[half] * decay[half] + added;
    peak[half] = next;
  }
}

// Starts score = q k^T for the 64 rows of a warp group.
template <int D, class T, int N>
WEFT_DEVICE void start_scores(float (&score)[N][4], T* q, T* k) {
  WEFT_UNROLL
  for (int c = 0; c < D / 16; ++c)
    multiply_tiles<T>(score, tile_view(q + c / 4 * 64 * 64 + c % 4 * 16), tile_view(k + c / 4 * 8 * N * 64 + c % 4 * 16), c > 0);
}

// Starts out += weights v.
template <class T, int C, int N>
WEFT_DEVICE void start_values(float (&out)[C][4], const uint32_t (&weights)[N][4], T* v) {
  WEFT_UNROLL
  for (int n = 0; n < N; ++n) multiply_registers<T>(out, weights[n], tile_view(v + n * 16 * 64, 16 * N * 64 * 2));
}

// Weights as left factors of products: sixteen keys in each.
template <class T, int N>
WEFT_DEVICE void round_weights(uint32_t (&weights)[N / 2][4], const float (&score)[N][4]) {
  WEFT_UNROLL
  for (int n = 0; n < N; ++n)
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) weights[n / 2][n % 2 * 2 + half] = pack<T>(score[n][2 * half], score[n][2 * half + 1]);
}

// A warp lets go of a buffer: its lanes have read it.
WEFT_DEVICE void let_go(Barrier* empty) {
  sync_warp();
  if (thread_again() % 32 == 0) arrive(empty);
}

// A consuming warp group.
template <class T, int D>
WEFT_DEVICE void consume_steps(const HopperCall& call, const HopperMemory<T, D>& memory, const KeyWalk<HopperShape<D>::STEP>& walk,
                               int head, int own) {
  using S = HopperShape<D>;
  constexpr int N = S::STEP / 8, C = D / 8;
  const AttentionCall& c = call.attention;
  int group = thread_index() / 128, row = thread_index() / 32 * 16;
  T* q = memory.q + group * 64 * D;
  float score[1][N][4], out[1][C][4], peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f}, decay[2];
  uint32_t weights[N / 2][4];
  float factor = c.scale * LOG2_E;
  clear(out);

  wait(memory.q_full, 0);
  wait(memory.k_full, 0);
  hold(score[0]);
  fence_products();
  start_scores<D>(score[0], q, memory.k);
  commit_products();
  wait_products<0>();
  hold(score[0]);
  hide(score, memory.lives, own);
  finish_reads();
  let_go(memory.k_empty);
  weigh<true>(score[0], peak, sum, decay, factor);
  round_weights<T>(weights, score[0]);

  auto meet_values = [&](int i) {  // starts to add the values of step i
    wait(memory.v_full + i % S::STAGES, i / S::STAGES & 1);
    fence_products();
    start_values(out[0], weights, memory.v + i % S::STAGES * S::TILE);
    commit_products();
  };
  auto step = [&](int i, auto mask) {
    constexpr bool MASKED = decltype(mask)::value;
    int stage = i % S::STAGES;
    wait(memory.k_full + stage, i / S::STAGES & 1);
    hold(score[0]);
    hold(out[0]);
    fence_products();
    start_scores<D>(score[0], q, memory.k + stage * S::TILE);
    commit_products();
    meet_values(i - 1);
    wait_products<1>();
    hold(score[0]);
    if (MASKED) {
      hide(score, memory.lives + stage * 2 * S::STEP, own);
      finish_reads();
    }
    let_go(memory.k_empty + stage);
    weigh<MASKED>(score[0], peak, sum, decay, factor);
    wait_products<0>();
    hold(out[0]);
    let_go(memory.v_empty + (i - 1) % S::STAGES);
    WEFT_UNROLL
    for (int n = 0; n < C; ++n)
      WEFT_UNROLL
      for (int e = 0; e < 4; ++e) out[0][n][e] *= decay[e / 2];
    round_weights<T>(weights, score[0]);
  };
  int listed = walk.listed_tiles(), full = listed + (walk.row[2] - walk.row[1]) / S::STEP;
  int partial = listed + (walk.row[3] - walk.row[1]) / S::STEP, i = 1;
  for (; i < full; ++i) step(i, std::true_type());
  for (; i < partial; ++i) step(i, std::false_type());
  for (; i < walk.tiles; ++i) step(i, std::true_type());
  hold(out[0]);
  meet_values(walk.tiles - 1);
  wait_products<0>();
  hold(out[0]);

  int lane = thread_again() % 32;
  auto query_at = [&](int r) { return own + r < c.total ? own + r : -1; };
  WEFT_UNROLL
  for (int half = 0; half < 2; ++half) {
    float all = sum[half] + shuffle_xor(sum[half], 1);
    all += shuffle_xor(all, 2);
    int query = query_at(row + half * 8 + lane / 4);
    if (query >= 0 && lane % 4 == 0) c.lse[(int64_t)head * c.total + query] = (peak[half] + log2f(all)) / LOG2_E;
    WEFT_UNROLL
    for (int n = 0; n < C; ++n)
      WEFT_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) out[0][n][e] *= 1.f / all;
  }
  sync_warp_group(group);  // nobody of the group reads its queries any more
  store_rows<D>(out, memory.q, (T*)c.result, row, c.heads, head, query_at);
}
#endif

// Each row of the table names at least one step.
template <class T, int D>
WEFT_KERNEL_OF(HOPPER_THREADS) attention_hopper(WEFT_CONSTANT HopperCall call) {
#if defined(WEFT_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using S = HopperShape<D>;
  HopperMemory<T, D> memory;
  int heads = call.attention.heads, head = block_index() % heads;
  KeyWalk<S::STEP> walk(call.attention.table + block_index() / heads * 7);
  int own = walk.row[0] * S::OWN;
  if (thread_index() == 0) memory.make_barriers();
  sync_block();
  if (thread_index() >= 128 * HOPPER_GROUPS) {
    give_registers<40>();
    if (thread_index() < 128 * HOPPER_GROUPS + 32) fetch_steps<T, D>(call, memory, walk, head, own);
  } else {
    take_registers<232>();
    consume_steps<T, D>(call, memory, walk, head, own);
  }
#endif
}
