// The Python module pyalpaca._C: importing it registers the operators with torch; itself it only tells about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/bandwidth.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "ops/memory.h"
#include "ops/pool.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyalpaca's compiled operators, registered as torch.ops.pyalpaca.*";
  m.def(
      "info",
      [] {
        return std::map<std::string, std::string>{
            {"torch", TORCH_VERSION}, {"compiler", PYALPACA_COMPILER}, {"capability", pyalpaca::cpu::kernels().name}};
      },
      "What the module was built with, and the instruction set whose kernels run here.");
  m.def("last_level_cache", &pyalpaca::cpu::last_level_cache, "Bytes of the last cache of a processor.");
  m.def(
      "copy_memory",
      [](uintptr_t from, uintptr_t to, int64_t bytes) {
        pyalpaca::cpu::copy_memory(reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to), bytes);
      },
      "Copy bytes from address to address on torch's threads, past the caches: the limit of a benchmark.");
  m.def(
      "read_memory",
      [](uintptr_t from, int64_t bytes) {
        return pyalpaca::cpu::read_memory(reinterpret_cast<const void*>(from), bytes);
      },
      "Read bytes at an address on torch's threads, the exclusive or of their words: the limit of a benchmark.");
  m.def("reuse_memory", &pyalpaca::reuse_memory, "Let torch's tensors on the CPU come from the pool, or not any more.");
  m.def("idle_memory", [] { return pyalpaca::pool().idle(); }, "Bytes that lie idle in the pool.");
  m.def("release_memory", [] { pyalpaca::pool().release(); }, "Give what lies idle in the pool back to the system.");
}
