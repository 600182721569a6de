// The Python module txl_kernels._C. Loading it registers the native kernels with torch; Python sees
// the build record and what tile products can do here. No torch header, so that pybind11 and torch
// never meet.
#include <pybind11/pybind11.h>

#include "txl/gemm.h"
#include "txl/probe_gemm.h"
#include "txl_build_record.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of txl_kernels, registered as torch.ops.txl_native.* when this loads.";
  m.def(
      "build_info", [] { return py::module_::import("json").attr("loads")(TXL_BUILD_RECORD); },
      "What this file was built for and with, as a dict: the build record that lies beside it.");
  m.def("gemm_unavailable_reason", &txl::gemm_unavailable_reason,
        "None where tile products can run here, else one sentence.");
  m.def("probe_gemm", &txl::probe_gemm, py::arg("kind"), py::arg("M"), py::arg("N"), py::arg("K"),
        py::arg("seconds") = 0.2,
        "GFLOP/s of tile products from cache on all threads; kind is brgemm_f32, brgemm_bf16 or "
        "sgemm; 0 where it cannot run.");
}
