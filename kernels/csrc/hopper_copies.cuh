// Barriers that count bytes, and copies that Hopper's copy engine makes, twice: as PTX for sm_90a, and emulated on a host.
//
// A barrier's phase ends when its arrivals have come and the bytes that they announced have landed; `wait` names the parity of the
// phase that it waits for (PTX ISA, "mbarrier"). Tiles lie in shared memory as wgmma reads them: rows of 64 numbers (128 bytes), the
// 16-byte pieces of a row permuted by its number modulo 8 (the 128-byte swizzle, a function of the address).
//
// Emulated, the target of a copy is NaN from its start until somebody waits for its barrier, the latest moment that the hardware
// could take; an overrun of bytes, an arrival too many and a barrier that was not made are faults.
#pragma once
#include "tensor_core.cuh"

using Barrier = uint64_t;

#ifdef WEFT_EMULATE
#include <map>

#define WEFT_CONSTANT const

// [total heads width] numbers of 16 bits as the copy engine sees them: strides count numbers, boxes are 64 channels of `rows` rows.
struct TileMap {
  const uint16_t* base;
  int64_t row, head;
  int width, heads, total, rows;
};

namespace emulator {

constexpr uint64_t MADE = 0x7ea5ab1eba991e45;

struct Landing {
  uint8_t* to;
  const uint8_t* from;  // null: zeros
  int bytes;
};

struct Counter {
  int expected = 0, missing = 0;
  long bytes = 0, phase = 0, events = 0;
  std::vector<Landing> copies;
};

inline std::map<const Barrier*, Counter> counters;

inline Counter& counter(Barrier* barrier) {
  check_shared(barrier, 8, 8);
  if (*barrier != MADE) fault("a barrier is used that was not made");
  return counters[barrier];
}

// The phase ends if all have arrived and all bytes land.
inline void settle(Counter& c) {
  if (c.missing) return;
  for (const Landing& copy : c.copies) {
    if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
    else memset(copy.to, 0, copy.bytes);
    c.bytes -= copy.bytes;
  }
  c.copies.clear();
  if (c.bytes < 0) fault("more bytes came to a barrier than were announced");
  if (c.bytes) return;
  c.missing = c.expected;
  ++c.phase;
  ++c.events;
}

inline void arrive(Barrier* barrier, int bytes) {
  Counter& c = counter(barrier);
  if (c.missing == 0) fault("more arrivals at a barrier than it was made for");
  c.bytes += bytes;
  --c.missing;
  ++c.events;
  if (c.bytes == 0 && c.copies.empty()) settle(c);
}

inline void start_landing(Barrier* barrier, void* to, const void* from, int bytes) {
  Counter& c = counter(barrier);
  memset(to, 0xff, bytes);
  c.copies.push_back({(uint8_t*)to, (const uint8_t*)from, bytes});
  ++c.events;
}

// True if no copy is on its way; a block must not end before.
inline bool all_landed() {
  for (const auto& each : counters)
    if (!each.second.copies.empty()) return false;
  return true;
}

}  // namespace emulator

WEFT_DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)((const uint8_t*)pointer - emulator::block.shared); }

WEFT_DEVICE void make_barrier(Barrier* barrier, int arrivals) {
  emulator::check_shared(barrier, 8, 8);
  *barrier = emulator::MADE;
  emulator::counters[barrier] = emulator::Counter();
  emulator::counters[barrier].expected = emulator::counters[barrier].missing = arrivals;
}
WEFT_DEVICE void barriers_made() {}
WEFT_DEVICE void arrive(Barrier* barrier) { emulator::arrive(barrier, 0); }
WEFT_DEVICE void arrive_expecting(Barrier* barrier, int bytes) { emulator::arrive(barrier, bytes); }
WEFT_DEVICE void wait(Barrier* barrier, int parity) {
  emulator::Counter& c = emulator::counter(barrier);
  while ((c.phase & 1) == parity) {
    emulator::settle(c);
    if ((c.phase & 1) == parity) emulator::wait_while(c.events, c.events);
  }
}
WEFT_DEVICE void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
  emulator::check_shared(to, bytes, 16);
  if ((uintptr_t)from % 16 || bytes % 16) emulator::fault("a bulk copy is not aligned");
  emulator::start_landing(barrier, to, from, bytes);
}
WEFT_DEVICE void copy_tile(void* to, const TileMap& map, int channel, int head, int row, Barrier* barrier) {
  emulator::check_shared(to, map.rows * 128, 1024);
  if (channel + 64 > map.width || head >= map.heads || row < 0) emulator::fault("a tile is outside its tensor");
  for (int r = 0; r < map.rows; ++r)
    for (int piece = 0; piece < 8; ++piece) {
      uint8_t* at = (uint8_t*)to + r * 128 + ((piece ^ (r & 7)) << 4);
      const uint16_t* from = map.base + (row + r) * map.row + head * map.head + channel + piece * 8;
      emulator::start_landing(barrier, at, row + r < map.total ? from : nullptr, 16);
    }
}
WEFT_DEVICE void finish_copies() {
  emulator::commit_copies();
  emulator::land_copies(0);
}
WEFT_DEVICE void finish_reads() {}
template <int COUNT>
WEFT_DEVICE void take_registers() {}
template <int COUNT>
WEFT_DEVICE void give_registers() {}
#else
#include <cuda.h>

#define WEFT_CONSTANT const __grid_constant__

using TileMap = CUtensorMap;

// One thread makes the barriers, says so, and the block meets before anyone uses them.
WEFT_DEVICE void make_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
WEFT_DEVICE void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

WEFT_DEVICE void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and announces copies to this barrier of that many bytes together.
WEFT_DEVICE void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits for the end of the phase of that parity; of a new barrier, phase 0 is on and the one before it has ended.
WEFT_DEVICE void wait(Barrier* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// `bytes` side by side; both addresses and the count are multiples of 16.
WEFT_DEVICE void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// The map's box of rows from `row` on, 64 channels from `channel` on, of one head; zeros past the last row. `to` is a multiple of 1024.
WEFT_DEVICE void copy_tile(void* to, const TileMap& map, int channel, int head, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(channel), "r"(head), "r"(row)
      : "memory");
}

// Waits for this thread's `copy_async`s and shows them to wgmma, which reads through another proxy.
WEFT_DEVICE void finish_copies() { asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory"); }

// Before a warp lets go of what it has read by plain loads: the copy engine, which writes there next, is another proxy.
WEFT_DEVICE void finish_reads() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers per thread from here on: all warps of a warp group call it together.
template <int COUNT>
WEFT_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
WEFT_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
#endif
