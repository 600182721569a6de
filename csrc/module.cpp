// The Python module txl_kernels._C. Loading it registers the native kernels with torch; Python sees
// the build record alone. No torch header, so that pybind11 and torch never meet.
#include <pybind11/pybind11.h>

#include "txl_build_record.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of txl_kernels, registered as torch.ops.txl_native.* when this loads.";
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(TXL_BUILD_RECORD); },
      "What this file was built for and with, as a dict: the build record that lies beside it.");
}
