// The pass of the backward over a score tile: from scores and gradients of probabilities to
// probabilities and gradients of scores.
#pragma once

#include "rel_attention_bwd_outputs.h"
#include "rel_attention_tile.h"

namespace txl::TXL_ISA {

// One row's probabilities and score gradients, in place of its scores and probability gradients:
// p = e^(s · factor - lse); ds = p · (dropout(dp) - delta), times the softcap's slope. The product
// is rounded before the subtraction: where one key dominates the row, lse is that key's rounded
// score, and p exactly 1.
template <typename T, typename operand_p, typename operand_s>
void gradient_row(const RelAttentionArgs& args, Acc<T> score_factor, const Acc<T>* scores,
                  const Acc<T>* dprobs, const Acc<T>* keep, Acc<T> lse, Acc<T> delta, int64_t n,
                  operand_p* probs, operand_s* dscores) {
  using Vec = Vectorized<Acc<T>>;
  const Vec factor_vec(score_factor), lse_vec(lse), delta_vec(delta),
      rescale(static_cast<Acc<T>>(1 / (1 - args.dropout_p))), zero(0), one(1), minus_one(-1);
  const bool dropout = keep != nullptr, capped = args.softcap > 0;
  for (int64_t j = 0; j < n; j += Vec::size()) {
    const Vec score = Vec::loadu(scores + j);
    const Vec p = exp_nonpositive(at::vec::clamp_max(score * factor_vec - lse_vec, zero));
    Vec dp = Vec::loadu(dprobs + j), kept = p;
    if (dropout) {
      const Vec factor = Vec::loadu(keep + j) * rescale;
      dp = dp * factor;
      kept = p * factor;
    }
    Vec ds = p * (dp - delta_vec);
    if (capped) {
      const Vec tanh = at::vec::maximum(score, minus_one);  // a masked score is -inf
      ds = ds * (one - tanh * tanh);
    }
    store_operand(probs + j, kept);
    store_operand(dscores + j, ds);
  }
}

// Clears both sides of rows that are read with the skewed stride.
template <typename operand_t>
void clear_gaps(operand_t* tile, int64_t rows, int64_t n, int64_t ld) {
  std::fill(tile - kScoreSlack, tile, operand_t(0));
  for (int64_t a = 0; a < rows; ++a) {
    operand_t* row = tile + a * ld;
    std::fill(row + n, row + std::min(n + kScoreSlack, ld), operand_t(0));
    std::fill(row + std::max(n, ld - kScoreSlack), row + ld, operand_t(0));
  }
  std::fill(tile + rows * ld, tile + rows * ld + kScoreSlack, operand_t(0));
}

// Probabilities and score gradients of a block, in the layouts that its products read; `by_column`:
// those of the position products too.
template <typename T>
void gradient_rows(const RelAttentionArgs& args, int64_t b, int64_t h, const BwdTile<T>& tile,
                   Block block, bool by_column, const BwdWorkspace<T>& ws) {
  constexpr Acc<T> kNone = -std::numeric_limits<Acc<T>>::infinity();
  const TileRows rows = tile.rows;
  const auto* lse = static_cast<const Acc<T>*>(args.lse) + (b * args.H + h) * args.Tq + rows.begin;
  const int64_t n = block.padded;
  const Acc<T> factor = Factors<Acc<T>>(args).score;
  auto row = [&](int64_t a, auto* probs, auto* dscores) {
    const Acc<T>* keep =
        args.dropout_p > 0 ? block_keep(args, b, h, rows.begin + a, block, ws.keep) : nullptr;
    gradient_row<T>(args, factor, ws.scores + a * kScoreLd, ws.dprobs + a * kScoreLd, keep,
                    lse[a] == kNone ? 0 : lse[a], tile.delta[a], n, probs, dscores);
  };
  if constexpr (kPacked<T>) {
    const int64_t padded_rows = row_length<T>(rows.height);
    auto row_or_zeros = [&](int64_t a, BFloat16* probs, BFloat16* dscores) {
      if (a < rows.count()) {
        row(a, probs, dscores);
      } else {
        std::fill(probs, probs + n, BFloat16(0));
        std::fill(dscores, dscores + n, BFloat16(0));
      }
    };
    for (int64_t a = 0; a < padded_rows; a += 2) {
      BFloat16 *even = ws.dscores + a * kScoreLd, *odd = even + kScoreLd;
      BFloat16 *probs_even = ws.probs_row, *probs_odd = ws.probs_row + kScoreLd;
      row_or_zeros(a, probs_even, even);
      row_or_zeros(a + 1, probs_odd, odd);
      interleave(probs_even, probs_odd, n, ws.probs_pairs + a / 2 * kKeyBlock);
      interleave(even, odd, n, ws.dscores_pairs + a / 2 * kKeyBlock);
    }
    if (!by_column) return;
    clear_gaps(ws.dscores, padded_rows, n, kScoreLd);
    clear_gaps(ws.shifted_pairs, padded_rows / 2, n, kPairLd);
    for (int64_t a = 0; a < padded_rows; a += 2) {
      const BFloat16* even = ws.dscores + a * kScoreLd;
      interleave(even - 1, even + kScoreLd, n + 1, ws.shifted_pairs + a / 2 * kPairLd - 1);
    }
  } else {
    for (int64_t a = 0; a < rows.count(); ++a) {
      row(a, ws.dprobs + a * kScoreLd, ws.scores + a * kScoreLd);
    }
    for (int64_t a = rows.count(); a < rows.height; ++a) {
      std::fill(ws.dprobs + a * kScoreLd, ws.dprobs + a * kScoreLd + n, Acc<T>(0));
      std::fill(ws.scores + a * kScoreLd, ws.scores + a * kScoreLd + n, Acc<T>(0));
    }
    if (by_column) clear_gaps(ws.scores, rows.height, n, kScoreLd);
  }
}

}  // namespace txl::TXL_ISA
