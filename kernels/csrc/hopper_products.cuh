// Matrix products of a warp group (wgmma, four warps, 64 rows), twice: as PTX for sm_90a, and emulated on a host.
//
// A product starts and goes on by itself: what it reads must stay, and its sums must not be looked at, until its group was waited
// for. Sums lie as those of mma.m16n8k16 do: d[n] are columns 8n .. 8n + 7 of the warp's 16 rows (tensor_core.cuh).
//
// Emulated, sums are NaN until they were waited for; a product without a fence after registers may have changed, threads with
// different operands, and shared memory that changes under a running product are faults.
#pragma once
#include "hopper_copies.cuh"

// A tile in shared memory with the 128-byte swizzle, as a product wants to be told of it (PTX ISA, "Matrix Descriptor Format"): groups
// of eight rows are 1024 bytes apart; `leading` bytes lie between chunks of 64 columns, where a product crosses them.
WEFT_DEVICE uint64_t tile_view(const void* tile, int leading = 16) {
  return (uint64_t)((shared_address(tile) & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

#ifdef WEFT_EMULATE
#include <memory>

namespace emulator {

// What a running product reads: places in shared memory and what was there when it started.
using Read = std::vector<std::pair<const uint16_t*, uint16_t>>;

struct Product {
  float* to;
  std::vector<float> sums;
  std::shared_ptr<Read> read;
};

struct Products {
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;

  template <class Function>
  void each(Function function) {
    for (auto& group : groups)
      for (Product& product : group) function(product);
    for (Product& product : open) function(product);
  }
};

inline std::vector<Products> running;    // per thread
inline std::vector<Meeting> warp_groups;  // products, barriers

inline void reset_products(int threads) {
  running.assign(threads, Products());
  warp_groups.assign(2 * ((threads + 127) / 128), Meeting());
}

// The number of outer index `outer` (a row of A, a column of B) and inner index `inner`. turned: outer indices lie side by side.
inline uint16_t element(uint64_t view, bool turned, int outer, int inner, Read& read) {
  if (view >> 62 != 1) fault("a product reads a tile without the 128-byte swizzle");
  uint32_t start = (view & 0x3fff) << 4, leading = (view >> 16 & 0x3fff) << 4, stride = (view >> 32 & 0x3fff) << 4;
  uint32_t at = turned ? start + outer / 64 * leading + outer % 64 * 2 + inner / 8 * stride + inner % 8 * 128
                       : start + outer / 8 * stride + outer % 8 * 128 + inner * 2;
  at ^= (at >> 7 & 7) << 4;
  const uint16_t* place = (const uint16_t*)(block.shared + at);
  check_shared(place, 2, 2);
  read.push_back({place, *place});
  return *place;
}

template <class T, int N, bool TURNED>
inline void start_product(float* d, const uint32_t* a, uint64_t a_view, uint64_t b_view, bool add) {
  struct Post {
    float* d;
    const uint32_t* a;
    uint64_t a_view, b_view;
    bool add;
  } mine{d, a, a_view, b_view, add};
  if (!running[block.current].fenced) fault("a product of a warp group starts without a fence");
  int first = block.current / 128 * 128;
  meet(warp_groups[first / 64], 128, "product of a warp group", mine, [first](Post** lanes) {
    auto read = std::make_shared<Read>();
    static float left[64][16], right[16][N];
    for (int i = 0; i < 128; ++i)
      if (lanes[i]->a_view != lanes[0]->a_view || lanes[i]->b_view != lanes[0]->b_view || lanes[i]->add != lanes[0]->add)
        fault("threads of a warp group ask for different products");
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < N; ++n) right[k][n] = wide(T{element(lanes[0]->b_view, TURNED, n, k, *read)});
    for (int row = 0; row < 64; ++row)
      for (int k = 0; k < 16; ++k)
        if (lanes[0]->a) {
          int lane = row / 16 * 32 + row % 8 * 4 + k % 8 / 2;
          left[row][k] = half_of<T>(lanes[lane]->a[row / 8 % 2 + k / 8 * 2], k % 2);
        } else {
          left[row][k] = wide(T{element(lanes[0]->a_view, false, row, k, *read)});
        }
    for (int i = 0; i < 128; ++i) {
      Products& thread = running[first + i];
      const float* before = lanes[i]->d;
      thread.each([&](Product& product) {
        if (product.to == lanes[i]->d) before = product.sums.data();  // the newest
      });
      Product product{lanes[i]->d, std::vector<float>(N / 2), read};
      for (int j = 0; j < N / 2; ++j) {
        int row = i / 32 * 16 + i % 32 / 4 + j / 2 % 2 * 8, column = j / 4 * 8 + i % 4 * 2 + j % 2;
        float sum = 0.f;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        product.sums[j] = lanes[i]->add ? before[j] + sum : sum;
      }
      memset(lanes[i]->d, 0xff, N / 2 * sizeof(float));
      thread.open.push_back(std::move(product));
    }
  });
}

// A warp comes to one of the operations around products; that is when other threads may get ahead of it.
inline Products& together(const char* kind) {
  barrier(block.warps[block.current / 32], 32, kind);
  return running[block.current];
}

// All but the newest `left` groups of this thread's products end.
inline void end_products(size_t left) {
  Products& mine = together("wait for products");
  for (; mine.groups.size() > left; mine.groups.pop_front()) {
    for (const Product& product : mine.groups.front()) {
      if (block.current % 32 == 0)
        for (const auto& [place, before] : *product.read)
          if (*place != before) fault("shared memory changed under a product");
      bool last = true;
      for (size_t i = 1; i < mine.groups.size(); ++i)
        for (const Product& later : mine.groups[i]) last &= later.to != product.to;
      for (const Product& later : mine.open) last &= later.to != product.to;
      if (last) memcpy(product.to, product.sums.data(), product.sums.size() * sizeof(float));
    }
  }
  mine.fenced = false;
}

}  // namespace emulator

template <class T, int N>
WEFT_DEVICE void multiply_tiles(float (&d)[N][4], uint64_t a, uint64_t b, bool add) {
  emulator::start_product<T, 8 * N, false>(&d[0][0], nullptr, a, b, add);
}
template <class T, int N>
WEFT_DEVICE void multiply_registers(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b) {
  emulator::start_product<T, 8 * N, true>(&d[0][0], a, 0, b, true);
}
template <int N>
WEFT_DEVICE void hold(float (&)[N][4]) {}
WEFT_DEVICE void fence_products() { emulator::together("fence of products").fenced = true; }
WEFT_DEVICE void commit_products() {
  emulator::Products& mine = emulator::together("group of products");
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <int LEFT>
WEFT_DEVICE void wait_products() {
  emulator::end_products(LEFT);
}
WEFT_DEVICE void sync_warp_group(int group) {
  emulator::barrier(emulator::warp_groups[2 * group + 1], 128, "barrier of a warp group");
}
#else
#define WEFT_SUM(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define WEFT_SUMS_8(d, n) \
  WEFT_SUM(d, n), WEFT_SUM(d, n + 1), WEFT_SUM(d, n + 2), WEFT_SUM(d, n + 3), WEFT_SUM(d, n + 4), WEFT_SUM(d, n + 5), \
      WEFT_SUM(d, n + 6), WEFT_SUM(d, n + 7)
#define WEFT_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, " \
  "%27, %28, %29, %30, %31"
#define WEFT_NAMES_64 \
  WEFT_NAMES_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, " \
  "%57, %58, %59, %60, %61, %62, %63"

// d = a b^T (+ d): a 64 x 16 and b 8N x 16 in shared memory, rows of channels.
template <class T, int N>
WEFT_DEVICE void multiply_tiles(float (&d)[N][4], uint64_t a, uint64_t b, bool add);
// d += a b: a 64 x 16 in registers, b 16 x 8N in shared memory, rows of columns.
template <class T, int N>
WEFT_DEVICE void multiply_registers(float (&d)[N][4], const uint32_t (&a)[4], uint64_t b);

#define WEFT_PRODUCTS(T, NAME)                                                                                                   \
  template <>                                                                                                                    \
  WEFT_DEVICE void multiply_tiles<T, 16>(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" \
                 WEFT_NAMES_64 "}, %64, %65, add, 1, 1, 0, 0;\n}"                                                                \
                 : WEFT_SUMS_8(d, 0), WEFT_SUMS_8(d, 8)                                                                          \
                 : "l"(a), "l"(b), "r"((int)add));                                                                               \
  }                                                                                                                              \
  template <>                                                                                                                    \
  WEFT_DEVICE void multiply_registers<T, 16>(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {                            \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {"   \
                 WEFT_NAMES_64 "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1;\n}"                                                  \
                 : WEFT_SUMS_8(d, 0), WEFT_SUMS_8(d, 8)                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                          \
  }                                                                                                                              \
  template <>                                                                                                                    \
  WEFT_DEVICE void multiply_registers<T, 8>(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {                              \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {"    \
                 WEFT_NAMES_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1;\n}"                                                  \
                 : WEFT_SUMS_8(d, 0)                                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                          \
  }
WEFT_PRODUCTS(bf16, "bf16")
WEFT_PRODUCTS(fp16, "f16")
#undef WEFT_PRODUCTS
#undef WEFT_NAMES_64
#undef WEFT_NAMES_32
#undef WEFT_SUMS_8
#undef WEFT_SUM

// The compiler moves no use of these sums across this place.
template <int N>
WEFT_DEVICE void hold(float (&d)[N][4]) {
  WEFT_UNROLL
  for (int n = 0; n < N; ++n)
    WEFT_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(d[n][e])::"memory");
}

// Between the last change of registers by this thread and the first product that takes them.
WEFT_DEVICE void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes the group of products that this warp group has started.
WEFT_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the newest LEFT groups have ended.
template <int LEFT>
WEFT_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// The 128 threads of warp group `group` meet.
WEFT_DEVICE void sync_warp_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
#endif
