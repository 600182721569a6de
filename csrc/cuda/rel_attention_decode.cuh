// rel_attention for few queries: splits of the keys and their merge, after the position scores. The
// derivation is in docs/mathematics.md, section 4.
#pragma once

#include "rel_attention_positions.cuh"

namespace txl::cuda {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kNone = -INFINITY;  // the maximum over no key

// What a row's softmax knows about a run of keys: 2^maximum · sum is the denominator.
struct Stats {
  float maximum, sum;
};

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

// The keys that some query of batch row b attends to, in every lane of a warp.
__device__ inline Keys keys_of_row(const DecodeArgs& args, int b, bool has_one_query) {
  if (has_one_query) return args.keys_of(b, 0);
  static_assert(kDecodeQueries <= kWarp);
  const int i = threadIdx.x % kWarp;
  Keys keys = i < args.Tq ? args.keys_of(b, i) : args.no_keys();
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    keys = keys.with({__shfl_xor_sync(kAllLanes, keys.begin, distance),
                      __shfl_xor_sync(kAllLanes, keys.end, distance)});
  return keys;
}

// What a warp reads about a query in every step, and which query it is.
struct alignas(16) QueryInfo {
  int begin, end;    // its keys
  int shift;         // from a key to the row of r, counted from the plan's first
  int row;           // of the results: (b · H + h) · Tq + i
  const bool* mask;  // its row of the mask
  int h, i;
};

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
  const QueryInfo (&info)[kQueries];
  int b, hk, own, group;
  float query[kQueries][L::kElements];
  Online<L::kElements> online[kQueries];

  // The warp's queries are those from number `first` on, below `end`, of key head hk. The block's
  // queries attend to `keys`. Fills `info`.
  __device__ SplitWarp(const DecodeArgs& args, int b, int hk, int first, int end, Keys keys,
                       QueryInfo (&info)[kQueries])
      : args(args), info(info), b(b), hk(hk) {
    const int lane = threadIdx.x % kWarp;
    own = lane % L::kLanes, group = lane / L::kLanes;
    if (lane < kQueries) {
      const bool there = first + lane < end;
      const int n_heads = args.group(), number = there ? first + lane : 0;
      const int i = kQueries == 1 ? 0 : number / n_heads;
      const int h = kQueries == 1 ? hk : hk * n_heads + number % n_heads;
      const Keys seen = kQueries == 1 ? keys : there ? args.keys_of(b, i) : args.no_keys();
      const bool* mask = args.mask.head<const bool>(b, h) + i * args.mask.stride_t;
      const int shift = args.to_row(b) - i - args.plan.row_begin;
      info[lane] = {seen.begin, seen.end, shift, (b * args.H + h) * args.Tq + i, mask, h, i};
    }
    __syncwarp();
    const float factor = product_factor(args, args.scale);
#pragma unroll
    for (int a = 0; a < kQueries; ++a) {
      const int h = kQueries == 1 ? hk : info[a].h, i = kQueries == 1 ? 0 : info[a].i;
      float bias[L::kElements];
      load_bias<L, T>(args.r_w_bias, h, args.D, own, bias);
      load_query<L, T>(args.q.head<const T>(b, h) + i * args.q.stride_t, args.D, factor, bias, own,
                       query[a]);
    }
  }

  // The position score of a query and key j, and whether the mask lets them meet.
  __device__ float position(const QueryInfo& query, int j) const {
    const int n_rows = args.plan.n_rows;
    int m = j + query.shift;
    if (args.clamp) m = max(0, min(m, n_rows - 1));
    return m >= 0 && m < n_rows ? args.positions[int64_t(query.row) * n_rows + m] : 0;
  }
  __device__ bool attends(const QueryInfo& query, int j) const {
    return args.mask.data == nullptr || query.mask[j * args.mask_stride_key];
  }

  // Takes in keys [begin, end), at most kStep of them; `k` and `v` are the rows of this group's
  // first. Loads of k and v are all issued before the first is used.
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
          own < kKeys && j < end && j >= info[a].begin && j < info[a].end && attends(info[a], j);
      const float x = sees ? position(info[a], j) : 0;
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
  // in the segment, read from their own tensors. Keys that no query of this warp sees are not read.
  __device__ void walk(Keys split, int first, int stride) {
    Keys any = args.no_keys();
#pragma unroll
    for (int a = 0; a < kQueries; ++a) any = any.with({info[a].begin, info[a].end});
    split = {max(split.begin, any.begin), min(split.end, any.end)};
#pragma unroll 1
    for (int place = 0; place < 2; ++place) {
      const bool in_memory = place == 0;
      const Tensor4 &keys = in_memory ? args.mem_k : args.k,
                    &values = in_memory ? args.mem_v : args.v;
      const int zero = in_memory ? 0 : args.Tm;  // the key in row 0
      const int begin = max(split.begin, zero) + first * kStep;
      const int end = min(split.end, in_memory ? args.Tm : args.Tk());
      const T* k = keys.head<const T>(b, hk) + (begin + group - zero) * keys.stride_t;
      const T* v = values.head<const T>(b, hk) + (begin + group - zero) * values.stride_t;
      for (int j = begin; j < end; j += stride * kStep) {
        meet(k, v, keys.stride_t, values.stride_t, j, end);
        k += stride * kStep * keys.stride_t, v += stride * kStep * values.stride_t;
      }
    }
  }
};

// One split of the keys of one (b, hk) pair: up to kWarps · kQueries of the queries of its heads. A
// warp computes kQueries of them, and the warps that share them take turns at the keys; in a warp,
// groups of lanes take a key each, kKeys at a time, with a softmax state of their own: nothing
// waits for another warp before the keys are done. The block reads K and V once, in 16 bytes to a
// lane (queries beyond a warp's share meet them in L1; blocks of further queries of the same keys
// are neighbours and meet them in L2). The keys are those that some query attends to, cut on the
// device; a block without keys ends at once. Writes the split's unnormalised output and stats, or
// the result where there is one split. Scores, softmax and sums are float32; the order of every sum
// is fixed.
template <typename T, int kHead, int kQueries, bool kAligned>
__global__ void __launch_bounds__(kThreads, SplitWarp<T, kHead, kQueries, kAligned>::kBlocks)
    rel_attention_split_kernel(const DecodeArgs args) {
  using Warp = SplitWarp<T, kHead, kQueries, kAligned>;
  using L = typename Warp::L;
  __shared__ float out[kWarps][kQueries][kHead];
  __shared__ Stats stats[kWarps][kQueries];
  __shared__ QueryInfo info[kWarps][kQueries];
  const DecodePlan& plan = args.plan;
  const int query_block = kQueries == 1 ? 0 : blockIdx.x % plan.query_blocks;
  const int part = kQueries == 1 ? blockIdx.x : blockIdx.x / plan.query_blocks;
  const int split = part % plan.n_splits, pair = part / plan.n_splits;
  const int b = pair / args.Hk, hk = pair % args.Hk;
  const Keys keys = keys_of_row(args, b, kQueries == 1);
  const Splits splits = Splits::of(keys.count(), plan.n_splits);
  if (split >= splits.n && plan.n_splits > 1) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = query_block * plan.block_queries;
  const int n_queries = min(plan.block_queries, args.group() * args.Tq - first);
  // 1, 2 or 4 shares of the queries; the other warps double up on the keys.
  const int needed = (n_queries + kQueries - 1) / kQueries;
  const int shares = needed > 2 ? 4 : needed, turns = kWarps / shares;

  Warp mine(args, b, hk, first + warp % shares * kQueries, first + n_queries, keys, info[warp]);
  const int begin = keys.begin + split * splits.keys;
  mine.walk({begin, min(begin + splits.keys, keys.end)}, warp / shares, turns);
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
  for (int n = threadIdx.x; n < n_queries * args.Dv; n += kThreads) {
    const int share = n / args.Dv / kQueries, a = n / args.Dv % kQueries, d = n % args.Dv;
    auto warp_of = [&](int turn) { return turn * shares + share; };
    const Merged all = merge_runs(
        turns, [&](int turn) { return stats[warp_of(turn)][a]; },
        [&](int turn) { return out[warp_of(turn)][a][d]; });
    const int64_t query_row = info[share][a].row;
    if (plan.n_splits == 1) {
      finish<T>(args, query_row, d, all);
    } else {
      const int64_t run = query_row * plan.n_splits + split;
      args.split_out[run * args.Dv + d] = all.out;
      if (d == 0) reinterpret_cast<Stats*>(args.split_stats)[run] = all.stats;
    }
  }
}

// One warp merges the splits of one query row, in their order, a lane to a column; splits without
// keys have no parts. Sums are float32.
template <typename T>
__global__ void __launch_bounds__(kThreads) rel_attention_combine_kernel(const DecodeArgs args) {
  const int query_row = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (query_row >= args.B * args.H * args.Tq) return;
  const Keys keys = keys_of_row(args, query_row / args.Tq / args.H, args.Tq == 1);
  const int n_splits = Splits::of(keys.count(), args.plan.n_splits).n;
  const int64_t first = int64_t(query_row) * args.plan.n_splits;
  const auto* stats = reinterpret_cast<const Stats*>(args.split_stats) + first;
  for (int d = threadIdx.x % kWarp; d < args.Dv; d += kWarp) {
    const float* out = args.split_out + first * args.Dv + d;
    const Merged all = merge_runs(
        n_splits, [&](int s) { return stats[s]; },
        [&](int s) { return out[int64_t(s) * args.Dv]; });
    finish<T>(args, query_row, d, all);
  }
}

}  // namespace txl::cuda
