// Interval attention on sm_80 and later: which kernel does what, and how it is started. Used by attention_ops.cu and on a host.
#pragma once
#include "attention_forward.cuh"
#include "attention_key_grad.cuh"
#include "attention_query_grad.cuh"

enum class AttentionStep { FORWARD, SHARE, QUERY_GRAD, KEY_GRAD, LANDMARK_GRAD };

struct AttentionSizes {
  int own, step, shared;  // rows of a block's tile, step of its walk, bytes of shared memory
};

template <int D>
constexpr AttentionSizes attention_sizes(AttentionStep step) {
  using F = ForwardShape<D>;
  using Q = QueryGradShape<D>;
  using K = KeyGradShape<D>;
  switch (step) {
    case AttentionStep::FORWARD: return {F::OWN, F::STEP, F::SHARED};
    case AttentionStep::SHARE: return {ATTENTION_THREADS / (D / 8), 0, 0};
    case AttentionStep::QUERY_GRAD: return {Q::OWN, Q::STEP, Q::SHARED};
    default: return {K::OWN, K::STEP, K::SHARED};
  }
}

inline AttentionSizes attention_sizes(AttentionStep step, int width) {
  return width == 64 ? attention_sizes<64>(step) : attention_sizes<128>(step);
}
