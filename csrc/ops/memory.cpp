#include "ops/memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/CPUAllocator.h>

#include "ops/pool.h"

namespace pyalpaca {
namespace {

constexpr size_t kLeast = size_t{1} << 20;  // tensors below this are left to torch's own allocator

c10::DeleterFnPtr torch_deleter() { return c10::GetDefaultCPUAllocator()->raw_deleter(); }

void release(void* data) {
  if (data == nullptr) return;
  if (!pool().give(data)) return torch_deleter()(data);
  c10::profiledCPUMemoryReporter().Delete(data);
}

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeast) return c10::GetDefaultCPUAllocator()->allocate(bytes);
    void* const data = pool().take(bytes);
    if (data == nullptr) c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "the system has no ", bytes,
                     " bytes of memory left, expected room for a tensor; use smaller batches or a smaller model");
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Allocator& allocator() {
  static Allocator* const kept = new Allocator;
  return *kept;
}

// Ours, or nothing where torch's own is to serve.
at::Tensor from_pool(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (bytes < kLeast) return {};
  return at::detail::empty_generic(sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace

at::Tensor reused_like(const at::Tensor& x) {
  const at::Tensor ours = x.is_cpu() ? from_pool(x.sizes(), x.options()) : at::Tensor();
  return ours.defined() ? ours : at::empty_like(x, at::MemoryFormat::Contiguous);
}

at::Tensor reused_empty(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  const auto known = c10::asIntArrayRefSlowOpt(sizes);
  const at::Tensor ours = known && options.device().is_cpu() ? from_pool(*known, options) : at::Tensor();
  return ours.defined() ? ours : at::empty_symint(sizes, options);
}

void reuse_memory(bool on) {
  pool().keep(on);
  c10::SetCPUAllocator(on ? static_cast<c10::Allocator*>(&allocator()) : c10::GetDefaultCPUAllocator());
}

}  // namespace pyalpaca
