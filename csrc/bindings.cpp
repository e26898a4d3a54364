// The Python module pyalpaca._C: importing it registers the operators with torch; itself it only tells about the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/kernels.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyalpaca's compiled operators, registered as torch.ops.pyalpaca.*";
  m.def(
      "info",
      [] {
        return std::map<std::string, std::string>{
            {"torch", TORCH_VERSION}, {"compiler", PYALPACA_COMPILER}, {"capability", pyalpaca::cpu::kernels().name}};
      },
      "What the module was built with, and the instruction set whose kernels run here.");
}
