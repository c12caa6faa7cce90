// A block of GPU threads on a host: each thread is a fiber that runs until it waits for others.
//
// What it is strict about, so that a wrong kernel shows it:
// - Order. A random set of warps runs as far as it can while the others sleep, their threads in random order; then another set.
//   Blocks run in random order, one after the other. Everything is drawn from one seed.
// - Memory. Shared memory starts as NaN. The target of an asynchronous copy is NaN from its start until its thread waits for it.
// - Meetings. The threads of a warp must come to the same operation; threads that wait for ever are a fault, not a hang.
// - Addresses. Operands that the hardware wants aligned, or in shared memory, are checked; bank conflicts of matrix loads counted.
#pragma once
#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <random>
#include <vector>

namespace emulator {

// Where threads wait for each other: a barrier, or an operation of a whole warp.
struct Meeting {
  int arrived = 0;
  long generation = 0;
  const char* kind = nullptr;
  void* posted[128] = {};
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  ucontext_t start;
  jmp_buf here;
  std::vector<char> stack;
  bool started = false, finished = false;
  const long* counter = nullptr;  // waits while *counter == value
  long value = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Block {
  int threads = 0, current = 0, index = 0;
  std::vector<Thread> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<uint8_t> memory;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  const char* fault = nullptr;
  long bank_conflicts = 0;
};

inline Block block;

inline Thread& self() { return block.fibers[block.current]; }

inline void yield() {
  if (!_setjmp(self().here)) _longjmp(block.scheduler, 1);
}

// The thread sleeps until someone changes the counter.
inline void wait_while(const long& counter, long value) {
  self().counter = &counter;
  self().value = value;
  while (counter == value) yield();
  self().counter = nullptr;
}

// The kernel is wrong: `launch` ends and says why.
inline void fault(const char* reason) {
  if (!block.fault) block.fault = reason;
  for (;;) yield();
}

// `count` threads meet, each with a `Post` of its own; the last to come runs act(Post**) on all of them, then all go on.
template <class Post, class Act>
inline void meet(Meeting& meeting, int count, const char* kind, Post& mine, Act act) {
  if (meeting.arrived == 0) meeting.kind = kind;
  if (meeting.kind != kind) fault("threads that should act together are at different operations");
  if (count <= 128) meeting.posted[block.current % count] = &mine;
  if (++meeting.arrived == count) {
    meeting.arrived = 0;
    act((Post**)meeting.posted);
    ++meeting.generation;
    return;
  }
  wait_while(meeting.generation, meeting.generation);
}

template <class Post, class Act>
inline void meet_warp(const char* kind, Post& mine, Act act) {
  meet(block.warps[block.current / 32], 32, kind, mine, act);
}

inline void barrier(Meeting& meeting, int count, const char* kind) {
  int nothing = 0;
  meet(meeting, count, kind, nothing, [](int**) {});
}

// Faults unless `bytes` at `address` are aligned and inside this block's shared memory.
inline void check_shared(const void* address, int bytes, int alignment) {
  const uint8_t* at = (const uint8_t*)address;
  if (at < block.shared || at + bytes > block.shared + block.shared_bytes) fault("an address is outside shared memory");
  if ((at - block.shared) % alignment) fault("an address in shared memory is not aligned");
}

inline void start_copy(void* to, const void* from, int bytes, bool exists) {
  check_shared(to, bytes, bytes);
  if (exists && (uintptr_t)from % bytes) fault("the source of an asynchronous copy is not aligned");
  memset(to, 0xff, bytes);
  self().open.push_back({to, exists ? from : nullptr, bytes});
}

inline void commit_copies() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

// All but the newest `left` groups of this thread land.
inline void land_copies(size_t left) {
  for (; self().groups.size() > left; self().groups.pop_front()) {
    for (const Copy& copy : self().groups.front()) {
      if (copy.from) memcpy(copy.to, copy.from, copy.bytes);
      else memset(copy.to, 0, copy.bytes);
    }
  }
}

inline void enter() {
  block.body();
  self().finished = true;
  _longjmp(block.scheduler, 1);
}

// Runs a thread until it waits. False if it has nothing to do.
inline bool resume(int thread) {
  Thread& fiber = block.fibers[thread];
  if (fiber.finished || (fiber.counter && *fiber.counter == fiber.value)) return false;
  block.current = thread;
  if (!_setjmp(block.scheduler)) {
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  return true;
}

inline void prepare(size_t shared_bytes) {
  block.memory.assign(shared_bytes + 1024, 0xff);
  block.shared = (uint8_t*)(((uintptr_t)block.memory.data() + 1023) & ~(uintptr_t)1023);
  block.shared_bytes = shared_bytes;
  block.warps.assign((block.threads + 31) / 32, Meeting());
  block.all = Meeting();
  for (Thread& fiber : block.fibers) {
    fiber.started = fiber.finished = false;
    fiber.counter = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, (void (*)())enter, 0);
  }
}

// Runs the block's threads to their end, or to a fault.
inline void run_block(std::mt19937_64& random) {
  std::vector<int> order(block.threads);
  for (int i = 0; i < block.threads; ++i) order[i] = i;
  for (bool every = false;;) {
    uint64_t awake = every ? ~0ull : random();
    bool moved = false;
    for (bool again = true; again && !block.fault;) {
      for (int i = block.threads - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
      again = false;
      for (int i : order) again |= (awake >> (i / 32) & 1) && !block.fault && resume(i);
      moved |= again;
    }
    bool left = false;
    for (const Thread& fiber : block.fibers) left |= !fiber.finished;
    if (!left || block.fault) return;
    if (every && !moved) block.fault = "threads wait for others that never come";
    every = !moved;
  }
}

// Runs every block of the grid. Returns false on a fault; block.fault says which.
inline bool launch(int blocks, int threads, size_t shared_bytes, uint64_t seed, std::function<void()> body) {
  std::mt19937_64 random(seed);
  block.body = body;
  block.threads = threads;
  block.fault = nullptr;
  block.bank_conflicts = 0;
  block.fibers.resize(threads);
  for (Thread& fiber : block.fibers) fiber.stack.resize(1 << 17);
  std::vector<int> order(blocks);
  for (int i = 0; i < blocks; ++i) order[i] = i;
  for (int i = blocks - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  for (int i : order) {
    block.index = i;
    prepare(shared_bytes);
    run_block(random);
    if (block.fault) return false;
  }
  return true;
}

}  // namespace emulator
