// QK-norm and three-axis rotation of every head's row in one pass over memory, forward and backward.
//
// x [T H K] with strides, weight [K] float, cos and sin [T K/2] float (the three axes are already folded into the angles),
// y and dx [T H K] contiguous. One warp owns a row: lane l holds the pairs l, l + 32, ... so a load of one pair half is coalesced.
//     r = 1 / sqrt(mean(x^2) + eps);  n = x r w;  y = (n1 cos - n2 sin, n2 cos + n1 sin)
// Sums and angles are float whatever the type of x.
#pragma once
#include "prim.cuh"

constexpr int NORM_ROPE_THREADS = 256;

template <int PAIRS>
struct Row {
  float first[PAIRS], second[PAIRS];
};

template <int K, class T>
WEFT_DEVICE Row<K / 64> load_row(const T* row, int lane) {
  Row<K / 64> x;
  WEFT_UNROLL
  for (int e = 0; e < K / 64; ++e) {
    x.first[e] = wide(row[lane + 32 * e]);
    x.second[e] = wide(row[lane + 32 * e + K / 2]);
  }
  return x;
}

template <int K>
WEFT_DEVICE float inverse_rms(const Row<K / 64>& x, float eps) {
  float sum = 0.f;
  WEFT_UNROLL
  for (int e = 0; e < K / 64; ++e) sum += x.first[e] * x.first[e] + x.second[e] * x.second[e];
  return 1.f / sqrtf(warp_sum(sum) / K + eps);
}

template <int K, class T>
WEFT_KERNEL norm_rope_forward(const T* x, const float* weight, const float* cosine, const float* sine, T* y, int tokens, int heads,
                              int64_t stride_t, int64_t stride_h, float eps, int blocks) {
  int lane = thread_index() % 32, warps = NORM_ROPE_THREADS / 32;
  int64_t rows = (int64_t)tokens * heads;
  for (int64_t row = (int64_t)block_index() * warps + thread_index() / 32; row < rows; row += (int64_t)blocks * warps) {
    int64_t token = row / heads, head = row % heads;
    Row<K / 64> a = load_row<K>(x + token * stride_t + head * stride_h, lane);
    float r = inverse_rms<K>(a, eps);
    WEFT_UNROLL
    for (int e = 0; e < K / 64; ++e) {
      int pair = lane + 32 * e;
      float c = cosine[token * (K / 2) + pair], s = sine[token * (K / 2) + pair];
      float u = a.first[e] * r * weight[pair], v = a.second[e] * r * weight[pair + K / 2];
      y[row * K + pair] = narrow_to<T>(u * c - v * s);
      y[row * K + pair + K / 2] = narrow_to<T>(v * c + u * s);
    }
  }
}

// The same for keys, written straight to where they are kept, with the values beside them. Token t's place is slot[t] of a cache
// [pages 2 G PAGE K] (slot = page number * PAGE + place in the page; -1: kept nowhere). y [T G K] is written as well.
template <int K, class T>
WEFT_KERNEL norm_rope_store(const T* k, const T* v, const float* weight, const float* cosine, const float* sine, const int64_t* slot,
                            T* cache, T* y, int tokens, int groups, int64_t k_token, int64_t k_group, int64_t v_token,
                            int64_t v_group, int64_t page, float eps, int blocks) {
  int lane = thread_index() % 32, warps = NORM_ROPE_THREADS / 32;
  int64_t rows = (int64_t)tokens * groups;
  for (int64_t row = (int64_t)block_index() * warps + thread_index() / 32; row < rows; row += (int64_t)blocks * warps) {
    int64_t token = row / groups, group = row % groups, at = slot[token];
    Row<K / 64> a = load_row<K>(k + token * k_token + group * k_group, lane);
    float r = inverse_rms<K>(a, eps);
    T* kept = at < 0 ? nullptr : cache + ((at / page * 2 * groups + group) * page + at % page) * K;
    WEFT_UNROLL
    for (int e = 0; e < K / 64; ++e) {
      int pair = lane + 32 * e;
      float c = cosine[token * (K / 2) + pair], s = sine[token * (K / 2) + pair];
      float u = a.first[e] * r * weight[pair], w = a.second[e] * r * weight[pair + K / 2];
      T first = narrow_to<T>(u * c - w * s), second = narrow_to<T>(w * c + u * s);
      y[row * K + pair] = first;
      y[row * K + pair + K / 2] = second;
      if (!kept) continue;
      const T* value = v + token * v_token + group * v_group;
      kept[pair] = first;
      kept[pair + K / 2] = second;
      kept[groups * page * K + pair] = value[pair];
      kept[groups * page * K + pair + K / 2] = value[pair + K / 2];
    }
  }
}

// g = the gradient turned back; dx = r w g - r^3 x mean(x w g); the gradient of w is the sum of x r g over rows: each block writes
// its own part of it [blocks K], so the sum has one order and needs no atomics. dy [T H K] contiguous.
template <int K, class T>
WEFT_KERNEL norm_rope_backward(const T* dy, const T* x, const float* weight, const float* cosine, const float* sine, T* dx,
                               float* weight_parts, int tokens, int heads, int64_t stride_t, int64_t stride_h, float eps,
                               int blocks) {
  int lane = thread_index() % 32, warp = thread_index() / 32, warps = NORM_ROPE_THREADS / 32;
  int64_t rows = (int64_t)tokens * heads;
  Row<K / 64> total;
  WEFT_UNROLL
  for (int e = 0; e < K / 64; ++e) total.first[e] = total.second[e] = 0.f;
  for (int64_t row = (int64_t)block_index() * warps + warp; row < rows; row += (int64_t)blocks * warps) {
    int64_t token = row / heads, head = row % heads;
    Row<K / 64> a = load_row<K>(x + token * stride_t + head * stride_h, lane), g = load_row<K>(dy + row * K, lane);
    float r = inverse_rms<K>(a, eps), share = 0.f;
    WEFT_UNROLL
    for (int e = 0; e < K / 64; ++e) {
      int pair = lane + 32 * e;
      float c = cosine[token * (K / 2) + pair], s = sine[token * (K / 2) + pair];
      float u = g.first[e] * c + g.second[e] * s, v = g.second[e] * c - g.first[e] * s;
      total.first[e] += a.first[e] * r * u;
      total.second[e] += a.second[e] * r * v;
      g.first[e] = u * weight[pair];
      g.second[e] = v * weight[pair + K / 2];
      share += a.first[e] * g.first[e] + a.second[e] * g.second[e];
    }
    share = warp_sum(share) * r * r * r / K;
    WEFT_UNROLL
    for (int e = 0; e < K / 64; ++e) {
      int pair = lane + 32 * e;
      dx[row * K + pair] = narrow_to<T>(r * g.first[e] - share * a.first[e]);
      dx[row * K + pair + K / 2] = narrow_to<T>(r * g.second[e] - share * a.second[e]);
    }
  }
  float* shared = shared_floats();  // [warps K]
  WEFT_UNROLL
  for (int e = 0; e < K / 64; ++e) {
    shared[warp * K + lane + 32 * e] = total.first[e];
    shared[warp * K + lane + 32 * e + K / 2] = total.second[e];
  }
  sync_block();
  for (int channel = thread_index(); channel < K; channel += NORM_ROPE_THREADS) {
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += shared[w * K + channel];
    weight_parts[(int64_t)block_index() * K + channel] = sum;
  }
}
