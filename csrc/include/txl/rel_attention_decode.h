// rel_attention on CUDA for few queries, forward only: the problem, how it is cut, the launch.
#pragma once

#include <cstdint>

#include "txl/key_range.h"
#include "txl/tensor.h"

namespace txl {

constexpr int kDecodeQueries = 16;  // the most queries

// [H, D], contiguous, in float32 or in q's dtype; null = zeros.
struct HeadBias {
  const void* data = nullptr;
  bool is_float = true;
};

// [B], int32 or int64, on the device and never read by the host; null = `absent` everywhere.
struct Lengths {
  const void* data = nullptr;
  bool is_wide = false;

  // Row b's entry, clamped into [0, Tk], so that no value can make a kernel read outside.
  TXL_HOST_DEVICE int of(int b, int Tk, int absent) const {
    if (data == nullptr) return absent;
    const int64_t given =
        is_wide ? static_cast<const int64_t*>(data)[b] : static_cast<const int32_t*>(data)[b];
    return static_cast<int>(given < 0 ? 0 : given > Tk ? Tk : given);
  }
};

// How the work is cut. Splits are runs of keys of one (b, h) pair; all of it follows from sizes,
// options and the device, never from the values of a tensor.
struct DecodePlan {
  int key_begin = 0, key_end = 0;  // keys that some query may see by the rule
  int n_splits = 1, split_keys = 0;
  int row_begin = 0, n_rows = 0;  // rows of r that some pair of query and key reads
  int shift = 0;                  // from j - i to the row, counted from row_begin
  int batches_per_block = 1;      // that meet a tile of r in one block of the first kernel
};

// Symbols are those of docs/mathematics.md.
struct DecodeArgs {
  int B = 0, H = 0, Tq = 0, Tm = 0, Ts = 0, D = 0, Dv = 0, R = 0;
  Tensor4 q, k, v, mem_k, mem_v, r;
  HeadBias r_w_bias, r_r_bias;
  int64_t offset = 0;
  bool clamp = false;
  KeyRule rule;
  Lengths key_start, key_lens;
  Tensor4 mask;  // bool, true = attend; data null if absent
  int64_t mask_stride_key = 0;
  float scale = 1, softcap = 0;
  void* out = nullptr;   // [B, H, Tq, Dv], contiguous
  float* lse = nullptr;  // [B, H, Tq]
  DecodePlan plan;
  // Between the kernels, in float32.
  float* positions = nullptr;    // [B, H, Tq, n_rows]: scaled (q + r_r_bias) · r
  float* split_out = nullptr;    // [B, H, Tq, n_splits, Dv], absent where there is one split
  float* split_stats = nullptr;  // [B, H, Tq, n_splits, 2]: maximum and sum

  TXL_HOST_DEVICE int Tk() const { return Tm + Ts; }
};

// Cuts the work for the current device.
DecodePlan plan_decode(const DecodeArgs& args);

// Enqueues on `stream` (a cudaStream_t). Null, or what CUDA says went wrong. Not for float64.
const char* rel_attention_decode(Scalar dtype, const DecodeArgs& args, void* stream);

}  // namespace txl
