// Interval attention, backward: the gradients of keys and values.
//
// One block per tile of keys and kv head walks over the queries that see them, for every head of the group, so that the sums have one
// order and need no atomics. A warp's rows are keys: w^T = exp(k q^T - lse), dV = sum of w^T grad, dK = scale * sum of
// w^T (v grad^T - share) q. It runs twice: over all keys for queries that have them in their main range, then over landmarks (through
// their list) for later queries, adding to the first.
#pragma once
#include "attention_tiles.cuh"

template <int D>
struct KeyGradShape : TileShape<1, D == 64 ? 64 : 32> {
  using Base = TileShape<1, D == 64 ? 64 : 32>;
  static constexpr int SHARED = (2 * Base::OWN + 4 * Base::STEP) * D * 2 + 2 * 2 * Base::STEP * 4;
};

// The queries that a tile of keys meets, for each head of a group in turn. Row of a key table.
template <int STEP>
struct QueryWalk {
  int tile, begin, full_begin, full_end, end, tiles, group;
  int member = 0, step = 0;

  WEFT_DEVICE QueryWalk(const int* row, int group)
      : tile(row[0]), begin(row[1]), full_begin(row[2]), full_end(row[3]), end(row[4]), group(group) {
    tiles = end > begin ? (end - begin + STEP - 1) / STEP : 0;
  }
  WEFT_DEVICE int start() const { return begin + step * STEP; }
  WEFT_DEVICE bool full() const { return start() >= full_begin && start() < full_end; }
  WEFT_DEVICE bool done() const { return tiles == 0 || member == group; }
  WEFT_DEVICE void next() {
    if (++step == tiles) {
      step = 0;
      ++member;
    }
  }
};

template <class T, int D>
WEFT_KERNEL_OF(ATTENTION_THREADS) attention_key_grad(AttentionCall c, bool gather) {
  using S = KeyGradShape<D>;
  constexpr int N = S::STEP / 8, STAGE = 2 * S::STEP * D;
  T* k_tile = (T*)shared_bytes();
  T *v_tile = k_tile + S::OWN * D, *stages = v_tile + S::OWN * D;  // two of queries and gradients
  float* numbers = (float*)(stages + 2 * STAGE);                    // two of log-sum-exp and share
  int kv_heads = c.heads / c.group, kv_head = block_index() % kv_heads;
  int lane = thread_index() % 32, row = thread_index() / 32 * 16 * S::BANDS;
  QueryWalk<S::STEP> walk(c.table + block_index() / kv_heads * 5, c.group), ahead = walk;
  if (gather && walk.tiles == 0) return;  // nobody sees these landmarks beyond the main range
  int own = walk.tile * S::OWN;
  auto key_at = [&](int r) {
    int key = own + r < c.total ? own + r : c.total;
    if (gather && key < c.total) key = c.at[key];
    return key < c.total ? key : -1;
  };
  auto load_step = [&](int stage) {
    int head = kv_head * c.group + ahead.member, start = ahead.start();
    auto place = [&](int r) { return start + r < c.total ? start + r : -1; };
    load_rows<S::STEP, D>(stages + stage * STAGE, (const T*)c.q + head * c.q_h, c.q_t, place);
    load_rows<S::STEP, D>(stages + stage * STAGE + S::STEP * D, (const T*)c.grad + (int64_t)head * D, (int64_t)c.heads * D, place);
    int64_t of_head = (int64_t)head * c.total;
    load_numbers<S::STEP>(numbers + stage * 2 * S::STEP, (const float*)c.lse + of_head, (const float*)c.share + of_head, place);
    ahead.next();
  };
  load_rows<S::OWN, D>(k_tile, (const T*)c.k + kv_head * c.k_h, c.k_t, key_at);
  load_rows<S::OWN, D>(v_tile, (const T*)c.v + kv_head * c.v_h, c.v_t, key_at);
  if (!ahead.done()) load_step(0);
  commit_copies();

  float key_total[S::BANDS][D / 8][4], value_total[S::BANDS][D / 8][4];
  clear(key_total);
  clear(value_total);
  int first[S::BANDS][2], last[S::BANDS][2];
  WEFT_UNROLL
  for (int m = 0; m < S::BANDS; ++m)
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      int key = key_at(row + m * 16 + half * 8 + lane / 4);
      first[m][half] = key < 0 ? 0 : c.first[key];
      last[m][half] = key < 0 ? 0 : c.last[key];
    }
  float factor = c.scale * LOG2_E;
  for (int stage = 0; !walk.done(); walk.next(), stage ^= 1) {
    wait_copies<0>();
    sync_block();  // this step is here, and nobody reads the one before any more
    if (!ahead.done()) load_step(stage ^ 1);
    commit_copies();
    T *q_tile = stages + stage * STAGE, *grad_tile = q_tile + S::STEP * D;
    const float *lse = numbers + stage * 2 * S::STEP, *share = lse + S::STEP;
    float weight[S::BANDS][N][4], signal[S::BANDS][N][4];
    clear(weight);
    multiply_rows<D>(weight, k_tile, q_tile, row);
    bool full = walk.full();
    WEFT_UNROLL
    for (int n = 0; n < N; ++n) {
      int column = n * 8 + lane % 4 * 2, query = walk.start() + column;
      FloatPair peak = *(const FloatPair*)(lse + column);
      WEFT_UNROLL
      for (int m = 0; m < S::BANDS; ++m)
        WEFT_UNROLL
        for (int e = 0; e < 4; ++e) {
          int i = query + e % 2;
          weight[m][n][e] = power2(weight[m][n][e] * factor - (e % 2 ? peak.y : peak.x) * LOG2_E);
          if (!full && (i < first[m][e / 2] || i >= last[m][e / 2])) weight[m][n][e] = 0.f;
        }
    }
    multiply_columns<D>(value_total, weight, grad_tile);
    clear(signal);
    multiply_rows<D>(signal, v_tile, grad_tile, row);
    WEFT_UNROLL
    for (int n = 0; n < N; ++n) {
      FloatPair part = *(const FloatPair*)(share + n * 8 + lane % 4 * 2);
      WEFT_UNROLL
      for (int m = 0; m < S::BANDS; ++m)
        WEFT_UNROLL
        for (int e = 0; e < 4; ++e) signal[m][n][e] = weight[m][n][e] * (signal[m][n][e] - (e % 2 ? part.y : part.x));
    }
    multiply_columns<D>(key_total, signal, q_tile);
  }

  T *keys = (T*)c.result, *values = (T*)c.second;
  if (walk.tiles == 0) {  // the keys are still on their way
    wait_copies<0>();
    sync_block();
  }
  WEFT_UNROLL
  for (int m = 0; m < S::BANDS; ++m)
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      int key = key_at(row + m * 16 + half * 8 + lane / 4);
      int64_t at = ((int64_t)key * kv_heads + kv_head) * D + lane % 4 * 2;
      WEFT_UNROLL
      for (int n = 0; n < D / 8; ++n) {
        float old[4] = {};
        if (gather && key >= 0) {
          unpack<T>(*(const uint32_t*)(keys + at + n * 8), old[0], old[1]);
          unpack<T>(*(const uint32_t*)(values + at + n * 8), old[2], old[3]);
        }
        WEFT_UNROLL
        for (int e = 0; e < 2; ++e) {
          key_total[m][n][2 * half + e] = key_total[m][n][2 * half + e] * c.scale + old[e];
          value_total[m][n][2 * half + e] += old[2 + e];
        }
      }
    }
  store_rows<D>(key_total, k_tile, keys, row, kv_heads, kv_head, key_at);
  store_rows<D>(value_total, v_tile, values, row, kv_heads, kv_head, key_at);
}
