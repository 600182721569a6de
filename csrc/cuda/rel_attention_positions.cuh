// The first kernel of rel_attention for few queries: position scores by row of r. The derivation is
// in docs/mathematics.md, section 4.
#pragma once

#include "lanes.cuh"
#include "txl/rel_attention_decode.h"

namespace txl::cuda {

constexpr int kRows = 8;  // rows of r that a lane of the first kernel holds parts of
constexpr float kLog2e = 1.4426950408889634f;

// The factor of a product of `scale`: scores in units of log2(e), or the softcap's argument.
__device__ inline float product_factor(const DecodeArgs& args, float scale) {
  return args.softcap > 0 ? scale / args.softcap : scale * kLog2e;
}

// A lane's part of a head's bias, `width` wide; all loads are issued before the first is used.
template <typename L, typename T>
__device__ void load_bias(const HeadBias& bias, int h, int width, int own,
                          float (&x)[L::kElements]) {
  const int64_t first = int64_t(h) * width;
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) {
    const int d = L::column(own, e);
    const bool there = bias.data != nullptr && d < width;
    x[e] = 0;
    if (there && bias.is_float) x[e] = static_cast<const float*>(bias.data)[first + d];
    if (there && !bias.is_float) x[e] = Word<T>::widen(static_cast<const T*>(bias.data)[first + d]);
  }
}

// A lane's part of factor · (query + bias), in float32.
template <typename L, typename T>
__device__ void load_query(const T* row, int width, float factor, const float (&bias)[L::kElements],
                           int own, float (&query)[L::kElements]) {
  typename L::Part part;
  part.load(row, width, own, true);
  part.widen(query);
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) query[e] = factor * (query[e] + bias[e]);
}

// Whether a query of batch row b attends to a key whose row of r, counted from the plan's first, is
// in [begin, end).
__device__ inline bool reads_rows(const DecodeArgs& args, int b, int begin, int end) {
  bool reads = false;
  for (int i = 0; i < args.Tq; ++i) {
    const Keys keys = args.keys_of(b, i);
    const int shift = args.to_row(b) - i;
    int lowest = keys.begin + shift, highest = keys.end - 1 + shift;
    if (args.clamp)
      lowest = max(0, min(lowest, args.R - 1)), highest = max(0, min(highest, args.R - 1));
    lowest -= args.plan.row_begin, highest -= args.plan.row_begin;
    reads |= keys.count() > 0 && lowest < end && highest >= begin;
  }
  return reads;
}

// positions[b, h, i, m] = factor · (q_pos_i + r_r_bias) · r_m for a tile of rows m and one head. A
// block holds its tile of r in registers, widened, kRows rows to a group of lanes, and computes the
// queries of its batch rows one after another: where r is shared by the batch, it is read once.
// Batch rows whose keys use no row of the tile are skipped. Reads r, q_pos, r_r_bias; writes
// float32. Every sum is float32 and in a fixed order.
template <typename T, int kHead, bool kAligned>
__global__ void __launch_bounds__(kThreads) rel_attention_positions_kernel(const DecodeArgs args) {
  using L = Lanes<T, kHead, kAligned>;
  constexpr int kTile = kWarps * kRows * L::kGroups;
  const int lane = threadIdx.x % kWarp, own = lane % L::kLanes, group = lane / L::kLanes;
  const DecodePlan& plan = args.plan;
  const int n_tiles = (plan.n_rows + kTile - 1) / kTile;
  const int tile = blockIdx.x % n_tiles, h = blockIdx.x / n_tiles % args.H;
  const int b_begin = blockIdx.x / n_tiles / args.H * plan.batches_per_block;
  const int b_end = min(b_begin + plan.batches_per_block, args.B);
  // A bit for each batch row: there are at most as many as lanes.
  bool reads = b_begin + lane < b_end;
  if (reads && args.has_row_numbers())
    reads = reads_rows(args, b_begin + lane, tile * kTile, (tile + 1) * kTile);
  const unsigned readers = __ballot_sync(kAllLanes, reads);
  if (readers == 0) return;
  // Row u of this group, counted from the plan's first: neighbouring groups hold neighbours.
  const int first = tile * kTile + threadIdx.x / kWarp * kRows * L::kGroups;
  auto row_of = [&](int u) { return first + u * L::kGroups + group; };

  float rows[kRows][L::kElements];
  {
    const T* table = args.r.head<const T>(b_begin, h);
    typename L::Part parts[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int row = row_of(u);
      parts[u].load(table + (plan.row_begin + row) * args.r.stride_t, args.Dp, own,
                    row < plan.n_rows);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) parts[u].widen(rows[u]);
  }
  // Rows whose sums this lane gets.
  constexpr int kDealt = L::kLanes < kRows ? kRows / L::kLanes : 1;
  constexpr int kSharers = L::kLanes > kRows ? L::kLanes / kRows : 1;  // lanes that get the same
  const int dealt = own * kRows / L::kLanes;
  float bias[L::kElements];
  load_bias<L, T>(args.r_r_bias, h, args.Dp, own, bias);
  const float factor = product_factor(args, args.pos_scale);
  for (int b = b_begin; b < b_end; ++b) {
    if ((readers >> (b - b_begin) & 1) == 0) continue;
    const T* queries = args.q_pos.head<const T>(b, h);
    for (int i = 0; i < args.Tq; ++i) {
      float query[L::kElements], sums[kRows];
      load_query<L, T>(queries + i * args.q_pos.stride_t, args.Dp, factor, bias, own, query);
#pragma unroll
      for (int u = 0; u < kRows; ++u) sums[u] = dot(query, rows[u]);
      deal_sums<L::kLanes>(sums, own);
      const int64_t query_row = (int64_t(b) * args.H + h) * args.Tq + i;
#pragma unroll
      for (int e = 0; e < kDealt; ++e) {
        const int row = row_of(dealt + e);
        if (own % kSharers == 0 && row < plan.n_rows)
          args.positions[query_row * plan.n_rows + row] = sums[e];
      }
    }
  }
}

}  // namespace txl::cuda
