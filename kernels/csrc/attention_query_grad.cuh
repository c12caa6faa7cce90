// Interval attention, backward: the share of each query (sum of out * grad), and the gradient of queries.
//
// One block per tile of queries and head walks over keys as the forward pass does, computing weights again from the log-sum-exp
// (FlashAttention-2, Dao 2023, algorithm 2): with w = exp(s - lse), dQ = scale * sum of w (grad v^T - share) k. No atomics.
#pragma once
#include "attention_tiles.cuh"

template <int D>
struct QueryGradShape : TileShape<D == 64 ? 2 : 1, D == 64 ? 32 : 64> {
  using Base = TileShape<D == 64 ? 2 : 1, D == 64 ? 32 : 64>;
  static constexpr int SHARED = (2 * Base::OWN + 4 * Base::STEP) * D * 2 + 2 * 2 * Base::STEP * 4;
};

// share [H T]; D / 8 lanes read a row of out and grad.
template <class T, int D>
WEFT_KERNEL_OF(ATTENTION_THREADS) attention_share(AttentionCall c) {
  constexpr int PIECES = D / 8, ROWS = ATTENTION_THREADS / PIECES;
  int64_t row = (int64_t)block_index() * ROWS + thread_index() / PIECES, rows = (int64_t)c.total * c.heads;
  int64_t at = (row < rows ? row : 0) * D + thread_index() % PIECES * 8;
  Bytes16 a = load16((const T*)c.out + at), b = load16((const T*)c.grad + at);
  uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
  WEFT_UNROLL
  for (int i = 0; i < 4; ++i) {
    float a0, a1, b0, b1;
    unpack<T>(left[i], a0, a1);
    unpack<T>(right[i], b0, b1);
    sum += a0 * b0 + a1 * b1;
  }
  WEFT_UNROLL
  for (int mask = PIECES / 2; mask; mask >>= 1) sum += shuffle_xor(sum, mask);
  if (row < rows && thread_index() % PIECES == 0) c.share[row % c.heads * c.total + row / c.heads] = sum;
}

template <class T, int D>
WEFT_KERNEL_OF(ATTENTION_THREADS) attention_query_grad(AttentionCall c) {
  using S = QueryGradShape<D>;
  constexpr int N = S::STEP / 8;
  T* q_tile = (T*)shared_bytes();
  T *grad_tile = q_tile + S::OWN * D, *stages = grad_tile + S::OWN * D;  // two of keys and values
  int* lives = (int*)(stages + 4 * S::STEP * D);
  int head = block_index() % c.heads, lane = thread_index() % 32, row = thread_index() / 32 * 16 * S::BANDS;
  KeyWalk<S::STEP> walk(c.table + block_index() / c.heads * 7);
  int own = walk.row[0] * S::OWN;
  const T* k = (const T*)c.k + head / c.group * c.k_h;
  const T* v = (const T*)c.v + head / c.group * c.v_h;
  auto query_at = [&](int r) { return own + r < c.total ? own + r : -1; };
  auto load_step = [&](int i) {
    auto place = [&](int r) { return walk.place(i, r, c.at, c.total); };
    T* k_tile = stages + i % 2 * 2 * S::STEP * D;
    load_rows<S::STEP, D>(k_tile, k, c.k_t, place);
    load_rows<S::STEP, D>(k_tile + S::STEP * D, v, c.v_t, place);
    if (!walk.full(i)) load_numbers<S::STEP>(lives + i % 2 * 2 * S::STEP, c.first, c.last, place);
  };
  load_rows<S::OWN, D>(q_tile, (const T*)c.q + head * c.q_h, c.q_t, query_at);
  load_rows<S::OWN, D>(grad_tile, (const T*)c.grad + (int64_t)head * D, (int64_t)c.heads * D, query_at);
  if (walk.tiles) load_step(0);
  commit_copies();

  float total[S::BANDS][D / 8][4], peak[S::BANDS][2], share[S::BANDS][2];
  clear(total);
  WEFT_UNROLL
  for (int m = 0; m < S::BANDS; ++m)
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      int query = query_at(row + m * 16 + half * 8 + lane / 4);
      peak[m][half] = query < 0 ? 0.f : c.lse[(int64_t)head * c.total + query] * LOG2_E;
      share[m][half] = query < 0 ? 0.f : c.share[(int64_t)head * c.total + query];
    }
  float factor = c.scale * LOG2_E;
  for (int i = 0; i < walk.tiles; ++i) {
    wait_copies<0>();
    sync_block();  // step i is here, and nobody reads step i - 1 any more
    if (i + 1 < walk.tiles) load_step(i + 1);
    commit_copies();
    T* k_tile = stages + i % 2 * 2 * S::STEP * D;
    float weight[S::BANDS][N][4], signal[S::BANDS][N][4];
    clear(weight);
    multiply_rows<D>(weight, q_tile, k_tile, row);
    if (!walk.full(i)) hide(weight, lives + i % 2 * 2 * S::STEP, own);
    clear(signal);
    multiply_rows<D>(signal, grad_tile, k_tile + S::STEP * D, row);
    WEFT_UNROLL
    for (int m = 0; m < S::BANDS; ++m)
      WEFT_UNROLL
      for (int n = 0; n < N; ++n)
        WEFT_UNROLL
        for (int e = 0; e < 4; ++e)
          signal[m][n][e] = power2(weight[m][n][e] * factor - peak[m][e / 2]) * (signal[m][n][e] - share[m][e / 2]);
    multiply_columns<D>(total, signal, k_tile);
  }
  WEFT_UNROLL
  for (int m = 0; m < S::BANDS; ++m)
    WEFT_UNROLL
    for (int n = 0; n < D / 8; ++n)
      WEFT_UNROLL
      for (int e = 0; e < 4; ++e) total[m][n][e] *= c.scale;
  store_rows<D>(total, q_tile, (T*)c.result, row, c.heads, head, query_at);
}
