#pragma once
#include <c10/core/Allocator.h>
#include <c10/core/Device.h>

namespace emulator {

inline c10::Device mps_device() { return {c10::DeviceType::MPS, 0}; }
c10::Allocator* allocator();

}  // namespace emulator
