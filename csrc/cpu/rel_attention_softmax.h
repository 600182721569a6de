// The softmax of the forward kernels: one row of scores, and one query's results.
#pragma once

#include <cmath>
#include <limits>

#include "operand.h"
#include "txl/rel_attention.h"

namespace txl::TXL_ISA {

// probs[j] = e^(scores[j] · factor - shift) for n scores; returns their sum. May work in place. The
// product is rounded before the subtraction, as `shift` was, so that no exponent is positive and
// the largest score's is exactly 0.
template <typename acc_t, typename operand_t>
acc_t exponentiate(const acc_t* scores, acc_t factor, acc_t shift, int64_t n, operand_t* probs) {
  using Vec = Vectorized<acc_t>;
  const Vec factor_vec(factor), shift_vec(shift);
  Vec sum0(0), sum1(0);
  auto step = [&](int64_t j, Vec& sum) {
    const Vec p = exp_nonpositive(Vec::loadu(scores + j) * factor_vec - shift_vec);
    sum = sum + p;
    store_operand(probs + j, p);
  };
  int64_t j = 0;
  for (; j + 2 * Vec::size() <= n; j += 2 * Vec::size()) {
    step(j, sum0);
    step(j + Vec::size(), sum1);
  }
  for (; j < n; j += Vec::size()) step(j, sum0);
  return sum_of(sum0 + sum1);
}

template <typename acc_t>
void scale_row(acc_t* row, acc_t factor, int64_t n) {
  for (int64_t d = 0; d < n; ++d) row[d] *= factor;
}

// Writes out and lse of query i from the largest score, the sum of e^(score - max), and the sum of
// its products with the values; `acc` is overwritten.
template <typename T>
void write_query(const RelAttentionArgs& args, int64_t b, int64_t h, int64_t i, Acc<T> max,
                 Acc<T> sum, Acc<T>* acc) {
  const bool dead = sum == 0;
  const Acc<T> kept = static_cast<Acc<T>>(1 - args.dropout_p);
  if (dead) {
    std::fill(acc, acc + args.Dv, Acc<T>(0));
  } else {
    scale_row(acc, 1 / (kept * sum), args.Dv);
  }
  convert_row(acc, args.out.head<T>(b, h) + i * args.out.stride_t, args.Dv);
  // In double: the error of the backward's probabilities is at least that of lse.
  static_cast<Acc<T>*>(args.lse)[(b * args.H + h) * args.Tq + i] =
      dead ? -std::numeric_limits<Acc<T>>::infinity()
           : static_cast<Acc<T>>(max + std::log(double{sum}));
}

}  // namespace txl::TXL_ISA
