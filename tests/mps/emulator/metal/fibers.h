// Runs a Metal grid on one host thread: a fiber for each Metal thread of a threadgroup, barriers and SIMD groups.
#pragma once
#include <sys/mman.h>

#include <unordered_map>

#include "types.h"

namespace fibers {

constexpr uint simd_width = 32;
constexpr size_t stack_bytes = 32768;
constexpr uint64_t threadgroup_memory_limit = 32768;

// Any order of threads, SIMD groups and threadgroups is legal on Metal: a result that depends on it is a race.
enum class Order { forward = 0, reverse = 1, rotated = 2 };

inline uint nth(Order order, uint i, uint count) {
  if (order == Order::reverse) return count - 1 - i;
  if (order == Order::rotated) return (i + count / 2) % count;
  return i;
}

// Read by Python as an array of uint64: keep the names in shader.py in this order.
struct Statistics {
  uint64_t groups, threads, barriers, simd_operations, partial_simd_operations, divergent_barriers, divergent_simd,
      threadgroup_bytes, out_of_bounds, absent_lane_reads, racing_accesses;
};

enum class Lane { sum, product, max, min, broadcast, shuffle_down, shuffle_fill_down, any, all, ballot };
using Resolve = void (*)(struct LaneRequest** requests, const uint* lanes, int count);

// What one thread brings to an operation of its SIMD group, and gets back.
struct LaneRequest {
  Lane operation;
  Resolve resolve;
  int line;
  uint32_t argument;
  uint64_t value, fill, result;
};

enum class Status { ready, at_simd_operation, at_barrier, done };

struct Fiber {
  void* stack_pointer;
  Status status;
  LaneRequest* request;
  int line;
  uint3 grid_position, group_position;
};

using Body = void (*)(void** buffers, uint3 grid_position, uint3 group_position);

struct Scheduler {
  Fiber* current = nullptr;
  void* stack_pointer = nullptr;
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  size_t stack_count = 0;
  Body body = nullptr;
  void** buffers = nullptr;
  std::vector<const void*> poisoned;
  uint64_t group_bytes = 0;
};

static thread_local Scheduler scheduler;
static thread_local Statistics statistics;
static thread_local std::string error;

inline void fail(const std::string& what) {
  if (error.empty()) error = what;
}

// In a kernel that writes what it reads under another name: memory that one thread writes and another reads. What a
// threadgroup has read before a barrier, a thread of it may overwrite after; nothing else orders device memory.
struct Races {
  struct Touched {
    uint64_t reader = 0, writer = 0, group = 0, phase = 0;  // of the readers: their group, and the phase of the last
  };
  bool watching = false;
  uint64_t count = 0;
  uint64_t thread = 0;  // the Metal thread that runs, counted from 1
  uint64_t group = 0, phase = 0;  // its threadgroup, counted from 1, and how many barriers were passed
  std::unordered_map<const void*, Touched> memory;

  void start(bool watch) {
    watching = watch;
    count = 0;
    memory.clear();
  }
  void run(uint3 position) { thread = 1 + position.x + (uint64_t(position.y) << 24) + (uint64_t(position.z) << 48); }
  void access(const void* address, bool write) {
    Touched& touched = memory[address];
    const uint64_t other = write ? touched.reader : touched.writer;
    const bool done_reading = write && touched.group == group && touched.phase < phase;
    count += other != 0 && other != thread && !done_reading;
    if (!write) {
      touched.group = touched.group == 0 || touched.group == group ? group : ~uint64_t{0};
      touched.phase = phase;
    }
    uint64_t& mine = write ? touched.writer : touched.reader;
    mine = mine == 0 || mine == thread ? thread : ~uint64_t{0};
  }
};
static thread_local Races races;

#if !defined(__x86_64__)
#error "fibers.h switches stacks in x86-64 assembly"
#endif
extern "C" void fibers_switch(void** save_stack_pointer, void* load_stack_pointer);
asm(R"(
.text
.globl fibers_switch
.hidden fibers_switch
.type fibers_switch, @function
fibers_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fibers_switch, .-fibers_switch
)");

static void yield() { fibers_switch(&scheduler.current->stack_pointer, scheduler.stack_pointer); }

static void wait_at_barrier(int line) {
  scheduler.current->line = line;
  scheduler.current->status = Status::at_barrier;
  yield();
}

static void wait_for_simd_group(LaneRequest& request) {
  scheduler.current->request = &request;
  scheduler.current->status = Status::at_simd_operation;
  yield();
}

// Threadgroup memory starts undefined on Metal: all ones, a NaN, the first time a threadgroup meets a variable.
static void poison(void* variable, size_t bytes) {
  for (const void* seen : scheduler.poisoned)
    if (seen == variable) return;
  scheduler.poisoned.push_back(variable);
  std::memset(variable, 0xff, bytes);
  scheduler.group_bytes += bytes;
  statistics.threadgroup_bytes = std::max(statistics.threadgroup_bytes, scheduler.group_bytes);
  if (scheduler.group_bytes > threadgroup_memory_limit) fail("more than 32 KiB of threadgroup memory");
}

static void fiber_main() {
  scheduler.body(scheduler.buffers, scheduler.current->grid_position, scheduler.current->group_position);
  scheduler.current->status = Status::done;
  yield();
  __builtin_trap();
}

static void reserve_stacks(size_t count) {
  if (scheduler.stack_count >= count) return;
  if (scheduler.stacks) munmap(scheduler.stacks, stack_bytes * scheduler.stack_count);
  void* pages = mmap(nullptr, stack_bytes * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) std::abort();
  scheduler.stacks = static_cast<char*>(pages);
  scheduler.stack_count = count;
}

static void start_fiber(uint index, uint3 origin, uint3 size) {
  Fiber& fiber = scheduler.fibers[index];
  const uint3 at(index % size.x, index / size.x % size.y, index / (size.x * size.y));
  // What fibers_switch pops: six registers, then the address it returns to.
  void** top = reinterpret_cast<void**>(scheduler.stacks + stack_bytes * (index + 1));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber = {top, Status::ready, nullptr, 0, uint3(origin.x + at.x, origin.y + at.y, origin.z + at.z), at};
}

// The lanes waiting for a SIMD operation take it together once no lane of the group can run.
static bool resolve_simd_operation(uint first, uint end) {
  LaneRequest* requests[simd_width];
  uint lanes[simd_width];
  int count = 0;
  for (uint i = first; i < end; i++) {
    if (scheduler.fibers[i].status != Status::at_simd_operation) continue;
    requests[count] = scheduler.fibers[i].request;
    lanes[count++] = i - first;
  }
  if (count == 0) return false;
  statistics.simd_operations++;
  if (count < int(simd_width)) statistics.partial_simd_operations++;
  for (int i = 1; i < count; i++) {
    if (requests[i]->resolve == requests[0]->resolve && requests[i]->line == requests[0]->line) continue;
    statistics.divergent_simd++;
    fail("threads of one SIMD group wait at different SIMD operations");
  }
  requests[0]->resolve(requests, lanes, count);
  for (int i = 0; i < count; i++) scheduler.fibers[first + lanes[i]].status = Status::ready;
  return true;
}

static void run_simd_group(uint first, uint end, Order order) {
  do {
    for (uint i = 0; i < end - first; i++) {
      Fiber& fiber = scheduler.fibers[first + nth(order, i, end - first)];
      if (fiber.status != Status::ready) continue;
      scheduler.current = &fiber;
      races.run(fiber.grid_position);
      fibers_switch(&scheduler.stack_pointer, fiber.stack_pointer);
    }
  } while (resolve_simd_operation(first, end));
}

// True once every thread of the threadgroup stands at the same barrier or is done.
static bool release_barrier(uint count) {
  uint done = 0, lines = 0;
  int line = -1;
  for (uint i = 0; i < count; i++) {
    const Fiber& fiber = scheduler.fibers[i];
    if (fiber.status == Status::done) done++;
    else if (fiber.line != line) line = fiber.line, lines++;
  }
  if (done == count) return false;
  if (done > 0 || lines > 1) {
    statistics.divergent_barriers++;
    fail("threadgroup_barrier is not reached by every thread");
    return false;
  }
  statistics.barriers++;
  races.phase++;
  for (uint i = 0; i < count; i++) scheduler.fibers[i].status = Status::ready;
  return true;
}

static void run_group(Body body, void** buffers, uint3 origin, uint3 size, Order order) {
  races.group++;
  const uint count = size.x * size.y * size.z;
  reserve_stacks(count);
  scheduler.body = body;
  scheduler.buffers = buffers;
  scheduler.poisoned.clear();
  scheduler.group_bytes = 0;
  scheduler.fibers.resize(count);
  for (uint i = 0; i < count; i++) start_fiber(i, origin, size);
  const uint simd_groups = (count + simd_width - 1) / simd_width;
  do {
    for (uint g = 0; g < simd_groups; g++) {
      const uint first = nth(order, g, simd_groups) * simd_width;
      run_simd_group(first, std::min(count, first + simd_width), order);
    }
  } while (release_barrier(count));
  statistics.groups++;
  statistics.threads += count;
}

// A kernel whose threads meet: one threadgroup after another, its threads as fibers.
static void run_cooperative(Body body, void** buffers, uint3 threads, uint3 group, Order order) {
  const uint3 groups(
      (threads.x + group.x - 1) / group.x, (threads.y + group.y - 1) / group.y, (threads.z + group.z - 1) / group.z);
  for (uint i = 0; i < groups.x * groups.y * groups.z && error.empty(); i++) {
    const uint at = nth(order, i, groups.x * groups.y * groups.z);
    const uint3 origin(
        at % groups.x * group.x, at / groups.x % groups.y * group.y, at / (groups.x * groups.y) * group.z);
    const uint3 size(
        std::min(group.x, threads.x - origin.x), std::min(group.y, threads.y - origin.y),
        std::min(group.z, threads.z - origin.z));
    run_group(body, buffers, origin, size, order);
  }
}

// A kernel whose threads never meet needs no fibers.
template <Body body>
static void run_independent(void** buffers, uint3 threads, Order order) {
  statistics.threads = uint64_t(threads.x) * threads.y * threads.z;
  for (uint k = 0; k < threads.z; k++)
    for (uint j = 0; j < threads.y; j++)
      for (uint i = 0; i < threads.x; i++) {
        const uint3 position(nth(order, i, threads.x), nth(order, j, threads.y), nth(order, k, threads.z));
        races.run(position);
        body(buffers, position, uint3());
      }
}

}  // namespace fibers
