// Interval attention for a host compiler, called from tests by ctypes: g++ -O2 -std=c++17 -shared -fPIC emulate_attention.cpp
#define WEFT_EMULATE
#include "attention.cuh"

template <class T, int D>
static bool run(AttentionStep step, AttentionCall call, int blocks, uint64_t seed) {
  return emulator::launch(blocks, ATTENTION_THREADS, attention_sizes<D>(step).shared, seed, [=] {
    switch (step) {
      case AttentionStep::FORWARD: return attention_forward<T, D>(call);
      case AttentionStep::SHARE: return attention_share<T, D>(call);
      case AttentionStep::QUERY_GRAD: return attention_query_grad<T, D>(call);
      default: return attention_key_grad<T, D>(call, step == AttentionStep::LANDMARK_GRAD);
    }
  });
}

// Runs one kernel. False on a fault, which `emulator_fault` names.
extern "C" bool attention_emulated(int step, bool half, int width, AttentionCall call, int blocks, uint64_t seed) {
  auto function = width == 64 ? (half ? run<fp16, 64> : run<bf16, 64>) : (half ? run<fp16, 128> : run<bf16, 128>);
  return function((AttentionStep)step, call, blocks, seed);
}

extern "C" void attention_emulated_sizes(int step, int width, int* sizes) {
  AttentionSizes of = attention_sizes((AttentionStep)step, width);
  sizes[0] = of.own;
  sizes[1] = of.step;
  sizes[2] = of.shared;
}

extern "C" const char* emulator_fault() { return emulator::block.fault ? emulator::block.fault : ""; }
extern "C" long emulator_bank_conflicts() { return emulator::block.bank_conflicts; }
