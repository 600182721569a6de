// Which instruction set's kernels run here: by ATen's capability and the processor's features.
#include <ATen/Version.h>

#include <iterator>
#include <string>
#include <string_view>

#include "kernels.h"
#include "txl/gemm.h"

namespace txl {
namespace {

// The name of an instruction set and its kernels, each array indexed by Scalar.
struct InstructionSet {
  std::string_view name;
  const FwdKernels* rel_attention_fwd;
  const FewQueryKernels* rel_attention_few_queries;
  const BwdKernels* rel_attention_bwd;
  const RelShiftKernels* rel_shift;
  const ClusterKernels* adaptive_softmax;
  const EmbeddingKernels* adaptive_embedding;
  const FewRowLinearKernels* few_row_linear;
};

#define TXL_ROW(set)                \
  {#set,                            \
   set::fwd_kernels,                \
   set::few_query_kernels,          \
   set::bwd_kernels,                \
   set::rel_shift_kernels,          \
   set::adaptive_softmax_kernels,   \
   set::adaptive_embedding_kernels, \
   set::few_row_linear_kernels},
constexpr InstructionSet kSets[] = {TXL_INSTRUCTION_SETS(TXL_ROW)};
#undef TXL_ROW
static_assert(kSets[0].name == "DEFAULT", "every processor runs the first set");

bool runs_here(std::string_view name) {
  const std::string capability = at::get_cpu_capability();
  if (name == "AVX512BF16") return capability == "AVX512" && has_packed_products();
  return name == capability;
}

// The last set of the list that runs here. ATen's capabilities without a set use the first.
const InstructionSet& chosen() {
  static const InstructionSet& set = []() -> const InstructionSet& {
    size_t i = std::size(kSets) - 1;
    while (i > 0 && !runs_here(kSets[i].name)) --i;
    return kSets[i];
  }();
  return set;
}

}  // namespace

const FwdKernels& rel_attention_fwd_kernels(Scalar dtype) {
  return chosen().rel_attention_fwd[static_cast<int>(dtype)];
}

const FewQueryKernels& rel_attention_few_query_kernels(Scalar dtype) {
  return chosen().rel_attention_few_queries[static_cast<int>(dtype)];
}

const BwdKernels& rel_attention_bwd_kernels(Scalar dtype) {
  return chosen().rel_attention_bwd[static_cast<int>(dtype)];
}

const RelShiftKernels& rel_shift_kernels(Scalar dtype) {
  return chosen().rel_shift[static_cast<int>(dtype)];
}

const ClusterKernels& adaptive_softmax_kernels(Scalar dtype) {
  return chosen().adaptive_softmax[static_cast<int>(dtype)];
}

const EmbeddingKernels& adaptive_embedding_kernels(Scalar dtype) {
  return chosen().adaptive_embedding[static_cast<int>(dtype)];
}

const FewRowLinearKernels& few_row_linear_kernels(Scalar dtype) {
  return chosen().few_row_linear[static_cast<int>(dtype)];
}

}  // namespace txl
