// What blocks of one launch need of each other: a counter, and an order between writes and reads. And 16 bytes as floats.
//
// In the emulator several blocks of the grid are alive at once and take turns at random, so that a block can find another one's
// results half written: an arrival that is counted too early, or a counter that is not reset, shows as a wrong result.
#pragma once
#include "prim.cuh"

#ifdef WEFT_EMULATE
#include <memory>

#define WEFT_KERNEL_PAIRED(THREADS) static void

namespace emulator {

// One turn of the block: a random set of its warps runs as far as it can. Returns whether any of its threads is left.
inline bool turn(std::mt19937_64& random, std::vector<int>& order) {
  uint64_t awake = random();
  for (int attempt = 0; attempt < 2; ++attempt, awake = ~0ull) {
    bool moved = false, left = false;
    for (bool again = true; again && !block.fault;) {
      for (int i = block.threads - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
      again = false;
      for (int i : order) again |= (awake >> (i / 32) & 1) && !block.fault && resume(i);
      moved |= again;
    }
    for (const Thread& fiber : block.fibers) left |= !fiber.finished;
    if (!left || block.fault) return false;
    if (moved) return true;
  }
  block.fault = "threads wait for others that never come";
  return false;
}

// Like `launch`, with up to `alive` blocks begun and not done; which one has its turn is drawn from the seed.
inline bool launch_grid(int blocks, int threads, size_t shared_bytes, uint64_t seed, std::function<void()> body, size_t alive = 6) {
  std::mt19937_64 random(seed);
  std::vector<int> waiting(blocks), order(threads);
  for (int i = 0; i < blocks; ++i) waiting[i] = i;
  for (int i = 0; i < threads; ++i) order[i] = i;
  for (int i = blocks - 1; i > 0; --i) std::swap(waiting[i], waiting[random() % (i + 1)]);
  std::vector<std::unique_ptr<Block>> begun, spare;
  block.fault = nullptr;
  while (!waiting.empty() || !begun.empty()) {
    if (!waiting.empty() && begun.size() < alive && (begun.empty() || random() % 2)) {
      if (spare.empty()) spare.push_back(std::make_unique<Block>());
      begun.push_back(std::move(spare.back()));
      spare.pop_back();
      std::swap(block, *begun.back());  // a fiber's stack and counter keep their addresses
      block.body = body;
      block.threads = threads;
      block.index = waiting.back();
      waiting.pop_back();
      block.fibers.resize(threads);
      for (Thread& fiber : block.fibers) fiber.stack.resize(1 << 15);
      prepare(shared_bytes);
      std::swap(block, *begun.back());
    }
    std::unique_ptr<Block>& chosen = begun[random() % begun.size()];
    std::swap(block, *chosen);
    bool left = turn(random, order);
    const char* fault = block.fault;
    std::swap(block, *chosen);
    if (fault) {
      block.fault = fault;
      return false;
    }
    if (!left) {
      spare.push_back(std::move(chosen));
      std::swap(chosen, begun.back());
      begun.pop_back();
    }
  }
  return true;
}

}  // namespace emulator

// The threads of other blocks may run before and after each of these.
WEFT_DEVICE int add_one(int* counter) {
  emulator::yield();
  int before = (*counter)++;
  emulator::yield();
  return before;
}
WEFT_DEVICE void fence() { emulator::yield(); }
WEFT_DEVICE float load_fresh(const float* p) { return *p; }

WEFT_DEVICE void turn_angle(float turns, float* sine, float* cosine) {
  *sine = (float)sin(2 * M_PI * (double)turns);
  *cosine = (float)cos(2 * M_PI * (double)turns);
}

// Sixteen bytes of T as floats.
WEFT_DEVICE void widen(const Bytes16& raw, const float*, float* out) { memcpy(out, &raw, 16); }
template <class T>
WEFT_DEVICE void widen(const Bytes16& raw, const T*, float* out) {
  T value[8];
  memcpy(value, &raw, 16);
  for (int i = 0; i < 8; ++i) out[i] = wide(value[i]);
}
#else
// Two blocks per processor are enough: the compiler need not spill to fit a third.
#define WEFT_KERNEL_PAIRED(THREADS) __global__ void __launch_bounds__(THREADS, 2)

// Adds one to the counter and returns what it was.
WEFT_DEVICE int add_one(int* counter) { return atomicAdd(counter, 1); }
// Whoever sees what this thread writes after the fence sees what it wrote before.
WEFT_DEVICE void fence() { __threadfence(); }
// A load that does not trust the processor's own cache: for what another block has written.
WEFT_DEVICE float load_fresh(const float* p) { return __ldcg(p); }

// Sine and cosine of an angle in turns, at most half a turn: no slow path, hence no stack.
WEFT_DEVICE void turn_angle(float turns, float* sine, float* cosine) { sincospif(2.f * turns, sine, cosine); }

WEFT_DEVICE void widen(const Bytes16& raw, const float*, float* out) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  WEFT_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(words[i]);
}
WEFT_DEVICE void widen(const Bytes16& raw, const bf16*, float* out) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  WEFT_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(words[i] << 16);
    out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
WEFT_DEVICE void widen(const Bytes16& raw, const fp16*, float* out) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  WEFT_UNROLL
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __half2float(__ushort_as_half((unsigned short)(words[i] & 0xffffu)));
    out[2 * i + 1] = __half2float(__ushort_as_half((unsigned short)(words[i] >> 16)));
  }
}
#endif
