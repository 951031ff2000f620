// An MPS device in host memory, for a torch that was built without one: allocator, guard and hooks.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <atomic>

#include "device.h"

namespace emulator {
namespace {

std::atomic<int64_t> allocated{0};
std::atomic<int64_t> allocated_peak{0};

struct Block {
  void* data;
  size_t bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= static_cast<int64_t>(block->bytes);
  c10::free_cpu(block->data);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, mps_device()};
    auto* block = new Block{c10::alloc_cpu(bytes), bytes};
    const int64_t now = allocated += static_cast<int64_t>(bytes);
    int64_t peak = allocated_peak.load();
    while (now > peak && !allocated_peak.compare_exchange_weak(peak, now)) {
    }
    return {block->data, block, &free_block, mps_device()};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator the_allocator;
REGISTER_ALLOCATOR(c10::DeviceType::MPS, &the_allocator)

// Work is done when a call returns, so streams and events have nothing to order.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::MPS> {
  c10::Device exchangeDevice(c10::Device) const override { return mps_device(); }
  c10::Device getDevice() const override { return mps_device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, mps_device()); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override { return 0.0; }
};
C10_REGISTER_GUARD_IMPL(MPS, Guard)

}  // namespace

c10::Allocator* allocator() { return &the_allocator; }

}  // namespace emulator

namespace at {

struct MPSHooks : MPSHooksInterface {
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isOnMacOSorNewer(unsigned, unsigned) const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return emulator::mps_device(); }
  Allocator* getMPSDeviceAllocator() const override { return emulator::allocator(); }
  void deviceSynchronize() const override {}
  void commitStream() const override {}
  void emptyCache() const override {}
  size_t getCurrentAllocatedMemory() const override { return emulator::allocated.load(); }
  size_t getDriverAllocatedMemory() const override { return emulator::allocated.load(); }
  size_t getRecommendedMaxMemory() const override { return size_t{16} << 30; }
  void setMemoryFraction(double) const override {}
  uint32_t acquireEvent(bool) const override { return 1; }
  void releaseEvent(uint32_t) const override {}
  void recordEvent(uint32_t) const override {}
  void waitForEvent(uint32_t) const override {}
  void synchronizeEvent(uint32_t) const override {}
  bool queryEvent(uint32_t) const override { return true; }
  double elapsedTimeOfEvents(uint32_t, uint32_t) const override { return 0.0; }
};
REGISTER_MPS_HOOKS(MPSHooks);

}  // namespace at

extern "C" {
int64_t mps_emulator_allocated() { return emulator::allocated.load(); }
int64_t mps_emulator_allocated_peak() { return emulator::allocated_peak.load(); }
void mps_emulator_reset_peak() { emulator::allocated_peak.store(emulator::allocated.load()); }
}
