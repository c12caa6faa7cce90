// Tensor cores and asynchronous copies of sm_80 and later, twice: as PTX, and emulated on a host.
//
// Fragments are those of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): with g = lane / 4 and t = lane % 4
//     a[0], a[1]: rows g, g + 8, columns 2t, 2t + 1;   a[2], a[3]: the same rows, columns 2t + 8, 2t + 9
//     b[0], b[1]: rows 2t, 2t + 1 and 2t + 8, 2t + 9 of column g
//     d[0], d[1]: row g, columns 2t, 2t + 1;           d[2], d[3]: row g + 8
// Emulated, the target of a copy is NaN until the thread that started it has waited for its group.
#pragma once
#include "prim.cuh"

#ifdef WEFT_EMULATE
namespace emulator {

template <class T>
inline float half_of(uint32_t packed, int which) {
  return wide(T{(uint16_t)(packed >> 16 * which)});
}

// Conflicts of one group of eight row addresses: pairs that fall into the same four banks.
inline long conflicts(const uint8_t* const* rows) {
  long count = 0;
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) count += rows[i] != rows[j] && (rows[i] - rows[j]) % 128 == 0;
  return count;
}

template <bool TURNED>
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  struct Post {
    const uint8_t* row;
    uint32_t r[4];
  } mine{(const uint8_t*)row, {}};
  check_shared(row, 16, 16);
  meet_warp(TURNED ? "load of turned matrices" : "load of matrices", mine, [](Post** lanes) {
    for (int m = 0; m < 4; ++m) {
      const uint8_t* rows[8];
      for (int i = 0; i < 8; ++i) rows[i] = lanes[8 * m + i]->row;
      block.bank_conflicts += conflicts(rows);
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t two[2];
        for (int e = 0; e < 2; ++e) {
          int row = TURNED ? 2 * (lane % 4) + e : lane / 4, column = TURNED ? lane / 4 : 2 * (lane % 4) + e;
          memcpy(&two[e], rows[row] + 2 * column, 2);
        }
        lanes[lane]->r[m] = two[0] | (uint32_t)two[1] << 16;
      }
    }
  });
  memcpy(r, mine.r, sizeof r);
}

}  // namespace emulator

WEFT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) { emulator::load_matrices<false>(r, row); }
WEFT_DEVICE void load_turned(uint32_t (&r)[4], const void* row) { emulator::load_matrices<true>(r, row); }

template <class T>
WEFT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Post {
    uint32_t a[4], b[2];
    float d[4];
  } mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {}};
  emulator::meet_warp("matrix product", mine, [](Post** lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      int g = lane / 4, t = 2 * (lane % 4);
      for (int e = 0; e < 2; ++e) {
        for (int j = 0; j < 4; ++j) left[g + 8 * (j % 2)][t + e + 8 * (j / 2)] = emulator::half_of<T>(lanes[lane]->a[j], e);
        for (int j = 0; j < 2; ++j) right[t + e + 8 * j][g] = emulator::half_of<T>(lanes[lane]->b[j], e);
      }
    }
    for (int row = 0; row < 16; ++row) {
      float sum[8] = {};
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sum[column] += left[row][k] * right[k][column];
      for (int column = 0; column < 8; ++column) lanes[row % 8 * 4 + column / 2]->d[row / 8 * 2 + column % 2] = sum[column];
    }
  });
  for (int j = 0; j < 4; ++j) d[j] += mine.d[j];
}

template <int BYTES>
WEFT_DEVICE void copy_async(void* to, const void* from, bool exists = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  emulator::start_copy(to, from, BYTES, exists);
}
WEFT_DEVICE void commit_copies() { emulator::commit_copies(); }
template <int LEFT>
WEFT_DEVICE void wait_copies() {
  emulator::land_copies(LEFT);
}
#else
WEFT_DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// Four 8 x 8 matrices of 16-bit numbers from shared memory. Lane i gives the row i % 8 of matrix i / 8, 16 bytes on a multiple of 16;
// r[m] holds the numbers 2t and 2t + 1 of row g of matrix m.
WEFT_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// The same with each matrix turned: r[m] holds the numbers of rows 2t and 2t + 1 in column g.
WEFT_DEVICE void load_turned(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}

// d += a b, with a 16 x 16, b 16 x 8, d 16 x 8 over the lanes of a warp; products of T summed in float.
template <class T>
WEFT_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define WEFT_MULTIPLY_ADD(T, NAME)                                                                                            \
  template <>                                                                                                                 \
  WEFT_DEVICE void multiply_add<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                         \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
                 "{%0, %1, %2, %3};"                                                                                          \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                             \
  }
WEFT_MULTIPLY_ADD(bf16, "bf16")
WEFT_MULTIPLY_ADD(fp16, "f16")
#undef WEFT_MULTIPLY_ADD

// Starts a copy from global to shared memory, both on multiples of BYTES; zeros where `exists` is false (`from` is not read then).
template <int BYTES>
WEFT_DEVICE void copy_async(void* to, const void* from, bool exists = true) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
  int size = exists ? BYTES : 0;
  if (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(size));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(size));
}

// Closes the group of copies that this thread has started.
WEFT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest LEFT groups of this thread have landed; others see them after a barrier.
template <int LEFT>
WEFT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
#endif
