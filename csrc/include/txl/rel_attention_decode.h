// rel_attention on CUDA for few queries, forward only: the problem, how it is cut, the launch.
#pragma once

#include <cstdint>

#include "txl/key_range.h"
#include "txl/tensor.h"

namespace txl {

constexpr int kDecodeQueries = 16;  // the most queries

TXL_HOST_DEVICE inline int64_t bounded(int64_t x, int64_t lowest, int64_t highest) {
  return x < lowest ? lowest : x > highest ? highest : x;
}

// [H, D] or [H, Dp], contiguous, in float32 or in q's dtype; null = zeros.
struct HeadBias {
  const void* data = nullptr;
  bool is_float = true;
};

// Integers [B] (stride_i is 0) or [B, Tq], int32 or int64, on the device; the host never reads
// them. Null data = absent.
struct RowNumbers {
  const void* data = nullptr;
  bool is_wide = false;
  int64_t stride_b = 0, stride_i = 0;

  // The number of query i in batch row b; one beyond ±2^31 counts as ±2^31.
  TXL_HOST_DEVICE int64_t of(int b, int i) const {
    constexpr int64_t kMost = int64_t(1) << 31;
    const int64_t at = b * stride_b + i * stride_i;
    if (!is_wide) return static_cast<const int32_t*>(data)[at];
    return bounded(static_cast<const int64_t*>(data)[at], -kMost, kMost);
  }
};

// Keys [begin, end), none if begin >= end.
struct Keys {
  int begin, end;

  TXL_HOST_DEVICE Keys with(Keys other) const {  // the smallest range that contains both
    return {begin < other.begin ? begin : other.begin, end > other.end ? end : other.end};
  }
  TXL_HOST_DEVICE int count() const { return begin < end ? end - begin : 0; }
};

// A cut of a range of keys into `n` splits of `keys` keys each; the last one may be shorter.
struct Splits {
  int n, keys;

  TXL_HOST_DEVICE static Splits of(int n_keys, int most) {
    constexpr int kFewest = 64, kMultiple = 16;  // keys of a split
    const int fit = n_keys / kFewest < most ? n_keys / kFewest : most;
    const int n = fit > 1 ? fit : 1, keys = (n_keys + n - 1) / n;
    const int whole = (keys + kMultiple - 1) / kMultiple * kMultiple;
    return {whole == 0 ? 0 : (n_keys + whole - 1) / whole, whole};
  }
};

// How the work is cut. All of it follows from sizes, options and the device, never from the values
// of a tensor: these narrow the work on the device.
struct DecodePlan {
  int block_queries = 1, query_blocks = 1;  // the queries of a key head, in blocks
  int n_splits = 1;                         // the most splits of a batch row's keys
  int row_begin = 0, n_rows = 0;            // rows of r that a pair of query and key may read
  int batches_per_block = 1;                // that meet a tile of r in one block
};

// Symbols are those of docs/mathematics.md. The queries of key head hk are those of its H / Hk
// query heads, numbered query by query: number n is query n / (H / Hk).
struct DecodeArgs {
  int B = 0, H = 0, Hk = 0, Tq = 0, Tm = 0, Ts = 0, D = 0, Dv = 0, Dp = 0, R = 0;
  Tensor4 q, k, v, mem_k, mem_v, q_pos, r;  // q_pos: q where the call has none
  HeadBias r_w_bias, r_r_bias;
  int64_t offset = 0;
  bool clamp = false;
  KeyRule rule;
  RowNumbers q_start, key_start, key_lens;
  Tensor4 mask;  // bool, true = attend; data null if absent
  int64_t mask_stride_key = 0;
  float scale = 1, pos_scale = 1, softcap = 0;
  void* out = nullptr;   // [B, H, Tq, Dv], contiguous
  float* lse = nullptr;  // [B, H, Tq]
  DecodePlan plan;
  // Between the kernels, in float32.
  float* positions = nullptr;    // [B, H, Tq, n_rows]: scaled (q_pos + r_r_bias) · r
  float* split_out = nullptr;    // [B, H, Tq, n_splits, Dv], absent where there is one split
  float* split_stats = nullptr;  // [B, H, Tq, n_splits, 2]: maximum and sum

  TXL_HOST_DEVICE int Tk() const { return Tm + Ts; }
  TXL_HOST_DEVICE int group() const { return H / Hk; }
  // Whether the keys of a query depend on its batch row.
  TXL_HOST_DEVICE bool has_row_numbers() const {
    return q_start.data != nullptr || key_start.data != nullptr || key_lens.data != nullptr;
  }
  // The position of batch row b's first query among the keys.
  TXL_HOST_DEVICE int64_t start_of(int b) const {
    return q_start.data == nullptr ? Tk() - Tq : q_start.of(b, 0);
  }
  // From j - i to the row of r, or to one outside on the same side where that is far outside.
  TXL_HOST_DEVICE int to_row(int b) const {
    constexpr int64_t kFar = int64_t(1) << 40;
    const int64_t shift = bounded(offset, -kFar, kFar) + Tk() - Tq - start_of(b);
    return static_cast<int>(bounded(shift, -int64_t(Tk()), int64_t(R) + Tq));
  }
  // The keys within [0, Tk) that query i of batch row b attends to, dense mask apart.
  TXL_HOST_DEVICE Keys keys_of(int b, int i) const {
    KeyRange keys = {0, Tk()};
    if (key_start.data != nullptr) keys = keys.within(key_start.of(b, i), keys.end);
    if (key_lens.data != nullptr) keys = keys.within(keys.begin, key_lens.of(b, i));
    keys = rule.narrow(keys, start_of(b) + i).within(0, Tk());
    if (keys.begin >= keys.end) return no_keys();
    return {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
  }
  TXL_HOST_DEVICE Keys no_keys() const { return {Tk(), 0}; }
};

// Cuts the work for the current device.
DecodePlan plan_decode(const DecodeArgs& args);

// Enqueues on `stream` (a cudaStream_t). Null, or what CUDA says went wrong. Not for float64.
const char* rel_attention_decode(Scalar dtype, const DecodeArgs& args, void* stream);

}  // namespace txl
