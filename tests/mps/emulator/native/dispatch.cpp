// Every ATen op on the MPS key: run the CPU kernel over the same memory and write down that it happened.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <sstream>
#include <utility>
#include <vector>

#include "device.h"
#include "submissions.h"

namespace emulator {
namespace {

using at::Tensor;

bool on_mps(const Tensor& t) { return t.defined() && t.device().type() == c10::DeviceType::MPS; }

void refuse_float64(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      dtype != at::kDouble && dtype != at::kComplexDouble,
      "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead.");
}

// A storage on `device` over the bytes of `storage`, which it keeps alive.
c10::Storage share(const c10::Storage& storage, c10::Device device, c10::Allocator* allocator) {
  auto* keep_alive = new c10::Storage(storage);
  c10::DataPtr data(
      storage.mutable_data(), keep_alive, [](void* context) { delete static_cast<c10::Storage*>(context); }, device);
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, /*resizable=*/true};
}

Tensor tensor_like(c10::Storage storage, c10::DispatchKey key, const Tensor& like) {
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) result._set_conj(true);
  if (like.is_neg()) result._set_neg(true);
  return result;
}

Tensor as_cpu(const Tensor& t) {
  auto storage = share(t.storage(), c10::Device(c10::DeviceType::CPU), c10::GetAllocator(c10::DeviceType::CPU));
  return tensor_like(std::move(storage), c10::DispatchKey::CPU, t);
}

Tensor as_mps(const Tensor& t) {
  refuse_float64(t.scalar_type());
  return tensor_like(share(t.storage(), mps_device(), allocator()), c10::DispatchKey::MPS, t);
}

// The MPS tensors among the arguments of one call, each with the CPU tensor that stands for it.
class StandIns {
 public:
  Tensor of(const Tensor& t) {
    if (!on_mps(t)) return t;
    for (auto& [mps, cpu] : pairs_)
      if (mps.is_same(t)) return cpu;
    pairs_.emplace_back(t, as_cpu(t));
    return pairs_.back().second;
  }

  // `out=` variants may have resized what they were given.
  void write_back_resizes() {
    for (auto& [mps, cpu] : pairs_) {
      if (cpu.sizes() == mps.sizes() && cpu.strides() == mps.strides() && cpu.storage_offset() == mps.storage_offset())
        continue;
      auto* impl = mps.unsafeGetTensorImpl();
      if (cpu.storage().data() != mps.storage().data()) impl->set_storage_keep_dtype(as_mps(cpu).storage());
      impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

  // The MPS tensor for a result: the argument itself, a view of an argument, or a tensor of its own.
  Tensor result(const Tensor& t, bool is_written_argument) const {
    if (!t.defined() || t.device().type() != c10::DeviceType::CPU) return t;
    for (const auto& [mps, cpu] : pairs_)
      if (cpu.is_same(t)) return mps;
    if (is_written_argument) return t;
    for (const auto& [mps, cpu] : pairs_)
      if (t.storage().data() != nullptr && cpu.storage().data() == t.storage().data())
        return tensor_like(mps.storage(), c10::DispatchKey::MPS, t);
    return as_mps(t);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> pairs_;
};

// Elements in memory: an expanded dimension is read once.
int64_t distinct_elements(const Tensor& t) {
  int64_t count = 1;
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.stride(d) != 0 || t.size(d) == 0) count *= t.size(d);
  return count;
}

std::string describe(const Tensor& t, bool written) {
  std::ostringstream json;
  json << "{\"sizes\": [";
  for (int64_t d = 0; d < t.dim(); d++) json << (d ? ", " : "") << t.size(d);
  json << "], \"dtype\": \"" << c10::toString(t.scalar_type()) << "\", \"nbytes\": "
       << distinct_elements(t) * static_cast<int64_t>(t.element_size()) << ", \"device\": \""
       << c10::DeviceTypeName(t.device().type(), true) << "\", \"written\": " << (written ? "true" : "false")
       << ", \"offset\": " << t.storage_offset() << ", \"contiguous\": " << (t.is_contiguous() ? "true" : "false") << "}";
  return json.str();
}

// Collects what an ATen call read and wrote, and says it as one JSON object.
class Entry {
 public:
  Entry(const c10::FunctionSchema& schema, uint64_t sequence) : sequence_(sequence) {
    name_ = schema.operator_name().name;
    if (!schema.operator_name().overload_name.empty()) name_ += "." + schema.operator_name().overload_name;
    for (const auto& result : schema.returns())
      is_view_ |= result.alias_info() != nullptr && !result.alias_info()->isWrite();
  }
  void add(const Tensor& t, bool written) {
    if (!t.defined()) return;
    tensors_ += (tensors_.empty() ? "" : ", ") + describe(t, written);
  }
  void write() const {
    std::ostringstream json;
    json << "{\"name\": \"" << name_ << "\", \"sequence\": " << sequence_ << ", \"thread\": " << pthread_self()
         << ", \"overlapped\": " << (overlapped() ? "true" : "false") << ", \"is_view\": " << (is_view_ ? "true" : "false")
         << ", \"tensors\": [" << tensors_ << "]}";
    record(json.str());
  }

 private:
  std::string name_, tensors_;
  uint64_t sequence_;
  bool is_view_ = false;
};

// Replaces every MPS tensor and device of one argument by its stand-in; true when there was one.
bool move_to_cpu(c10::IValue& value, StandIns& stand_ins, Entry& entry, bool written) {
  bool found = false;
  auto one = [&](const Tensor& t) {
    found |= on_mps(t);
    entry.add(t, written);
    return stand_ins.of(t);
  };
  if (value.isTensor()) {
    value = one(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& t : list) t = one(t);
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& t : value.toOptionalTensorList())
      list.push_back(t.has_value() ? std::optional<Tensor>(one(*t)) : t);
    value = list;
  } else if (value.isDevice() && value.toDevice().type() == c10::DeviceType::MPS) {
    value = c10::Device(c10::DeviceType::CPU);
    found = true;
  }
  return found;
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  TORCH_CHECK_NOT_IMPLEMENTED(
      schema.operator_name().getNamespace() == std::string_view("aten"), op.operator_name(),
      " has no kernel for MPS: only ATen's own ops are emulated");
  ScopedSubmission submission;
  Entry entry(schema, (*submission).sequence);
  StandIns stand_ins;

  const size_t first_argument = stack->size() - schema.arguments().size();
  bool any_mps = false;
  for (size_t i = 0; i < schema.arguments().size(); i++) {
    const auto* alias = schema.arguments()[i].alias_info();
    any_mps |= move_to_cpu((*stack)[first_argument + i], stand_ins, entry, alias != nullptr && alias->isWrite());
  }
  op.callBoxed(stack);
  stand_ins.write_back_resizes();

  const size_t first_result = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); i++) {
    auto& value = (*stack)[first_result + i];
    const auto* alias = schema.returns()[i].alias_info();
    const bool is_written_argument = alias != nullptr && alias->isWrite();
    auto one = [&](const Tensor& t) {
      if (!any_mps) return t;
      Tensor result = stand_ins.result(t, is_written_argument);
      if (!is_written_argument) entry.add(result, true);
      return result;
    };
    if (value.isTensor()) {
      value = one(value.toTensor());
    } else if (value.isTensorList()) {
      auto list = value.toTensorVector();
      for (auto& t : list) t = one(t);
      value = list;
    }
  }
  if ((*submission).outermost) entry.write();
}

// ATen returns before it asks the device where a tensor is copied over itself.
void copy_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  if ((*stack)[first].toTensor().is_same((*stack)[first + 1].toTensor())) {
    stack->erase(stack->begin() + static_cast<std::ptrdiff_t>(first) + 1, stack->end());
    return;
  }
  run_on_cpu(op, stack);
}

at::ScalarType storable_dtype(std::optional<at::ScalarType> dtype) {
  const auto chosen = dtype.value_or(at::typeMetaToScalarType(at::get_default_dtype()));
  refuse_float64(chosen);
  return chosen;
}

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<c10::Device>,
    std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::MPS);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), allocator(), keys, storable_dtype(dtype), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::MPS);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), allocator(), keys, storable_dtype(dtype));
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef sym_size, std::optional<at::MemoryFormat>) {
  const auto size = C10_AS_INTARRAYREF_SLOW(sym_size);
  int64_t numel = 1;
  for (int64_t extent : size) numel *= extent;
  const auto needed = static_cast<size_t>((self.storage_offset() + numel) * static_cast<int64_t>(self.element_size()));
  auto* storage = self.storage().unsafeGetStorageImpl();
  if (storage->nbytes() < needed) {
    auto grown = allocator()->allocate(needed);
    if (storage->nbytes() > 0) std::memcpy(grown.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr(std::move(grown));
    storage->set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

}  // namespace
}  // namespace emulator

TORCH_LIBRARY_IMPL(_, MPS, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&emulator::run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, MPS, library) {
  library.impl("empty.memory_format", TORCH_FN(emulator::empty));
  library.impl("empty_strided", TORCH_FN(emulator::empty_strided));
  library.impl("resize_", TORCH_FN(emulator::resize_));
  // The generic copy_ ends in a stub that only a build with MPS fills.
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&emulator::copy_on_cpu>());
  // Without a kernel of its own a structured op would run as its out variant and a copy. MPS has its own.
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.getNamespace() != std::string_view("aten")) continue;
    const auto op = c10::Dispatcher::singleton().findOp(name);
    if (op && op->hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutogradNonFunctional))
      library.impl(
          c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&emulator::run_on_cpu>());
  }
}
