// rel_attention for few queries in three kernels: position scores by row of r, splits of the keys,
// and their merge. The derivation is in docs/mathematics.md, section 4.
#pragma once

#include "lanes.cuh"
#include "txl/rel_attention_decode.h"

namespace txl::cuda {

constexpr int kRows = 8;  // rows of r that a lane of the first kernel holds parts of
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNone = -INFINITY;  // the maximum over no key

// What a row's softmax knows about a run of keys: 2^maximum · sum is the denominator.
struct Stats {
  float maximum, sum;
};

// What products of queries are multiplied by: scores in units of log2(e), or the softcap's
// argument.
__device__ inline float query_factor(const DecodeArgs& args) {
  return args.softcap > 0 ? args.scale / args.softcap : args.scale * kLog2e;
}

// A lane's part of a head's bias; all loads are on their way before the first is used.
template <typename L, typename T>
__device__ void load_bias(const DecodeArgs& args, const HeadBias& bias, int h, int own,
                          float (&x)[L::kElements]) {
  const int64_t first = int64_t(h) * args.D;
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) {
    const int d = L::column(own, e);
    const bool there = bias.data != nullptr && d < args.D;
    x[e] = 0;
    if (there && bias.is_float) x[e] = static_cast<const float*>(bias.data)[first + d];
    if (there && !bias.is_float) x[e] = Word<T>::widen(static_cast<const T*>(bias.data)[first + d]);
  }
}

// A lane's part of factor · (q_i + bias), in float32.
template <typename L, typename T>
__device__ void load_query(const DecodeArgs& args, const float (&bias)[L::kElements], int b, int h,
                           int i, int own, float (&query)[L::kElements]) {
  typename L::Part part;
  part.load(args.q.head<const T>(b, h) + i * args.q.stride_t, args.D, own, true);
  part.widen(query);
#pragma unroll
  for (int e = 0; e < L::kElements; ++e) query[e] = query_factor(args) * (query[e] + bias[e]);
}

// positions[b, h, i, m] = factor · (q_i + r_r_bias) · r_m for a tile of rows m and one head. A
// block holds its tile of r in registers, widened, kRows rows to a group of lanes, and lets its
// batch rows' queries pass: where r is shared by the batch, it is read once. Reads r, q, r_r_bias;
// writes float32. Every sum is float32 and in a fixed order.
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
  // Row u of this group, counted from the plan's first: neighbouring groups hold neighbours.
  const int first = tile * kTile + threadIdx.x / kWarp * kRows * L::kGroups;
  auto row_of = [&](int u, int of_group) { return first + u * L::kGroups + of_group; };

  float rows[kRows][L::kElements];
  {
    const T* table = args.r.head<const T>(b_begin, h);
    typename L::Part parts[kRows];
#pragma unroll
    for (int u = 0; u < kRows; ++u) {
      const int row = row_of(u, group);
      parts[u].load(table + (plan.row_begin + row) * args.r.stride_t, args.D, own,
                    row < plan.n_rows);
    }
#pragma unroll
    for (int u = 0; u < kRows; ++u) parts[u].widen(rows[u]);
  }
  const int dealt = row_of(own * kRows / L::kLanes, group);  // the row whose sum comes to this lane
  const bool writes = own % (L::kLanes / kRows) == 0 && dealt < plan.n_rows;
  float bias[L::kElements];
  load_bias<L, T>(args, args.r_r_bias, h, own, bias);
  for (int b = b_begin; b < b_end; ++b) {
    for (int i = 0; i < args.Tq; ++i) {
      float query[L::kElements], sums[kRows];
      load_query<L, T>(args, bias, b, h, i, own, query);
#pragma unroll
      for (int u = 0; u < kRows; ++u) sums[u] = dot(query, rows[u]);
      const float sum = deal_sums<L::kLanes>(sums, own);
      const int64_t query_row = (int64_t(b) * args.H + h) * args.Tq + i;
      if (writes) args.positions[query_row * plan.n_rows + dealt] = sum;
    }
  }
}

// One query's state over the keys that a group of lanes has met.
template <int kElements>
struct Online {
  Stats stats = {kNone, 0};
  float out[kElements] = {};  // unnormalised

  // Takes in keys' scores, in units of log2(e), -inf where not seen; leaves their weights in place.
  template <int n>
  __device__ void weigh(float (&scores)[n]) {
    float maximum = stats.maximum;
#pragma unroll
    for (int u = 0; u < n; ++u) maximum = fmaxf(maximum, scores[u]);
    const float origin = maximum == kNone ? 0 : maximum;
    const float kept = exp2f(stats.maximum - origin);
    stats.sum *= kept, stats.maximum = maximum;
#pragma unroll
    for (int u = 0; u < n; ++u) scores[u] = exp2f(scores[u] - origin), stats.sum += scores[u];
#pragma unroll
    for (int e = 0; e < kElements; ++e) out[e] *= kept;
  }

  // Takes in the state that the lane `distance` away holds for the same columns.
  __device__ void merge_lane(int distance) {
    const Stats other = {__shfl_xor_sync(kAllLanes, stats.maximum, distance),
                         __shfl_xor_sync(kAllLanes, stats.sum, distance)};
    const float maximum = fmaxf(stats.maximum, other.maximum);
    const float origin = maximum == kNone ? 0 : maximum;
    const float own = exp2f(stats.maximum - origin), its = exp2f(other.maximum - origin);
    stats = {maximum, own * stats.sum + its * other.sum};
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      out[e] = own * out[e] + its * __shfl_xor_sync(kAllLanes, out[e], distance);
  }
};

// One element of n runs' outputs put together, in the order of runs.
struct Merged {
  Stats stats;
  float out;
};
template <typename StatsOf, typename OutOf>
__device__ Merged merge_runs(int n, StatsOf stats_of, OutOf out_of) {
  Merged all = {{kNone, 0}, 0};
#pragma unroll 1
  for (int s = 0; s < n; ++s) all.stats.maximum = fmaxf(all.stats.maximum, stats_of(s).maximum);
  const float origin = all.stats.maximum == kNone ? 0 : all.stats.maximum;
#pragma unroll 1
  for (int s = 0; s < n; ++s) {
    const Stats run = stats_of(s);
    const float weight = exp2f(run.maximum - origin);
    all.stats.sum += weight * run.sum, all.out += weight * out_of(s);
  }
  return all;
}

// Writes column d of a query row's result, and with column 0 its lse. A row without keys, whose sum
// is 0 where any other's is at least 1 or NaN, gives 0 and -inf.
template <typename T>
__device__ void finish(const DecodeArgs& args, int64_t query_row, int d, const Merged& all) {
  const bool dead = all.stats.sum == 0;
  static_cast<T*>(args.out)[query_row * args.Dv + d] =
      Word<T>::narrow(dead ? 0 : all.out / all.stats.sum);
  if (d == 0)
    args.lse[query_row] = dead ? kNone : kLn2 * (all.stats.maximum + log2f(all.stats.sum));
}

// The keys that one query sees, dense mask apart, within [0, Tk].
struct Seen {
  int begin, end;
};
__device__ inline Seen seen_by(const DecodeArgs& args, int b, int i) {
  const int Tk = args.Tk();
  const KeyRange there = {args.key_start.of(b, Tk, 0), args.key_lens.of(b, Tk, Tk)};
  const KeyRange keys = args.rule.narrow(there, i + Tk - args.Tq).within(0, Tk);
  return keys.begin < keys.end ? Seen{int(keys.begin), int(keys.end)} : Seen{Tk, 0};
}

// A warp's queries against its keys of one split.
template <typename T, int kHead, int kQueries, bool kAligned>
struct SplitWarp {
  using L = Lanes<T, kHead, kAligned>;
  // Keys that a lane has in flight, by the registers that a part of a row takes as loaded, and keys
  // that the warp meets at once.
  static constexpr int kKeys = sizeof(typename L::Part) <= 16 ? 4 : 2;
  static constexpr int kStep = kKeys * L::kGroups;
  // Blocks that a multiprocessor holds at least: what registers allow without spills.
  static constexpr int kBlocks = kQueries == 1 ? 4 : kKeys == 4 ? 3 : 2;

  const DecodeArgs& args;
  int b, h, own, group, first_query;
  Seen seen[kQueries];
  float query[kQueries][L::kElements];
  Online<L::kElements> online[kQueries];

  __device__ SplitWarp(const DecodeArgs& args, int pair, int first_query)
      : args(args), b(pair / args.H), h(pair % args.H), first_query(first_query) {
    const int lane = threadIdx.x % kWarp;
    own = lane % L::kLanes, group = lane / L::kLanes;
    float bias[L::kElements];
    load_bias<L, T>(args, args.r_w_bias, h, own, bias);
#pragma unroll
    for (int a = 0; a < kQueries; ++a) {
      const bool there = first_query + a < args.Tq;
      seen[a] = there ? seen_by(args, b, first_query + a) : Seen{args.Tk(), 0};
      load_query<L, T>(args, bias, b, h, there ? first_query + a : 0, own, query[a]);
    }
  }

  // The position score of query a and key j, and whether the mask lets them meet.
  __device__ float position(int a, int j) const {
    const DecodePlan& plan = args.plan;
    int m = j - (first_query + a) + plan.shift;
    if (args.clamp) m = max(0, min(m, plan.n_rows - 1));
    const int64_t query_row = (int64_t(b) * args.H + h) * args.Tq + first_query + a;
    return m >= 0 && m < plan.n_rows ? args.positions[query_row * plan.n_rows + m] : 0;
  }
  __device__ bool attends(int a, int j) const {
    if (args.mask.data == nullptr) return true;
    const bool* row = args.mask.head<const bool>(b, h) + (first_query + a) * args.mask.stride_t;
    return row[j * args.mask_stride_key];
  }

  // Takes in keys [begin, end), at most kStep of them; `k` and `v` are the rows of this group's
  // first. Loads of k and v are all on their way before the first is used.
  __device__ void meet(const T* k, const T* v, int64_t k_stride, int64_t v_stride, int begin,
                       int end) {
    typename L::Part k_part[kKeys], v_part[kKeys];
    auto key_of = [&](int u) { return begin + u * L::kGroups + group; };
#pragma unroll
    for (int u = 0; u < kKeys; ++u, k += L::kGroups * k_stride)
      k_part[u].load(k, args.D, own, key_of(u) < end);
#pragma unroll
    for (int u = 0; u < kKeys; ++u, v += L::kGroups * v_stride)
      v_part[u].load(v, args.Dv, own, key_of(u) < end);

    // Lane u of a group fetches what concerns key u: its part of the sum is the position score.
    const int j = key_of(own);
    float scores[kQueries][kKeys];
    unsigned visible[kQueries];
#pragma unroll
    for (int a = 0; a < kQueries; ++a) {
      const bool sees =
          own < kKeys && j < end && j >= seen[a].begin && j < seen[a].end && attends(a, j);
      const float x = sees ? position(a, j) : 0;
      visible[a] = __ballot_sync(kAllLanes, sees) >> (group * L::kLanes);
#pragma unroll
      for (int u = 0; u < kKeys; ++u) scores[a][u] = u == own ? x : 0;
    }
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float key[L::kElements];
      k_part[u].widen(key);
#pragma unroll
      for (int a = 0; a < kQueries; ++a)
        scores[a][u] = sum_over_lanes<L::kLanes>(scores[a][u] + dot(query[a], key));
    }
    if (args.softcap > 0) {
#pragma unroll
      for (int a = 0; a < kQueries; ++a) {
#pragma unroll
        for (int u = 0; u < kKeys; ++u) scores[a][u] = args.softcap * kLog2e * tanhf(scores[a][u]);
      }
    }
#pragma unroll
    for (int a = 0; a < kQueries; ++a) {
#pragma unroll
      for (int u = 0; u < kKeys; ++u) scores[a][u] = visible[a] >> u & 1 ? scores[a][u] : kNone;
      online[a].weigh(scores[a]);
    }
#pragma unroll
    for (int u = 0; u < kKeys; ++u) {
      float value[L::kElements];
      v_part[u].widen(value);
#pragma unroll
      for (int a = 0; a < kQueries; ++a) {
#pragma unroll
        for (int e = 0; e < L::kElements; ++e) online[a].out[e] += scores[a][u] * value[e];
      }
    }
  }

  // Every `stride`-th step of the split's keys from the `first`-th on: those in memory, then those
  // in the segment, each where it lies. Keys that no query of this warp sees are not read.
  __device__ void walk(Seen split, int first, int stride) {
    Seen any = {args.Tk(), 0};
#pragma unroll
    for (int a = 0; a < kQueries; ++a)
      any = {min(any.begin, seen[a].begin), max(any.end, seen[a].end)};
    split = {max(split.begin, any.begin), min(split.end, any.end)};
#pragma unroll 1
    for (int place = 0; place < 2; ++place) {
      const bool in_memory = place == 0;
      const Tensor4 &keys = in_memory ? args.mem_k : args.k,
                    &values = in_memory ? args.mem_v : args.v;
      const int zero = in_memory ? 0 : args.Tm;  // the key in row 0
      const int begin = max(split.begin, zero) + first * kStep;
      const int end = min(split.end, in_memory ? args.Tm : args.Tk());
      const T* k = keys.head<const T>(b, h) + (begin + group - zero) * keys.stride_t;
      const T* v = values.head<const T>(b, h) + (begin + group - zero) * values.stride_t;
      for (int j = begin; j < end; j += stride * kStep) {
        meet(k, v, keys.stride_t, values.stride_t, j, end);
        k += stride * kStep * keys.stride_t, v += stride * kStep * values.stride_t;
      }
    }
  }
};

// One split of one (b, h) pair: a run of keys, up to kDecodeQueries queries. A warp takes kQueries
// of the queries, and the warps that share them take turns at the keys; in a warp, groups of lanes
// take a key each, kKeys at a time, with a softmax state of their own: nothing waits for another
// warp before the keys are done. K and V are read once, in 16 bytes to a lane (queries beyond a
// warp's share meet them in L1). Writes the split's unnormalised output and stats, or the result
// where there is one split. Scores, softmax and sums are float32; the order of every sum is fixed.
template <typename T, int kHead, int kQueries, bool kAligned>
__global__ void __launch_bounds__(kThreads, SplitWarp<T, kHead, kQueries, kAligned>::kBlocks)
    rel_attention_split_kernel(const DecodeArgs args) {
  using Warp = SplitWarp<T, kHead, kQueries, kAligned>;
  using L = typename Warp::L;
  __shared__ float out[kWarps][kQueries][kHead];
  __shared__ Stats stats[kWarps][kQueries];
  const DecodePlan& plan = args.plan;
  const int split = blockIdx.x % plan.n_splits, pair = blockIdx.x / plan.n_splits;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // 1, 2 or 4 shares of the queries; the other warps double up on the keys.
  const int needed = (args.Tq + kQueries - 1) / kQueries;
  const int shares = needed > 2 ? 4 : needed, turns = kWarps / shares;

  Warp mine(args, pair, warp % shares * kQueries);
  const int begin = plan.key_begin + split * plan.split_keys;
  mine.walk({begin, min(begin + plan.split_keys, plan.key_end)}, warp / shares, turns);
#pragma unroll
  for (int a = 0; a < kQueries; ++a) {
#pragma unroll
    for (int distance = L::kLanes; distance < kWarp; distance *= 2)
      mine.online[a].merge_lane(distance);
    if (lane == 0) stats[warp][a] = mine.online[a].stats;
    if (mine.group == 0) {
#pragma unroll
      for (int e = 0; e < L::kElements; ++e)
        out[warp][a][L::column(mine.own, e)] = mine.online[a].out[e];
    }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < args.Tq * args.Dv; n += kThreads) {
    const int i = n / args.Dv, d = n % args.Dv, a = i % kQueries;
    auto warp_of = [&](int turn) { return turn * shares + i / kQueries; };
    const Merged all = merge_runs(
        turns, [&](int turn) { return stats[warp_of(turn)][a]; },
        [&](int turn) { return out[warp_of(turn)][a][d]; });
    const int64_t query_row = int64_t(pair) * args.Tq + i;
    if (plan.n_splits == 1) {
      finish<T>(args, query_row, d, all);
    } else {
      const int64_t run = query_row * plan.n_splits + split;
      args.split_out[run * args.Dv + d] = all.out;
      if (d == 0) reinterpret_cast<Stats*>(args.split_stats)[run] = all.stats;
    }
  }
}

// One warp merges the splits of one query row, in their order, a lane to a column. Sums are
// float32.
template <typename T>
__global__ void __launch_bounds__(kThreads) rel_attention_combine_kernel(const DecodeArgs args) {
  const int64_t query_row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (query_row >= int64_t(args.B) * args.H * args.Tq) return;
  const int64_t first = query_row * args.plan.n_splits;
  const auto* stats = reinterpret_cast<const Stats*>(args.split_stats) + first;
  for (int d = threadIdx.x % kWarp; d < args.Dv; d += kWarp) {
    const float* out = args.split_out + first * args.Dv + d;
    const Merged all = merge_runs(
        args.plan.n_splits, [&](int s) { return stats[s]; },
        [&](int s) { return out[int64_t(s) * args.Dv]; });
    finish<T>(args, query_row, d, all);
  }
}

}  // namespace txl::cuda
