// The few GPU primitives that our kernels are written in, twice: as CUDA, and as plain C++ on a host (WEFT_EMULATE, emulator.cuh).
// Matrix instructions and asynchronous copies are in tensor_core.cuh. No CUDA header is needed on a host.
#pragma once
#include <math.h>
#include <stdint.h>

#ifdef WEFT_EMULATE
#include "emulator.cuh"

#define WEFT_KERNEL static void
#define WEFT_KERNEL_OF(THREADS) static void
#define WEFT_DEVICE inline
#define WEFT_UNROLL

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

WEFT_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
WEFT_DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

WEFT_DEVICE float wide(bf16 x) { return bits_float((uint32_t)x.bits << 16); }

WEFT_DEVICE float wide(fp16 x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, mantissa = x.bits & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
  float value = exponent ? bits_float((exponent + 112) << 23 | mantissa << 13) : mantissa * 0x1p-24f;
  return sign ? -value : value;
}

template <class T>
WEFT_DEVICE T narrow_to(float x);
template <>
WEFT_DEVICE float narrow_to<float>(float x) { return x; }

// Round to nearest, ties to even, as the GPU does.
template <>
WEFT_DEVICE bf16 narrow_to<bf16>(float x) {
  uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fff};
  return bf16{(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
WEFT_DEVICE fp16 narrow_to<fp16>(float x) {
  uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return fp16{0x7fff};
  if (size >= float_bits(65520.f)) return fp16{(uint16_t)(sign | 0x7c00u)};
  if (size < float_bits(0x1p-14f)) return fp16{(uint16_t)(sign | (uint32_t)nearbyintf(bits_float(size) * 0x1p24f))};
  return fp16{(uint16_t)(sign | (size - (112u << 23) + 0xfffu + (size >> 13 & 1u)) >> 13)};
}

// Two numbers in one register, the first in the lower half.
template <class T>
WEFT_DEVICE uint32_t pack(float low, float high) {
  return narrow_to<T>(low).bits | (uint32_t)narrow_to<T>(high).bits << 16;
}

template <class T>
WEFT_DEVICE void unpack(uint32_t two, float& low, float& high) {
  low = wide(T{(uint16_t)two});
  high = wide(T{(uint16_t)(two >> 16)});
}

WEFT_DEVICE int thread_index() { return emulator::block.current; }
WEFT_DEVICE int thread_again() { return thread_index(); }
WEFT_DEVICE int block_index() { return emulator::block.index; }
WEFT_DEVICE void sync_block() { emulator::barrier(emulator::block.all, emulator::block.threads, "barrier of the block"); }
WEFT_DEVICE void sync_warp() { emulator::barrier(emulator::block.warps[thread_index() / 32], 32, "barrier of a warp"); }
WEFT_DEVICE uint8_t* shared_bytes() { return emulator::block.shared; }
WEFT_DEVICE float power2(float x) { return exp2f(x); }

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes of a warp must call it.
template <class V>
WEFT_DEVICE V shuffle_xor(V value, int mask) {
  struct Post {
    V value;
    int mask;
    V other;
  } mine{value, mask, value};
  emulator::meet_warp("shuffle", mine, [](Post** lanes) {
    for (int i = 0; i < 32; ++i) lanes[i]->other = lanes[i ^ lanes[i]->mask]->value;
  });
  return mine.other;
}

// Sixteen bytes at once; both addresses are multiples of 16.
struct Bytes16 {
  uint32_t x, y, z, w;
};
WEFT_DEVICE Bytes16 load16(const void* from) {
  if ((uintptr_t)from % 16) emulator::fault("a load of 16 bytes is not aligned");
  Bytes16 value;
  memcpy(&value, from, 16);
  return value;
}
WEFT_DEVICE void store16(void* to, Bytes16 value) {
  if ((uintptr_t)to % 16) emulator::fault("a store of 16 bytes is not aligned");
  memcpy(to, &value, 16);
}
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define WEFT_KERNEL __global__ void
#define WEFT_KERNEL_OF(THREADS) __global__ void __launch_bounds__(THREADS)
#define WEFT_DEVICE __device__ __forceinline__
#define WEFT_UNROLL _Pragma("unroll")

using bf16 = __nv_bfloat16;
using fp16 = __half;

WEFT_DEVICE float wide(bf16 x) { return __bfloat162float(x); }
WEFT_DEVICE float wide(fp16 x) { return __half2float(x); }

template <class T>
WEFT_DEVICE T narrow_to(float x);
template <>
WEFT_DEVICE float narrow_to<float>(float x) { return x; }
template <>
WEFT_DEVICE bf16 narrow_to<bf16>(float x) { return __float2bfloat16(x); }
template <>
WEFT_DEVICE fp16 narrow_to<fp16>(float x) { return __float2half_rn(x); }

template <class T>
WEFT_DEVICE uint32_t pack(float low, float high);
template <>
WEFT_DEVICE uint32_t pack<bf16>(float low, float high) {
  __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *(uint32_t*)&two;
}
template <>
WEFT_DEVICE uint32_t pack<fp16>(float low, float high) {
  __half2 two = __floats2half2_rn(low, high);
  return *(uint32_t*)&two;
}

template <class T>
WEFT_DEVICE void unpack(uint32_t two, float& low, float& high);
template <>
WEFT_DEVICE void unpack<bf16>(uint32_t two, float& low, float& high) {
  low = __uint_as_float(two << 16);
  high = __uint_as_float(two & 0xffff0000u);
}
template <>
WEFT_DEVICE void unpack<fp16>(uint32_t two, float& low, float& high) {
  float2 both = __half22float2(*(__half2*)&two);
  low = both.x;
  high = both.y;
}

WEFT_DEVICE int thread_index() { return threadIdx.x; }
WEFT_DEVICE int block_index() { return blockIdx.x; }
// The same, read anew: what is derived from it is not kept in registers across a loop.
WEFT_DEVICE int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}
WEFT_DEVICE void sync_block() { __syncthreads(); }
WEFT_DEVICE void sync_warp() { __syncwarp(); }

template <class V>
WEFT_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

WEFT_DEVICE uint8_t* shared_bytes() {
  extern __shared__ __align__(1024) uint8_t weft_shared[];
  return weft_shared;
}

// 2^x to about 2 ulp, numbers below 2^-126 flushed to zero.
WEFT_DEVICE float power2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

using Bytes16 = uint4;
WEFT_DEVICE Bytes16 load16(const void* from) { return *(const uint4*)from; }
WEFT_DEVICE void store16(void* to, Bytes16 value) { *(uint4*)to = value; }
#endif

WEFT_DEVICE float wide(float x) { return x; }
WEFT_DEVICE float* shared_floats() { return (float*)shared_bytes(); }

// The sum over the 32 lanes of a warp, in every lane.
WEFT_DEVICE float warp_sum(float value) {
  WEFT_UNROLL
  for (int mask = 16; mask; mask >>= 1) value += shuffle_xor(value, mask);
  return value;
}
