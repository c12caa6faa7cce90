// The few GPU primitives that our kernels are written in, twice: as CUDA, and as plain C++ on a host.
//
// With WEFT_EMULATE the same kernel source is compiled by a host compiler and run by `launch`: each thread of a block is a fiber
// that runs until it waits at a barrier or a shuffle. Which fiber runs next is drawn from a seed, so that a missing barrier shows
// as a wrong result for some seed. Shared memory starts as NaN. No CUDA header is needed.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef WEFT_EMULATE
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#define WEFT_KERNEL static void
#define WEFT_DEVICE inline
#define WEFT_UNROLL

struct bf16 {
  uint16_t bits;
};

WEFT_DEVICE float wide(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Round to nearest, ties to even, as the GPU does.
WEFT_DEVICE bf16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

namespace emulator {

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Block {
  int threads = 0, current = 0, index = 0;
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<char> finished;
  std::vector<Barrier> warp_barriers;
  Barrier barrier;
  std::vector<float> exchange;
  std::vector<uint8_t> shared;
  ucontext_t scheduler;
  std::function<void()> body;
};

inline Block block;

inline void yield() { swapcontext(&block.fibers[block.current], &block.scheduler); }

// A barrier over `count` threads. Threads that have left the kernel do not arrive: the kernel hangs, as `launch` reports.
inline void wait(Barrier& barrier, int count) {
  long generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void enter() {
  block.body();
  block.finished[block.current] = 1;
  swapcontext(&block.fibers[block.current], &block.scheduler);
}

// Runs every block of the grid, one after the other. Returns false if the threads of a block wait for each other for ever.
inline bool launch(int blocks, int threads, size_t shared_bytes, uint64_t seed, std::function<void()> body) {
  std::mt19937_64 random(seed);
  block.body = body;
  block.threads = threads;
  block.stacks.resize(threads);
  for (auto& stack : block.stacks) stack.resize(1 << 17);
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  for (block.index = 0; block.index < blocks; ++block.index) {
    block.shared.assign(shared_bytes + 16, 0xff);
    block.fibers.assign(threads, ucontext_t());
    block.finished.assign(threads, 0);
    block.warp_barriers.assign((threads + 31) / 32, Barrier());
    block.barrier = Barrier();
    block.exchange.assign(threads, 0.f);
    for (int i = 0; i < threads; ++i) {
      getcontext(&block.fibers[i]);
      block.fibers[i].uc_stack.ss_sp = block.stacks[i].data();
      block.fibers[i].uc_stack.ss_size = block.stacks[i].size();
      block.fibers[i].uc_link = &block.scheduler;
      makecontext(&block.fibers[i], (void (*)())enter, 0);
    }
    int left = threads;
    for (long round = 0; left; ++round) {
      if (round > 10000000) return false;
      for (int i = threads - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
      for (int i : order) {
        if (block.finished[i]) continue;
        block.current = i;
        swapcontext(&block.scheduler, &block.fibers[i]);
        left -= block.finished[i];
      }
    }
  }
  return true;
}

}  // namespace emulator

WEFT_DEVICE int thread_index() { return emulator::block.current; }
WEFT_DEVICE int block_index() { return emulator::block.index; }
WEFT_DEVICE void sync_block() { emulator::wait(emulator::block.barrier, emulator::block.threads); }
WEFT_DEVICE float* shared_floats() { return (float*)emulator::block.shared.data(); }

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes of a warp must call it.
WEFT_DEVICE float shuffle_xor(float value, int mask) {
  int me = thread_index(), warp = me / 32;
  emulator::block.exchange[me] = value;
  emulator::wait(emulator::block.warp_barriers[warp], 32);
  float other = emulator::block.exchange[me ^ mask];
  emulator::wait(emulator::block.warp_barriers[warp], 32);
  return other;
}
#else
#include <cuda_bf16.h>

#define WEFT_KERNEL __global__ void
#define WEFT_DEVICE __device__ __forceinline__
#define WEFT_UNROLL _Pragma("unroll")

using bf16 = __nv_bfloat16;

WEFT_DEVICE float wide(bf16 x) { return __bfloat162float(x); }
WEFT_DEVICE bf16 narrow(float x) { return __float2bfloat16(x); }
WEFT_DEVICE int thread_index() { return threadIdx.x; }
WEFT_DEVICE int block_index() { return blockIdx.x; }
WEFT_DEVICE void sync_block() { __syncthreads(); }
WEFT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

WEFT_DEVICE float* shared_floats() {
  extern __shared__ __align__(16) uint8_t weft_shared[];
  return (float*)weft_shared;
}
#endif

WEFT_DEVICE float wide(float x) { return x; }
template <class T>
WEFT_DEVICE T narrow_to(float x);
template <>
WEFT_DEVICE float narrow_to<float>(float x) { return x; }
template <>
WEFT_DEVICE bf16 narrow_to<bf16>(float x) { return narrow(x); }

// The sum over the 32 lanes of a warp, in every lane.
WEFT_DEVICE float warp_sum(float value) {
  WEFT_UNROLL
  for (int mask = 16; mask; mask >>= 1) value += shuffle_xor(value, mask);
  return value;
}
