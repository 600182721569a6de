// Adaptive softmax on the CPU, for one instruction set: the kernels of one cluster.
//
// Logits are computed transposed, [columns, tokens]: the weight is the left-hand matrix, read from
// the caller's memory if its rows suit products, and a softmax runs down columns of vectors. A tile
// of their gradients, 64 or 128 columns by up to 256 tokens, is written in both layouts by squares
// of 16 in registers: [columns, tokens] is the left-hand matrix of the weight's gradient,
// [tokens, columns] that of the hidden gradient. Nothing here is atomic.
#include "adaptive_softmax_gradients.h"
#include "adaptive_softmax_logits.h"
#include "kernels.h"

namespace txl::TXL_ISA {
namespace {

template <typename T>
int64_t shared_bytes(const ClusterArgs& args, const ClusterPlan& plan) {
  Arena arena(nullptr);
  ClusterShared<T>(args, plan, arena);
  return arena.used();
}

template <typename T>
int64_t slot_bytes(const ClusterArgs& args, const ClusterPlan& plan, const ClusterGrads& grads) {
  Arena arena(nullptr);
  ClusterSlot<T>(args, plan, grads, arena);
  return arena.used();
}

template <typename T>
constexpr ClusterKernels kKernels{sizeof(Operand<T>), sizeof(Acc<T>),     shared_bytes<T>,
                                  slot_bytes<T>,      cluster_pack<T>,    cluster_logits<T>,
                                  cluster_combine<T>, cluster_restore<T>, cluster_gradients<T>,
                                  cluster_reduce<T>};

}  // namespace

const ClusterKernels adaptive_softmax_kernels[4] = {kKernels<float>, kKernels<double>,
                                                    kKernels<Half>, kKernels<BFloat16>};

}  // namespace txl::TXL_ISA
