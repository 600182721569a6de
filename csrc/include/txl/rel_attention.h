// rel_attention on the CPU: the problem, its plan, and the kernels of each instruction set.
#pragma once

#include <algorithm>
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
// Packed matrices with one column per key or per row of `r` consist of panels of kPanel columns, so
// that no leading dimension depends on the number of columns. A product processes at most kPiece of
// them at a time.
constexpr int64_t kPanel = 1024, kPiece = 256;

// A run of keys: k [B, Hk, n, D] and v [B, Hk, n, Dv] are keys [begin, begin + n) of the call. A
// call has one run for the memory, if there is any, and one for the segment.
struct KeyRun {
  int64_t begin = 0, n = 0;
  Tensor4 k, v;
};
constexpr int kMaxKeyRuns = 2;

// key_start or key_lens: int64 within [0, Tk]; `stride_i` is 0 if all queries of a batch row have
// the same value.
struct KeyBounds {
  const int64_t* data = nullptr;
  int64_t stride_b = 0, stride_i = 0;

  int64_t of(int64_t b, int64_t i, int64_t absent) const {
    return data == nullptr ? absent : data[b * stride_b + i * stride_i];
  }
};

// Queries of one entry of the table of key ranges.
constexpr int64_t kRangeRows = 16;

// The arguments that both directions read. Symbols are those of docs/mathematics.md.
struct RelAttentionArgs {
  int64_t B = 0, H = 0, Hk = 0, Tq = 0, Tk = 0, D = 0, Dv = 0, Dp = 0, R = 0;
  Tensor4 q, q_pos, r;  // q_pos is q if the call has no position query
  bool has_q_pos = false;
  KeyRun runs[kMaxKeyRuns];
  int n_runs = 0;
  const void* r_w_bias = nullptr;  // [H, D] in the accumulation type, contiguous, or null
  const void* r_r_bias = nullptr;  // [H, Dp]
  bool r_per_batch = false, r_per_head = false;
  int64_t offset = 0;
  bool clamp = false;
  KeyRule rule;
  const int64_t* q_start = nullptr;  // [B] within ±2^31, or null: every row starts at Tk - Tq
  KeyBounds key_start, key_lens;
  // If key_start or key_lens differ between queries: [B, ceil(Tq / kRangeRows)], the smallest begin
  // and the largest end of the keys that an entry's queries attend to; null otherwise.
  const KeyRange* key_table = nullptr;
  Tensor4 mask;  // bool, true = attend; data null if absent
  int64_t mask_stride_key = 0;
  double scale = 1, pos_scale = 1, softcap = 0, dropout_p = 0;
  uint64_t dropout_seed = 0;
  Tensor4 out;          // [B, H, Tq, Dv]: written forward, read backward
  void* lse = nullptr;  // [B, H, Tq] in the accumulation type, contiguous, natural logarithm

  // Query heads of a key head.
  int64_t heads_per_key() const { return H / Hk; }
  // The position among the keys of batch row b's first query.
  int64_t position(int64_t b) const { return q_start != nullptr ? q_start[b] : Tk - Tq; }
  // Query i of batch row b and key j read row j - i + row_offset(b) of r. Where that row is outside
  // of r, it may be another row outside of r on the same side.
  int64_t row_offset(int64_t b) const;
  // The largest j' <= j at which a block of keys of batch row b may begin: multiples of 16, shifted
  // so that the columns of the position table that belong to a block have one alignment in all
  // batch rows. At least -15 for j >= 0.
  int64_t aligned(int64_t b, int64_t j) const;
  // The keys of batch row b: those between bounds that all its queries share.
  KeyRange keys_of_row(int64_t b) const;
  // The keys that query i of batch row b attends to; empty if begin >= end.
  KeyRange keys_of(int64_t b, int64_t i) const;
  // The smallest range that contains the keys of queries [first, last); `first` and, unless it is
  // Tq, `last` are multiples of kRangeRows.
  KeyRange keys_of_rows(int64_t b, int64_t first, int64_t last) const;

  // A unit is a batch row's key head with all its query heads. Units in the order of work: units
  // that read the same tables of `r` are adjacent.
  int64_t n_units() const { return B * Hk; }
  int64_t batch_of(int64_t unit) const { return batch_major() ? unit / Hk : unit % B; }
  int64_t key_head_of(int64_t unit) const { return batch_major() ? unit % Hk : unit / B; }
  // The tables of `r` that a unit reads form a group; groups are numbered in the order of work.
  int64_t tables_per_group() const { return r_per_head ? heads_per_key() : 1; }
  int64_t n_groups() const { return (r_per_batch ? B : 1) * (r_per_head ? Hk : 1); }
  int64_t group_of(int64_t unit) const {
    if (r_per_batch && r_per_head) return unit;
    return r_per_head ? key_head_of(unit) : r_per_batch ? batch_of(unit) : 0;
  }

 private:
  bool batch_major() const { return r_per_batch; }
};

// Fills the table of key ranges (RelAttentionArgs::key_table).
void fill_key_table(const RelAttentionArgs& args, KeyRange* table);

// Gradients: contiguous, in the inputs' dtype (the biases' in the accumulation type); null if not
// requested.
struct RelAttentionGrads {
  Tensor4 dout;
  Tensor4 dlse;  // [B, H, Tq] in the accumulation type, any strides; data null if absent
  void *dq = nullptr, *dq_pos = nullptr;
  void *dk[kMaxKeyRuns] = {}, *dv[kMaxKeyRuns] = {};  // of each run of keys
  void* dr = nullptr;                                 // [groups, tables of a group, R, Dp]
  void *dr_w_bias = nullptr, *dr_r_bias = nullptr;    // [H, D], [H, Dp]
};

// One query tile of one query head.
struct TileItem {
  int64_t head;  // counted from the unit's first query head
  int64_t tile;
};

// How the work is divided. Items, one for each query tile of each head, are numbered unit after
// unit. A unit is computed run by run: all items of a run use a block of keys while it is in the
// cache. Chunks are sequences of items of about equal cost; a thread that has finished a chunk
// continues with the next one that nobody works on.
struct RelAttentionPlan {
  int64_t tile_rows = 0, n_tiles = 0;    // tile_rows: a multiple of 16 if there are several tiles
  int64_t heads = 1;                     // query heads of a unit
  int64_t key_block = 0;                 // the largest number of keys in a block
  int64_t run_items = 0, run_tiles = 0;  // the most items of a run, and tiles of each head in it
  // For each batch row and each `run_tiles` tiles: the first key that these or later tiles read.
  std::vector<int64_t> first_keys;
  int64_t live_keys = 0;        // at most so many keys are read by both earlier and later runs
  std::vector<int64_t> chunks;  // chunk c computes items [chunks[c], chunks[c + 1])
  // Column x of the position table is row column_begin + x of `r`, extended on both sides. Products
  // read columns [0, n_columns); those outside [packed_begin, packed_end) they skip.
  int64_t column_begin = 0, n_columns = 0, packed_begin = 0, packed_end = 0;

  // Rows of a tile of `n` queries as products compute it; those after the n-th are zeros. ATen
  // keeps machine code for every distinct product (see txl/gemm.h), so there are eight heights
  // only.
  int64_t tile_height(int64_t n) const {
    if (n > 8 || n_tiles > 1) return (n + 15) / 16 * 16;
    return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
  }
  int64_t n_chunks() const { return static_cast<int64_t>(chunks.size()) - 1; }
  int64_t unit_items() const { return heads * n_tiles; }
  bool has_several_runs() const { return n_tiles > run_tiles || heads * run_tiles > run_items; }
  // The first key that items `index` and later of a unit of batch row b read.
  int64_t first_key(int64_t b, int64_t index) const {
    const int64_t n = (n_tiles + run_tiles - 1) / run_tiles;
    return first_keys[static_cast<size_t>(b * n + index / (heads * run_tiles))];
  }
  // Item `index` of a unit. Items are ordered by groups of `run_tiles` tiles, in a group by head,
  // for a head by tile: the items of a run read about the same keys.
  TileItem item(int64_t index) const {
    const int64_t begin = index / (heads * run_tiles) * run_tiles;
    const int64_t n = std::min(run_tiles, n_tiles - begin), rest = index - begin * heads;
    return {rest / n, begin + rest % n};
  }
  // The end of the run that starts with item `first` of a unit.
  int64_t run_end(int64_t first) const {
    const int64_t group = (first / (heads * run_tiles) + 1) * heads * run_tiles;
    return std::min({group, first + run_items, unit_items()});
  }
};

// `item_bytes`: scratch memory of one item of a run.
RelAttentionPlan plan_rel_attention(const RelAttentionArgs& args, int64_t key_block,
                                    int64_t item_bytes, int64_t threads);

// The key blocks of some queries: they start at `aligned_begin` and have `width` keys each.
struct TileKeys {
  int64_t begin, end, aligned_begin, width;
};
TileKeys tile_keys(const RelAttentionArgs& args, const RelAttentionPlan& plan, int64_t b,
                   int64_t row_begin, int64_t row_end);

// Items of the last step of the backward: groups of tables, then units, then heads.
inline int64_t finish_items(const RelAttentionArgs& args) {
  return args.n_groups() + args.n_units() + args.H;
}

// Partial sums of gradients to which several chunks contribute, in the accumulation type. Every
// chunk has slots of its own, and slots are added in the order of chunks, so that the result does
// not depend on timing.
struct RelAttentionPartials {
  void *dk = nullptr,
       *dv = nullptr;     // [2 · chunks, Tk, D | Dv]: units of which a chunk computes a part
  void* dr = nullptr;     // [groups + chunks - 1, tables of a group, R, Dp]: slot = group + chunk
  void* dbias = nullptr;  // [units + chunks - 1, heads, D + Dp]: slot = unit + chunk
};

// One dtype's kernels. `item_bytes` returns the bytes of scratch memory of one item of a run,
// `workspace` those of one chunk; the memory is aligned to 64 bytes.
struct FwdKernels {
  int64_t (*item_bytes)(const RelAttentionArgs&);
  int64_t (*workspace)(const RelAttentionArgs&, const RelAttentionPlan&);
  void (*chunk)(const RelAttentionArgs&, const RelAttentionPlan&, int64_t chunk, char* workspace);
};

// `finish` computes items [0, finish_items) after all chunks: it adds the partial sums.
struct BwdKernels {
  int64_t (*item_bytes)(const RelAttentionArgs&);
  int64_t (*workspace)(const RelAttentionArgs&, const RelAttentionPlan&);
  void (*chunk)(const RelAttentionArgs&, const RelAttentionPlan&, const RelAttentionGrads&,
                const RelAttentionPartials&, int64_t chunk, char* workspace);
  void (*finish)(const RelAttentionArgs&, const RelAttentionPlan&, const RelAttentionGrads&,
                 const RelAttentionPartials&, int64_t item);
};

// The most queries of a call that `rel_attention_decode.cpp` may compute.
constexpr int64_t kFewQueries = 16;
// The least head size that it reads: the longest vector of an accumulation type.
constexpr int64_t kShortestRow = 16;

// The division of a call with few queries: blocks of adjacent keys, the same for all units. It
// depends on sizes and ranges of keys, not on the number of threads.
struct FewQueryPlan {
  int64_t first_key = 0, block_keys = 0, n_blocks = 1;

  // Items in the order of work: those that read the same rows of `r` are adjacent.
  int64_t n_items(const RelAttentionArgs& args) const { return n_blocks * args.n_units(); }
  int64_t block_of(const RelAttentionArgs& args, int64_t item) const {
    return item / args.n_units();
  }
  int64_t unit_of(const RelAttentionArgs& args, int64_t item) const {
    return item % args.n_units();
  }
  // The keys of a block that some query of batch row b attends to; empty if begin >= end.
  KeyRange keys_of(const RelAttentionArgs& args, int64_t b, int64_t block) const {
    const int64_t begin = first_key + block * block_keys;
    return args.keys_of_rows(b, 0, args.Tq).within(begin, begin + block_keys);
  }
};

// Whether the kernels for few queries are the faster ones.
bool has_few_queries(const RelAttentionArgs& args, Scalar dtype);
FewQueryPlan plan_few_queries(const RelAttentionArgs& args);

// `block` computes a block's results for one unit: `result_size` bytes. `merge` combines those of a
// unit's blocks, which are adjacent. `workspace` returns the bytes of scratch memory of one thread.
// All memory is aligned to 64 bytes.
struct FewQueryKernels {
  int64_t (*workspace)(const RelAttentionArgs&, const FewQueryPlan&);
  int64_t (*result_size)(const RelAttentionArgs&);
  void (*block)(const RelAttentionArgs&, const FewQueryPlan&, int64_t unit, int64_t block,
                char* workspace, char* result);
  void (*merge)(const RelAttentionArgs&, const FewQueryPlan&, int64_t unit, char* results,
                int64_t result_size);
};

// The best kernels that this processor and ATen's capability setting allow.
const FwdKernels& rel_attention_fwd_kernels(Scalar dtype);
const FewQueryKernels& rel_attention_few_query_kernels(Scalar dtype);
const BwdKernels& rel_attention_bwd_kernels(Scalar dtype);

}  // namespace txl
