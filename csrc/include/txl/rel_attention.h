// rel_attention on the CPU: the problem, its plan, and the kernels of each instruction set.
#pragma once

#include <cstdint>
#include <vector>

#include "txl/key_range.h"
#include "txl/tensor.h"

namespace txl {

// The largest tile: queries, and keys that they meet at once forward and backward (where twice as
// many matrices must stay in cache).
constexpr int64_t kQueryTile = 64, kFwdKeyBlock = 1024, kBwdKeyBlock = 512;
constexpr int64_t kKeyBlock = kFwdKeyBlock;

// What both directions read. Symbols are those of docs/mathematics.md.
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
  // The keys that are there at all in batch row b.
  KeyRange keys_of_row(int64_t b) const;
  // The keys that query i of batch row b may see; empty if begin >= end. Both ends grow with i.
  KeyRange keys_of(int64_t b, int64_t i) const;
  // (b, h) pairs in the order of work: pairs that read one table of `r` stand together.
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

// Gradients: contiguous, in the inputs' dtype (the biases' in the accumulation type); null = not
// wanted.
struct RelAttentionGrads {
  Tensor4 dout;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr, *dmem_k = nullptr, *dmem_v = nullptr;
  void* dr = nullptr;                               // [groups, R, D]
  void *dr_w_bias = nullptr, *dr_r_bias = nullptr;  // [H, D]
};

// How the work is cut: an item is one query tile of one (b, h) pair; items that share keys, and
// then position tables, stand together, and are dealt in order to chunks of about equal cost. A
// thread takes the next chunk when it has done one.
struct RelAttentionPlan {
  int64_t tile_rows = 0, n_tiles = 0;
  int64_t key_block = 0;           // keys that a tile meets at once, at most
  std::vector<int64_t> chunks;     // chunk c does items [chunks[c], chunks[c + 1])
  int64_t e_begin = 0, e_end = 0;  // table columns e = j - i + Tq - 1 that some tile reads

  int64_t n_chunks() const { return static_cast<int64_t>(chunks.size()) - 1; }
  int64_t n_columns() const { return e_end - e_begin; }
};

RelAttentionPlan plan_rel_attention(const RelAttentionArgs& args, int64_t key_block,
                                    int64_t threads);

// The key blocks of one query tile: from `aligned_begin`, a multiple of 16, in steps of `width`.
struct TileKeys {
  int64_t begin, end, aligned_begin, width;
};
TileKeys tile_keys(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                   int64_t row_begin, int64_t row_end);

// Items of the last step of the backward: tables of `r`, then pairs, then heads.
inline int64_t finish_items(const RelAttentionArgs& args) {
  return args.n_groups() + args.n_pairs() + args.H;
}

// What chunks cannot write alone, in the accumulation type. Every chunk owns its slots, and they
// are summed in the order of chunks, so that the result does not depend on timing.
struct RelAttentionPartials {
  void *dk = nullptr,
       *dv = nullptr;     // [2 · chunks, Tk, D | Dv]: a pair cut at a chunk's first or last item
  void* dr = nullptr;     // [groups + chunks - 1, R, D]: slot = group + chunk
  void* dbias = nullptr;  // [B · H + chunks - 1, 2, D]: slot = pair + chunk
};

// One dtype's kernels. `workspace`: the bytes that one chunk needs, 64-byte aligned.
struct FwdKernels {
  int64_t (*workspace)(const RelAttentionArgs&, const RelAttentionPlan&);
  void (*chunk)(const RelAttentionArgs&, const RelAttentionPlan&, int64_t chunk, char* workspace);
};

// `finish`, after every chunk, does items [0, finish_items): they sum the partials.
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
