// Interval attention for Hopper for a host compiler, called from tests by ctypes: g++ -O2 -std=c++17 -shared -fPIC emulate_hopper.cpp
#define WEFT_EMULATE
#include "attention_hopper.cuh"

static TileMap map_of(const void* base, int64_t row, int64_t head, int width, int heads, int total, int rows) {
  return {(const uint16_t*)base, row, head, width, heads, total, rows};
}

template <class T, int D>
static bool run(const HopperCall& call, int blocks, uint64_t seed) {
  emulator::reset_products(HOPPER_THREADS);
  emulator::counters.clear();
  return emulator::launch(blocks, HOPPER_THREADS, HopperShape<D>::SHARED, seed, [&] {
    attention_hopper<T, D>(call);
    const auto& mine = emulator::running[thread_index()];
    if (!mine.open.empty() || !mine.groups.empty()) emulator::fault("a thread ends before its products");
    sync_block();
    if (!emulator::all_landed()) emulator::fault("a block ends before its copies");
  });
}

// Runs the kernel. False on a fault, which `emulator_fault` names.
extern "C" bool hopper_emulated(bool half, int width, AttentionCall c, const int* lives, int blocks, uint64_t seed) {
  int kv_heads = c.heads / c.group, own = HopperShape<64>::OWN / HOPPER_GROUPS, step = HopperShape<64>::STEP;
  HopperCall call = {map_of(c.q, c.q_t, c.q_h, width, c.heads, c.total, own),
                     map_of(c.k, c.k_t, c.k_h, width, kv_heads, c.total, step),
                     map_of(c.v, c.v_t, c.v_h, width, kv_heads, c.total, step), c, lives};
  auto function = width == 64 ? (half ? run<fp16, 64> : run<bf16, 64>) : (half ? run<fp16, 128> : run<bf16, 128>);
  return function(call, blocks, seed);
}

extern "C" void hopper_emulated_sizes(int width, int* sizes) {
  sizes[0] = HopperShape<64>::OWN;
  sizes[1] = HopperShape<64>::STEP;
  sizes[2] = width == 64 ? HopperShape<64>::SHARED : HopperShape<128>::SHARED;
}

extern "C" const char* emulator_fault() { return emulator::block.fault ? emulator::block.fault : ""; }
