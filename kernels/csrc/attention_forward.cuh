// Interval attention, forward: one block per tile of queries and head, online softmax over the keys that its table row names.
//
// The recurrence is that of FlashAttention-2 (Dao 2023, algorithm 1). Keys and values of the next step arrive while this one is
// computed; one barrier per step. Full steps have no mask code.
#pragma once
#include "attention_tiles.cuh"

template <int D>
struct ForwardShape : TileShape<2, D == 64 ? 64 : 32> {
  using Base = TileShape<2, D == 64 ? 64 : 32>;
  static constexpr int SHARED = (Base::OWN + 4 * Base::STEP) * D * 2 + 2 * 2 * Base::STEP * 4;
};

// Scores become weights relative to the row's peak so far; what was summed before shrinks to the new peak.
template <bool MASKED, int BANDS, int N, int C>
WEFT_DEVICE void soften(float (&score)[BANDS][N][4], float (&out)[BANDS][C][4], float (&peak)[BANDS][2], float (&sum)[BANDS][2],
                        float factor) {
  WEFT_UNROLL
  for (int m = 0; m < BANDS; ++m)
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
      WEFT_UNROLL
      for (int n = 0; n < N; ++n) most = fmaxf(most, fmaxf(score[m][n][2 * half], score[m][n][2 * half + 1]));
      most = fmaxf(most, shuffle_xor(most, 1));
      most = fmaxf(most, shuffle_xor(most, 2));
      float next = fmaxf(peak[m][half], most * factor), shift = next;
      if (MASKED && next == -INFINITY) shift = 0.f;  // a query that saw no key yet
      float decay = power2(peak[m][half] - shift), added = 0.f;
      WEFT_UNROLL
      for (int n = 0; n < N; ++n)
        WEFT_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) added += score[m][n][e] = power2(score[m][n][e] * factor - shift);
      WEFT_UNROLL
      for (int c = 0; c < C; ++c)
        WEFT_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) out[m][c][e] *= decay;
      sum[m][half] = sum[m][half] * decay + added;
      peak[m][half] = next;
    }
}

template <class T, int D>
WEFT_KERNEL_OF(ATTENTION_THREADS) attention_forward(AttentionCall c) {
  using S = ForwardShape<D>;
  constexpr int N = S::STEP / 8;
  T* q_tile = (T*)shared_bytes();
  T* stages = q_tile + S::OWN * D;  // two of keys and values
  int* lives = (int*)(stages + 4 * S::STEP * D);
  int head = block_index() % c.heads, row = thread_index() / 32 * 16 * S::BANDS;
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
  if (walk.tiles) load_step(0);
  commit_copies();

  float out[S::BANDS][D / 8][4], peak[S::BANDS][2], sum[S::BANDS][2];
  clear(out);
  WEFT_UNROLL
  for (int m = 0; m < S::BANDS; ++m) {
    peak[m][0] = peak[m][1] = -INFINITY;
    sum[m][0] = sum[m][1] = 0.f;
  }
  float factor = c.scale * LOG2_E;
  for (int i = 0; i < walk.tiles; ++i) {
    wait_copies<0>();
    sync_block();  // step i is here, and nobody reads step i - 1 any more
    if (i + 1 < walk.tiles) load_step(i + 1);
    commit_copies();
    T* k_tile = stages + i % 2 * 2 * S::STEP * D;
    float score[S::BANDS][N][4];
    clear(score);
    multiply_rows<D>(score, q_tile, k_tile, row);
    if (walk.full(i)) {
      soften<false>(score, out, peak, sum, factor);
    } else {
      hide(score, lives + i % 2 * 2 * S::STEP, own);
      soften<true>(score, out, peak, sum, factor);
    }
    multiply_columns<D>(out, score, k_tile + S::STEP * D);
  }

  int lane = thread_again() % 32;
  WEFT_UNROLL
  for (int m = 0; m < S::BANDS; ++m)
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half) {
      float all = sum[m][half] + shuffle_xor(sum[m][half], 1);
      all += shuffle_xor(all, 2);
      int query = query_at(row + m * 16 + half * 8 + lane / 4);
      if (query >= 0 && lane % 4 == 0) c.lse[(int64_t)head * c.total + query] = (peak[m][half] + log2f(all)) / LOG2_E;
      WEFT_UNROLL
      for (int n = 0; n < D / 8; ++n)
        WEFT_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) out[m][n][e] *= 1.f / all;
    }
  store_rows<D>(out, q_tile, (T*)c.result, row, c.heads, head, query_at);
}
