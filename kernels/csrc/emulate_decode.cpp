// The kernels of the cache for a host compiler, called from tests by ctypes: g++ -O2 -std=c++17 -shared -fPIC emulate_decode.cpp
#define WEFT_EMULATE
#include "decode.cuh"

// What tests hand over; the order is that of tests/kernels/decoding.py.
struct Arguments {
  const void *q, *k, *v;
  const float *q_weight, *k_weight;
  const int64_t* position;
  const double* turns;
  const int *axis, *rows;
  int* state;
  const int* table;
  const uint8_t *landmark, *marked;
  void *pool, *out;
  float* partial;
  int* arrived;
  int64_t q_row, q_head, k_row, k_head, v_row, v_head;
  int batch, heads, groups, parts, page_bits, table_width, window, max_landmarks, store;
  float scale, eps;
};

template <int K, int R, class T>
static bool decode(const Arguments& a, uint64_t seed) {
  DecodeStep<T> step{(const T*)a.q, (const T*)a.k, (const T*)a.v, a.q_row,    a.q_head,    a.k_row,    a.k_head,        a.v_row,
                     a.v_head,      a.q_weight,    a.k_weight,    a.position, a.turns,     a.axis,     a.rows,          a.state,
                     a.table,       a.landmark,    a.marked,      (T*)a.pool, a.state,     (T*)a.out,  a.partial,       a.arrived,
                     a.heads,       a.groups,      a.parts,       a.page_bits, a.table_width, a.window, a.max_landmarks, a.store,
                     a.scale,       a.eps};
  size_t bytes = decode_shared_floats<K, R, T>() * sizeof(float);
  return emulator::launch_grid(a.batch * a.groups * a.parts, DECODE_THREADS, bytes, seed, [=] { decode_step<K, R, T>(step); });
}

// The instances that tests ask for; kind: 0 float, 1 bfloat16, 2 float16. WEFT_FEW: one, for tests of a broken kernel.
extern "C" bool decode_step_emulated(const Arguments* a, int width, int kind, uint64_t seed) {
  int heads = a->heads / a->groups, folded = heads > 4 ? 8 : heads > 2 ? 4 : 2;
  auto is = [&](int k, int r, int t) { return width == k && folded == r && kind == t; };
  if (is(64, 2, 0)) return decode<64, 2, float>(*a, seed);
#ifndef WEFT_FEW
  if (is(64, 8, 0)) return decode<64, 8, float>(*a, seed);
  if (is(128, 2, 0)) return decode<128, 2, float>(*a, seed);
  if (is(64, 2, 2)) return decode<64, 2, fp16>(*a, seed);
  if (is(64, 4, 2)) return decode<64, 4, fp16>(*a, seed);
  if (is(128, 4, 1)) return decode<128, 4, bf16>(*a, seed);
  if (is(128, 8, 1)) return decode<128, 8, bf16>(*a, seed);
#endif
  emulator::block.fault = "this instance is not in emulate_decode.cpp";
  return false;
}

extern "C" bool decode_advance_emulated(const int* rows, const uint8_t* landmark, int* state, uint8_t* marked, int batch, int slots,
                                        uint64_t seed) {
  return emulator::launch((batch + 31) / 32, 32, 0, seed, [=] { decode_advance(rows, landmark, state, marked, batch, slots, 32); });
}

template <int K, class T>
static bool store(const void* k, const void* v, const float* weight, const float* c, const float* s, const int64_t* slot, void* cache,
                  void* y, int tokens, int groups, const int64_t* strides, int64_t page, float eps, int blocks, uint64_t seed) {
  return emulator::launch(blocks, NORM_ROPE_THREADS, 0, seed, [=] {
    norm_rope_store<K, T>((const T*)k, (const T*)v, weight, c, s, slot, (T*)cache, (T*)y, tokens, groups, strides[0], strides[1],
                          strides[2], strides[3], page, eps, blocks);
  });
}

extern "C" bool norm_rope_store_emulated(int width, int kind, const void* k, const void* v, const float* weight, const float* c,
                                         const float* s, const int64_t* slot, void* cache, void* y, int tokens, int groups,
                                         const int64_t* strides, int64_t page, float eps, int blocks, uint64_t seed) {
  auto run = width == 64 ? (kind == 0 ? store<64, float> : kind == 1 ? store<64, bf16> : store<64, fp16>)
                         : (kind == 0 ? store<128, float> : kind == 1 ? store<128, bf16> : store<128, fp16>);
  return run(k, v, weight, c, s, slot, cache, y, tokens, groups, strides, page, eps, blocks, seed);
}

extern "C" const char* emulator_fault() { return emulator::block.fault ? emulator::block.fault : ""; }
