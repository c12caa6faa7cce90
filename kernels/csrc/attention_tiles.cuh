// What the interval attention kernels share: their arguments, tiles in shared memory, and products of tiles.
//
// A block has WARPS warps; each owns 16 * BANDS rows of the block's tile (queries forward and for dQ, keys for dK and dV) and holds
// their scores and sums in registers. Tiles hold rows of D 16-bit numbers, the 16-byte pieces of a row permuted by the row number, so
// that the eight rows of a matrix load lie in different banks.
#pragma once
#include "tensor_core.cuh"

// One call; a kernel reads what it needs. Strides count numbers, channels lie side by side. Tables: kernels/triton_plan.py.
struct AttentionCall {
  const void *q, *k, *v;            // [T H K], [T G K], [T G K]
  const void *out, *grad;           // [T H K] contiguous: the result and its gradient
  float *lse, *share;               // [H T]: natural log-sum-exp; sum over channels of out * grad
  void *result, *second;            // contiguous: out or dQ [T H K]; dK and dV [T G K]
  const int *first, *last;          // [T]: key j is visible to queries [first[j], last[j])
  const int *at, *table;            // places of landmarks; one row per tile, the longest first
  int64_t q_t, q_h, k_t, k_h, v_t, v_h;
  int total, heads, group;
  float scale;
};

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int ATTENTION_WARPS = 4, ATTENTION_THREADS = 32 * ATTENTION_WARPS;

// Sizes of a tile: rows that the block owns, and the step of its walk.
template <int BANDS_, int STEP_>
struct TileShape {
  static constexpr int BANDS = BANDS_, OWN = 16 * BANDS_ * ATTENTION_WARPS, STEP = STEP_;
};

struct alignas(8) IntPair {
  int x, y;
};
struct alignas(8) FloatPair {
  float x, y;
};

template <int D, class T>
WEFT_DEVICE T* piece_of(T* tile, int row, int piece) {
  return tile + row * D + ((piece ^ (row & 7)) << 3);
}

// Starts copying ROWS rows: row i from place(i) of the source, zeros where place(i) is negative.
template <int ROWS, int D, class T, class Place>
WEFT_DEVICE void load_rows(T* tile, const T* source, int64_t stride, Place place) {
  constexpr int PIECES = D / 8, STEP = ATTENTION_THREADS / PIECES;
  static_assert(ROWS % STEP == 0, "every thread copies the same number of pieces");
  int thread = thread_again(), piece = thread % PIECES;
  WEFT_UNROLL
  for (int i = 0; i < ROWS / STEP; ++i) {
    int row = thread / PIECES + i * STEP, from = place(row);
    copy_async<16>(piece_of<D>(tile, row, piece), source + (int64_t)(from < 0 ? 0 : from) * stride + piece * 8, from >= 0);
  }
}

// Starts copying N 4-byte numbers into each of two arrays side by side, as load_rows does.
template <int N, class V, class Place>
WEFT_DEVICE void load_numbers(V* numbers, const V* first, const V* second, Place place) {
  int thread = thread_again();
  if (thread < N) {
    int from = place(thread), safe = from < 0 ? 0 : from;
    copy_async<4>(numbers + thread, first + safe, from >= 0);
    copy_async<4>(numbers + N + thread, second + safe, from >= 0);
  }
}

template <int BANDS, int N>
WEFT_DEVICE void clear(float (&x)[BANDS][N][4]) {
  WEFT_UNROLL
  for (int m = 0; m < BANDS; ++m)
    WEFT_UNROLL
    for (int n = 0; n < N; ++n)
      WEFT_UNROLL
      for (int e = 0; e < 4; ++e) x[m][n][e] = 0.f;
}

// sum += a b^T: the warp's rows of a, from `row` on, with all 8 N rows of b, over D channels.
template <int D, int BANDS, int N, class T>
WEFT_DEVICE void multiply_rows(float (&sum)[BANDS][N][4], T* a, T* b, int row) {
  int lane = thread_again() % 32;
  WEFT_UNROLL
  for (int c = 0; c < D / 16; ++c) {
    uint32_t left[BANDS][4];
    WEFT_UNROLL
    for (int m = 0; m < BANDS; ++m) load_matrices(left[m], piece_of<D>(a, row + m * 16 + lane % 16, 2 * c + lane / 16));
    WEFT_UNROLL
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, piece_of<D>(b, n * 8 + lane % 8 + lane / 16 * 8, 2 * c + lane / 8 % 2));
      WEFT_UNROLL
      for (int m = 0; m < BANDS; ++m) {
        multiply_add<T>(sum[m][n], left[m], right[0], right[1]);
        multiply_add<T>(sum[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// sum += a b: a in registers (a sum of multiply_rows, rounded), over the 8 N rows of b, for D channels.
template <int D, int BANDS, int N, class T>
WEFT_DEVICE void multiply_columns(float (&sum)[BANDS][D / 8][4], const float (&a)[BANDS][N][4], T* b) {
  int lane = thread_again() % 32;
  WEFT_UNROLL
  for (int n = 0; n < N; n += 2) {
    uint32_t left[BANDS][4];
    WEFT_UNROLL
    for (int m = 0; m < BANDS; ++m) {
      left[m][0] = pack<T>(a[m][n][0], a[m][n][1]);
      left[m][1] = pack<T>(a[m][n][2], a[m][n][3]);
      left[m][2] = pack<T>(a[m][n + 1][0], a[m][n + 1][1]);
      left[m][3] = pack<T>(a[m][n + 1][2], a[m][n + 1][3]);
    }
    WEFT_UNROLL
    for (int c = 0; c < D / 8; c += 2) {
      uint32_t right[4];
      load_turned(right, piece_of<D>(b, n * 8 + lane % 16, c + lane / 16));
      WEFT_UNROLL
      for (int m = 0; m < BANDS; ++m) {
        multiply_add<T>(sum[m][c], left[m], right[0], right[1]);
        multiply_add<T>(sum[m][c + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Hides the scores of keys that the lane's queries do not see. lives: first and last query of each key of the step.
template <int BANDS, int N>
WEFT_DEVICE void hide(float (&score)[BANDS][N][4], const int* lives, int query) {
  int thread = thread_again();
  query += thread / 32 * 16 * BANDS + thread % 32 / 4;
  WEFT_UNROLL
  for (int n = 0; n < N; ++n) {
    IntPair first = *(const IntPair*)(lives + n * 8 + thread % 4 * 2);
    IntPair last = *(const IntPair*)(lives + N * 8 + n * 8 + thread % 4 * 2);
    WEFT_UNROLL
    for (int m = 0; m < BANDS; ++m)
      WEFT_UNROLL
      for (int half = 0; half < 2; ++half) {
        int i = query + m * 16 + half * 8;
        if (i < first.x || i >= last.x) score[m][n][2 * half] = -INFINITY;
        if (i < first.y || i >= last.y) score[m][n][2 * half + 1] = -INFINITY;
      }
  }
}

// Writes the warp's rows to result [T heads D] at `head`: row i to place(i), nowhere where it is negative. `tile` is any tile of
// which only this warp uses these rows.
template <int D, int BANDS, class T, class Place>
WEFT_DEVICE void store_rows(float (&sum)[BANDS][D / 8][4], T* tile, T* result, int row, int heads, int head, Place place) {
  int lane = thread_again() % 32;
  sync_warp();
  WEFT_UNROLL
  for (int m = 0; m < BANDS; ++m)
    WEFT_UNROLL
    for (int half = 0; half < 2; ++half)
      WEFT_UNROLL
      for (int c = 0; c < D / 8; ++c)
        *(uint32_t*)(piece_of<D>(tile, row + m * 16 + half * 8 + lane / 4, c) + lane % 4 * 2) =
            pack<T>(sum[m][c][2 * half], sum[m][c][2 * half + 1]);
  sync_warp();
  constexpr int PIECES = D / 8, STEP = 32 / PIECES;
  int piece = lane % PIECES;
  WEFT_UNROLL
  for (int i = 0; i < 16 * BANDS / STEP; ++i) {
    int r = row + i * STEP + lane / PIECES, to = place(r);
    if (to >= 0) store16(result + ((int64_t)to * heads + head) * D + piece * 8, load16(piece_of<D>(tile, r, piece)));
  }
}

// The keys that a tile of queries meets: landmarks from the list in steps of STEP, then the main range. The row of the table is read
// anew at each step, because registers are scarcer than loads.
template <int STEP>
struct KeyWalk {
  const int* row;  // tile, begin, full_begin, full_end, end, first and end of its landmarks
  int tiles;

  WEFT_DEVICE KeyWalk(const int* row) : row(row) { tiles = listed_tiles() + (row[4] - row[1] + STEP - 1) / STEP; }
  WEFT_DEVICE int listed_tiles() const { return (row[6] - row[5] + STEP - 1) / STEP; }
  // Every query of the tile sees every key of step i.
  WEFT_DEVICE bool full(int i) const {
    int start = row[1] + (i - listed_tiles()) * STEP;
    return i >= listed_tiles() && start >= row[2] && start < row[3];
  }
  // The key in place `r` of step i; -1 if there is none. Landmarks from `begin` on belong to the main range.
  WEFT_DEVICE int place(int i, int r, const int* at, int total) const {
    int begin = row[1], main = i - listed_tiles(), key = begin + main * STEP + r;
    if (main >= 0) return key < total ? key : -1;
    int index = row[5] + i * STEP + r;
    key = index < row[6] ? at[index] : begin;
    return key < begin ? key : -1;
  }
};
