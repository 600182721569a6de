// Which instruction set's kernels run here: by ATen's capability and what the processor can.
#include <ATen/Version.h>

#include "kernels.h"
#include "txl/gemm.h"

namespace txl {
namespace {

enum class Isa { DEFAULT, AVX2, AVX512, AVX512BF16 };

Isa isa() {
  static const Isa chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return has_packed_products() ? Isa::AVX512BF16 : Isa::AVX512;
    }
    return capability == "AVX2" ? Isa::AVX2 : Isa::DEFAULT;
  }();
  return chosen;
}

template <typename Kernels>
const Kernels& pick(Scalar dtype, const Kernels* baseline, const Kernels* avx2,
                    const Kernels* avx512, const Kernels* avx512bf16) {
  const Kernels* sets[] = {baseline, avx2, avx512, avx512bf16};
  return sets[static_cast<int>(isa())][static_cast<int>(dtype)];
}

}  // namespace

const FwdKernels& rel_attention_fwd_kernels(Scalar dtype) {
  return pick(dtype, DEFAULT::fwd_kernels, AVX2::fwd_kernels, AVX512::fwd_kernels,
              AVX512BF16::fwd_kernels);
}

const BwdKernels& rel_attention_bwd_kernels(Scalar dtype) {
  return pick(dtype, DEFAULT::bwd_kernels, AVX2::bwd_kernels, AVX512::bwd_kernels,
              AVX512BF16::bwd_kernels);
}

const RelShiftKernels& rel_shift_kernels(Scalar dtype) {
  return pick(dtype, DEFAULT::rel_shift_kernels, AVX2::rel_shift_kernels, AVX512::rel_shift_kernels,
              AVX512BF16::rel_shift_kernels);
}

const ClusterKernels& adaptive_softmax_kernels(Scalar dtype) {
  return pick(dtype, DEFAULT::adaptive_softmax_kernels, AVX2::adaptive_softmax_kernels,
              AVX512::adaptive_softmax_kernels, AVX512BF16::adaptive_softmax_kernels);
}

const EmbeddingKernels& adaptive_embedding_kernels(Scalar dtype) {
  return pick(dtype, DEFAULT::adaptive_embedding_kernels, AVX2::adaptive_embedding_kernels,
              AVX512::adaptive_embedding_kernels, AVX512BF16::adaptive_embedding_kernels);
}

}  // namespace txl
