// The kernels for a host compiler, called from tests by ctypes: g++ -O2 -std=c++17 -shared -fPIC emulate.cpp
#define WEFT_EMULATE
#include "norm_rope.cuh"

template <int K, class T>
static bool forward(const void* x, const float* weight, const float* c, const float* s, void* y, int tokens, int heads,
                    int64_t stride_t, int64_t stride_h, float eps, int blocks, uint64_t seed) {
  return emulator::launch(blocks, NORM_ROPE_THREADS, 0, seed, [=] {
    norm_rope_forward<K, T>((const T*)x, weight, c, s, (T*)y, tokens, heads, stride_t, stride_h, eps, blocks);
  });
}

template <int K, class T>
static bool backward(const void* dy, const void* x, const float* weight, const float* c, const float* s, void* dx, float* parts,
                     int tokens, int heads, int64_t stride_t, int64_t stride_h, float eps, int blocks, uint64_t seed) {
  return emulator::launch(blocks, NORM_ROPE_THREADS, NORM_ROPE_THREADS / 32 * K * sizeof(float), seed, [=] {
    norm_rope_backward<K, T>((const T*)dy, (const T*)x, weight, c, s, (T*)dx, parts, tokens, heads, stride_t, stride_h, eps, blocks);
  });
}

#define WEFT_INSTANCE(K, T, NAME)                                                                                                 \
  extern "C" bool norm_rope_forward_##NAME(const void* x, const float* w, const float* c, const float* s, void* y, int tokens,    \
                                           int heads, int64_t st, int64_t sh, float eps, int blocks, uint64_t seed) {             \
    return forward<K, T>(x, w, c, s, y, tokens, heads, st, sh, eps, blocks, seed);                                                \
  }                                                                                                                               \
  extern "C" bool norm_rope_backward_##NAME(const void* dy, const void* x, const float* w, const float* c, const float* s,        \
                                            void* dx, float* parts, int tokens, int heads, int64_t st, int64_t sh, float eps,     \
                                            int blocks, uint64_t seed) {                                                          \
    return backward<K, T>(dy, x, w, c, s, dx, parts, tokens, heads, st, sh, eps, blocks, seed);                                   \
  }
WEFT_INSTANCE(64, float, 64_float)
WEFT_INSTANCE(128, float, 128_float)
WEFT_INSTANCE(64, bf16, 64_bf16)
WEFT_INSTANCE(128, bf16, 128_bf16)
