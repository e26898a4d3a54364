#include "ops/memory.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <list>
#include <mutex>
#include <new>

namespace pyalpaca {
namespace {

constexpr size_t kPage = size_t{1} << 21;   // a huge page
constexpr size_t kLeast = size_t{1} << 20;  // results below this are left to torch
constexpr size_t kKept = size_t{1} << 29;   // bytes that may lie idle

struct Block {
  void* data;
  size_t size;
};

// The idle blocks, the one used last in front.
class Pool {
 public:
  Block take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = idle_.begin(); block != idle_.end(); ++block) {
        if (block->size != size) continue;
        const Block found = *block;
        idle_.erase(block);
        bytes_ -= size;
        return found;
      }
    }
    // From the system, not from malloc: what is freed there may stay with the process.
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(data, size, MADV_HUGEPAGE);  // a wish: where it is not granted, pages are small
#endif
    return {data, size};
  }

  void give(Block block) {
    std::list<Block> surplus;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      idle_.push_front(block);
      bytes_ += block.size;
      while (bytes_ > kKept) {
        bytes_ -= idle_.back().size;
        surplus.splice(surplus.end(), idle_, std::prev(idle_.end()));
      }
    }
    for (const Block& old : surplus) munmap(old.data, old.size);
  }

 private:
  std::mutex mutex_;
  std::list<Block> idle_;
  size_t bytes_ = 0;
};

// Never destroyed: tensors may outlive the end of main.
Pool& pool() {
  static Pool* const kept = new Pool;
  return *kept;
}

}  // namespace

namespace {

// Ours, or nothing where torch's own is to serve.
at::Tensor from_pool(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * options.dtype().itemsize();
  if (!options.device().is_cpu() || bytes < kLeast) return {};
  const Block block = pool().take((bytes + kPage - 1) / kPage * kPage);
  return at::from_blob(block.data, sizes, [block](void*) { pool().give(block); }, options.requires_grad(false));
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

}  // namespace pyalpaca
