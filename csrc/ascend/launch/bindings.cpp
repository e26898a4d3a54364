// The Python module pyalpaca._C_npu: importing it gives the operators of torch.ops.pyalpaca their kernels for NPUs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

PYBIND11_MODULE(_C_npu, m) {
  m.doc() = "pyalpaca's kernels for Ascend NPUs, registered with torch.ops.pyalpaca.*";
  m.def(
      "info",
      [] {
        return std::map<std::string, std::string>{
            {"torch", TORCH_VERSION}, {"torch_npu", PYALPACA_TORCH_NPU_VERSION}, {"soc", PYALPACA_SOC}};
      },
      "What the module was built with, and the processor whose kernels it holds.");
}
