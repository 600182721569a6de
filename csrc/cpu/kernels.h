// The kernels of each instruction set, one namespace each, indexed by Scalar. CMakeLists.txt
// defines TXL_INSTRUCTION_SETS(X) as X(set) for each set of the processor that it compiles for.
#pragma once

#include "txl/adaptive_embedding.h"
#include "txl/adaptive_softmax.h"
#include "txl/few_row_linear.h"
#include "txl/rel_attention.h"
#include "txl/rel_shift.h"

#define TXL_DECLARE_KERNELS(isa)                               \
  namespace txl::isa {                                         \
  extern const FwdKernels fwd_kernels[4];                      \
  extern const FewQueryKernels few_query_kernels[4];           \
  extern const BwdKernels bwd_kernels[4];                      \
  extern const RelShiftKernels rel_shift_kernels[4];           \
  extern const ClusterKernels adaptive_softmax_kernels[4];     \
  extern const EmbeddingKernels adaptive_embedding_kernels[4]; \
  extern const FewRowLinearKernels few_row_linear_kernels[4];  \
  }

TXL_INSTRUCTION_SETS(TXL_DECLARE_KERNELS)
