// Operators that describe the library itself: whether it can run here, and how fast its products
// are. The schemas of all other operators are in Python.
#include <torch/library.h>

#include <optional>
#include <string>

#include "txl/gemm.h"
#include "txl/probe_gemm.h"

namespace txl {
namespace {

std::optional<std::string> unavailable_reason() {
  const char* const reason = gemm_unavailable_reason();
  return reason == nullptr ? std::nullopt : std::optional<std::string>(reason);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(txl_native, m) {
  m.def("gemm_unavailable_reason() -> str?", &unavailable_reason);
  m.def("probe_gemm(str kind, int M, int N, int K, float seconds) -> float", &probe_gemm);
}

}  // namespace txl
