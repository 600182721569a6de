// The relative shift and its adjoint: each row is one copy between two runs of zeros.
#include <algorithm>

#include "kernels.h"
#include "operand.h"

namespace txl::TXL_ISA {
namespace {

// dst[j] = src[j + shift] for j in [0, n_dst), zero where src, of n_src elements, has none.
template <typename T>
void shift_row(const T* src, int64_t n_src, T* dst, int64_t n_dst, int64_t shift) {
  const int64_t begin = std::clamp<int64_t>(-shift, 0, n_dst);
  const int64_t end = std::clamp<int64_t>(n_src - shift, begin, n_dst);
  std::fill(dst, dst + begin, T(0));
  if (end > begin) std::copy(src + begin + shift, src + end + shift, dst + begin);
  std::fill(dst + end, dst + n_dst, T(0));
}

template <typename T>
void fwd(const RelShiftArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    shift_row(static_cast<const T*>(args.src) + row * args.R, args.R,
              static_cast<T*>(args.dst) + row * args.n_keys, args.n_keys,
              args.offset - row % args.Tq);
  }
}

template <typename T>
void bwd(const RelShiftArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    shift_row(static_cast<const T*>(args.src) + row * args.n_keys, args.n_keys,
              static_cast<T*>(args.dst) + row * args.R, args.R, row % args.Tq - args.offset);
  }
}

}  // namespace

const RelShiftKernels rel_shift_kernels[4] = {{fwd<float>, bwd<float>},
                                              {fwd<double>, bwd<double>},
                                              {fwd<Half>, bwd<Half>},
                                              {fwd<BFloat16>, bwd<BFloat16>}};

}  // namespace txl::TXL_ISA
