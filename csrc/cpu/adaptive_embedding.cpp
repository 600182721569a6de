// Adaptive embedding on the CPU, for one instruction set: the kernels of one table.
//
// The products of a projection are computed in tiles of 64 rows by a panel of up to 128 columns; a
// task packs the right-hand matrix of its panel once. Each row of a product is copied from the tile
// to all tokens of its run, or to its row of the table's gradient. Nothing here is atomic.
#include "adaptive_embedding_products.h"
#include "kernels.h"

namespace txl::TXL_ISA {
namespace {

template <typename T>
int64_t shared_bytes(const EmbeddingArgs& args, const EmbeddingGrads* grads) {
  Arena arena(nullptr);
  EmbeddingShared<T>(args, grads, arena);
  return arena.used();
}

template <typename T>
int64_t slot_bytes(const EmbeddingArgs& args, const EmbeddingGrads* grads) {
  Arena arena(nullptr);
  EmbeddingSlot<T>(args, grads, arena);
  return arena.used();
}

template <typename T>
constexpr EmbeddingKernels kKernels{shared_bytes<T>,
                                    slot_bytes<T>,
                                    embedding_copy<T>,
                                    embedding_sum<T>,
                                    embedding_gather<T>,
                                    embedding_project<T>,
                                    embedding_gather_gradients<T>,
                                    embedding_table_gradient<T>,
                                    embedding_projection_gradient<T>};

}  // namespace

const EmbeddingKernels adaptive_embedding_kernels[4] = {kKernels<float>, kKernels<double>,
                                                        kKernels<Half>, kKernels<BFloat16>};

}  // namespace txl::TXL_ISA
