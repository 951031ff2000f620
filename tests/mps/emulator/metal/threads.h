// Metal's barriers, SIMD-group functions and atomics, on fibers.
#pragma once
#include "fibers.h"
#include "math.h"

namespace fibers {

template <class T>
inline T load(uint64_t raw) {
  T value;
  std::memcpy(static_cast<void*>(&value), &raw, sizeof(T));
  return value;
}
template <class T>
inline uint64_t store(T value) {
  uint64_t raw = 0;
  std::memcpy(&raw, static_cast<const void*>(&value), sizeof(T));
  return raw;
}

template <Lane operation, class T>
inline T combine(T a, T b) {
  if constexpr (operation == Lane::sum) return T(a + b);
  if constexpr (operation == Lane::product) return T(a * b);
  if constexpr (operation == Lane::max) return metal::max(a, b);
  if constexpr (operation == Lane::min) return metal::min(a, b);
}

// Metal leaves the order of a SIMD reduction open; this is lane order.
template <Lane operation, class T>
void reduce(LaneRequest** requests, const uint*, int count) {
  T total = load<T>(requests[0]->value);
  for (int i = 1; i < count; i++) total = combine<operation>(total, load<T>(requests[i]->value));
  for (int i = 0; i < count; i++) requests[i]->result = store(total);
}

template <Lane operation>
void vote(LaneRequest** requests, const uint* lanes, int count) {
  uint ballot = 0;
  for (int i = 0; i < count; i++) ballot |= requests[i]->value ? 1u << lanes[i] : 0u;
  uint active = 0;
  for (int i = 0; i < count; i++) active |= 1u << lanes[i];
  const uint result = operation == Lane::ballot ? ballot : operation == Lane::any ? ballot != 0 : ballot == active;
  for (int i = 0; i < count; i++) requests[i]->result = result;
}

template <Lane operation>
void move(LaneRequest** requests, const uint* lanes, int count) {
  for (int i = 0; i < count; i++) {
    const uint from = operation == Lane::broadcast ? requests[i]->argument : lanes[i] + requests[i]->argument;
    const LaneRequest* source = nullptr;
    for (int j = 0; j < count; j++)
      if (lanes[j] == from) source = requests[j];
    if (source) {
      requests[i]->result = source->value;
    } else if (from >= simd_width) {
      requests[i]->result = operation == Lane::shuffle_fill_down ? requests[i]->fill : requests[i]->value;
    } else {
      // Undefined on Metal and 0 in practice, on which c10's 64-bit reductions rely: give that, and count it.
      requests[i]->result = 0;
      statistics.absent_lane_reads++;
    }
  }
}

template <class T>
T meet(Lane operation, Resolve resolve, int line, T value, T fill = T(), uint argument = 0) {
  static_assert(sizeof(T) <= 8, "a lane carries eight bytes");
  LaneRequest request{operation, resolve, line, argument, store(value), store(fill), 0};
  wait_for_simd_group(request);
  return load<T>(request.result);
}

}  // namespace fibers

namespace metal {

// The line of a call tells one barrier from another.
#define HERE int line = __builtin_LINE()

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline void threadgroup_barrier(mem_flags, HERE) { fibers::wait_at_barrier(line); }
inline void simdgroup_barrier(mem_flags, HERE) {
  fibers::meet<uint>(fibers::Lane::any, &fibers::vote<fibers::Lane::any>, line, 0);
}

// simd_sum and its like exist on Metal for every scalar of up to 32 bits except bfloat.
template <class T>
constexpr bool is_reducible_v = is_scalar_v<T> && sizeof(T) <= 4 && !std::is_same_v<T, bfloat>;
#define SIMD_REDUCTION(name, operation)                                                       \
  template <class T>                                                                          \
  inline T name(T value, HERE) {                                                              \
    static_assert(is_reducible_v<T>, #name " has no such overload in Metal");                 \
    return fibers::meet<T>(operation, &fibers::reduce<operation, T>, line, value);            \
  }
SIMD_REDUCTION(simd_sum, fibers::Lane::sum)
SIMD_REDUCTION(simd_product, fibers::Lane::product)
SIMD_REDUCTION(simd_max, fibers::Lane::max)
SIMD_REDUCTION(simd_min, fibers::Lane::min)
#undef SIMD_REDUCTION

struct simd_vote {
  ulong lanes;
  explicit operator ulong() const { return lanes; }
};
inline bool simd_any(bool value, HERE) {
  return fibers::meet<uint>(fibers::Lane::any, &fibers::vote<fibers::Lane::any>, line, value);
}
inline bool simd_all(bool value, HERE) {
  return fibers::meet<uint>(fibers::Lane::all, &fibers::vote<fibers::Lane::all>, line, value);
}
inline simd_vote simd_ballot(bool value, HERE) {
  return {fibers::meet<uint>(fibers::Lane::ballot, &fibers::vote<fibers::Lane::ballot>, line, value)};
}
template <class T>
inline T simd_broadcast(T value, ushort lane, HERE) {
  return fibers::meet<T>(fibers::Lane::broadcast, &fibers::move<fibers::Lane::broadcast>, line, value, T(), lane);
}
template <class T>
inline T simd_shuffle_down(T value, ushort delta, HERE) {
  return fibers::meet<T>(fibers::Lane::shuffle_down, &fibers::move<fibers::Lane::shuffle_down>, line, value, T(), delta);
}
template <class T>
inline T simd_shuffle_and_fill_down(T value, T fill, ushort delta, HERE) {
  return fibers::meet<T>(
      fibers::Lane::shuffle_fill_down, &fibers::move<fibers::Lane::shuffle_fill_down>, line, value, fill, delta);
}
#undef HERE

// One host thread runs all fibers, so a plain access is atomic.
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_bool = atomic<bool>;
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
template <class T>
inline T atomic_load_explicit(const atomic<T>* target, memory_order) {
  return target->value;
}
template <class T>
inline void atomic_store_explicit(atomic<T>* target, T value, memory_order) {
  target->value = value;
}
template <class T, class U>
inline T atomic_fetch_add_explicit(atomic<T>* target, U value, memory_order) {
  T before = target->value;
  target->value = before + value;
  return before;
}
template <class T>
inline bool atomic_compare_exchange_weak_explicit(
    atomic<T>* target, T* expected, T desired, memory_order, memory_order) {
  if (std::memcmp(&target->value, expected, sizeof(T)) == 0) {
    target->value = desired;
    return true;
  }
  *expected = target->value;
  return false;
}

}  // namespace metal

// A device buffer whose every access is checked; kernels index it like a pointer.
template <class T>
struct Buffer {
  T* data;
  size_t count;
  T& operator[](long index) const {
    if (fibers::races.watching) fibers::races.access(data + index, !std::is_const_v<T>);
    if (index >= 0 && size_t(index) < count) return data[index];
    static thread_local std::remove_const_t<T> nowhere;
    fibers::statistics.out_of_bounds++;
    fibers::fail("index " + std::to_string(index) + " is outside a buffer of " + std::to_string(count) + " elements");
    nowhere = {};
    return nowhere;
  }
};
