// rel_attention on the CPU: the problem, its plan, and the kernels of each instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "txl/key_range.h"
#include "txl/tensor.h"

namespace txl {

// The largest tile: its queries, and the keys of one block forward and backward (where twice as
// many matrices must fit into the cache).
constexpr int64_t kQueryTile = 64, kFwdKeyBlock = 1024, kBwdKeyBlock = 512;
constexpr int64_t kKeyBlock = kFwdKeyBlock;

// The arguments that both directions read. Symbols are those of docs/mathematics.md.
struct RelAttentionArgs {
  int64_t B = 0, H = 0, Tq = 0, Tm = 0, Ts = 0, D = 0, Dv = 0, R = 0;
  Tensor4 q, k, v, mem_k, mem_v, r;
  const void* r_w_bias = nullptr;  // [H, D] in the accumulation type, contiguous, or null
  const void* r_r_bias = nullptr;
  bool r_per_batch = false, r_per_head = false;
  int64_t offset = 0;
  bool clamp = false;
  KeyRule rule;
  const int64_t* key_start = nullptr;  // [B], within [0, Tk], or null
  const int64_t* key_lens = nullptr;
  Tensor4 mask;  // bool, true = attend; data null if absent
  int64_t mask_stride_key = 0;
  double scale = 1, softcap = 0, dropout_p = 0;
  uint64_t dropout_seed = 0;
  Tensor4 out;          // [B, H, Tq, Dv]: written forward, read backward
  void* lse = nullptr;  // [B, H, Tq] in the accumulation type, contiguous, natural logarithm

  int64_t Tk() const { return Tm + Ts; }
  // The keys of batch row b: those between `key_start` and `key_lens`.
  KeyRange keys_of_row(int64_t b) const;
  // The keys that query i of batch row b attends to; empty if begin >= end. Both ends grow with i.
  KeyRange keys_of(int64_t b, int64_t i) const;
  // (b, h) pairs in the order of work: pairs that read the same table of `r` are adjacent.
  int64_t n_pairs() const { return B * H; }
  int64_t batch_of(int64_t pair) const { return batch_major() ? pair / H : pair % B; }
  int64_t head_of(int64_t pair) const { return batch_major() ? pair % H : pair / B; }
  // The tables of `r`, numbered in the order of work.
  int64_t n_groups() const { return (r_per_batch ? B : 1) * (r_per_head ? H : 1); }
  int64_t group_of(int64_t pair) const {
    if (r_per_batch && r_per_head) return pair;
    return r_per_head ? head_of(pair) : r_per_batch ? batch_of(pair) : 0;
  }

 private:
  bool batch_major() const { return r_per_batch; }
};

// Gradients: contiguous, in the inputs' dtype (the biases' in the accumulation type); null if not
// requested.
struct RelAttentionGrads {
  Tensor4 dout;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr, *dmem_k = nullptr, *dmem_v = nullptr;
  void* dr = nullptr;                               // [groups, R, D]
  void *dr_w_bias = nullptr, *dr_r_bias = nullptr;  // [H, D]
};

// How the work is divided. An item is one query tile of one (b, h) pair. Items that share keys, and
// then items that share position tables, are adjacent. Chunks are runs of items of about equal
// cost; a thread that has finished a chunk continues with the next one that nobody works on.
struct RelAttentionPlan {
  int64_t tile_rows = 0, n_tiles = 0;  // tile_rows: a multiple of 16 if there are several tiles
  int64_t key_block = 0;               // the largest number of keys in a block
  std::vector<int64_t> chunks;         // chunk c computes items [chunks[c], chunks[c + 1])
  int64_t e_begin = 0, e_end = 0;      // table columns e = j - i + Tq - 1 that some tile reads

  // Rows of a tile of `n` queries as products compute it; those after the n-th are zeros. ATen
  // keeps machine code for every distinct product (see txl/gemm.h), so there are eight heights
  // only.
  int64_t tile_height(int64_t n) const {
    if (n > 8 || n_tiles > 1) return (n + 15) / 16 * 16;
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
  }
  int64_t n_chunks() const { return static_cast<int64_t>(chunks.size()) - 1; }
  int64_t n_columns() const { return e_end - e_begin; }
};

RelAttentionPlan plan_rel_attention(const RelAttentionArgs& args, int64_t key_block,
                                    int64_t threads);

// The key blocks of one query tile: they start at `aligned_begin`, a multiple of 16, and have
// `width` keys each.
struct TileKeys {
  int64_t begin, end, aligned_begin, width;
};
TileKeys tile_keys(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                   int64_t row_begin, int64_t row_end);

// Items of the last step of the backward: tables of `r`, then pairs, then heads.
inline int64_t finish_items(const RelAttentionArgs& args) {
  return args.n_groups() + args.n_pairs() + args.H;
}

// Partial sums of gradients to which several chunks contribute, in the accumulation type. Every
// chunk has slots of its own, and slots are added in the order of chunks, so that the result does
// not depend on timing.
struct RelAttentionPartials {
  void *dk = nullptr,
       *dv = nullptr;     // [2 · chunks, Tk, D | Dv]: pairs of which a chunk computes a part
  void* dr = nullptr;     // [groups + chunks - 1, R, D]: slot = group + chunk
  void* dbias = nullptr;  // [B · H + chunks - 1, 2, D]: slot = pair + chunk
};

// One dtype's kernels. `workspace` returns the bytes of scratch memory of one chunk; the memory is
// aligned to 64 bytes.
struct FwdKernels {
  int64_t (*workspace)(const RelAttentionArgs&, const RelAttentionPlan&);
  void (*chunk)(const RelAttentionArgs&, const RelAttentionPlan&, int64_t chunk, char* workspace);
};

// `finish` computes items [0, finish_items) after all chunks: it adds the partial sums.
struct BwdKernels {
  int64_t (*workspace)(const RelAttentionArgs&, const RelAttentionPlan&);
  void (*chunk)(const RelAttentionArgs&, const RelAttentionPlan&, const RelAttentionGrads&,
                const RelAttentionPartials&, int64_t chunk, char* workspace);
  void (*finish)(const RelAttentionArgs&, const RelAttentionPlan&, const RelAttentionGrads&,
                 const RelAttentionPartials&, int64_t item);
};

// The best kernels that this processor and ATen's capability setting allow.
const FwdKernels& rel_attention_fwd_kernels(Scalar dtype);
const BwdKernels& rel_attention_bwd_kernels(Scalar dtype);

}  // namespace txl
