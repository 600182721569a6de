// rel_attention on CUDA for few queries: the cut of the work, and which instance of the kernels
// runs.
#include "rel_attention_decode.cuh"

#include <algorithm>
#include <initializer_list>

namespace txl {
namespace {

using namespace txl::cuda;

// Enough blocks that every multiprocessor's memory requests overlap and the last wave is short.
constexpr int kBlocksPerMultiprocessor = 16;
// Queries of a block: each warp has four.
constexpr int kBlockQueries = 4 * kWarps;

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The keys that some query may attend to by the rule, before lengths and masks. Where positions are
// on the device, only their number is right.
KeyRange keys_by_rule(const DecodeArgs& args) {
  const int64_t Tk = args.Tk();
  const KeyRange all = {0, Tk};
  if (args.q_start.data == nullptr) {
    const KeyRange first = args.rule.narrow(all, Tk - args.Tq),
                   last = args.rule.narrow(all, Tk - 1);
    const int64_t begin = std::clamp<int64_t>(first.begin, 0, Tk);
    return {begin, std::clamp(last.end, begin, Tk)};
  }
  const KeyRule& rule = args.rule;
  if (rule.window_left >= kOpen || rule.window_right >= kOpen) return all;
  return {0, std::min(Tk, rule.window_left + rule.window_right + args.Tq)};
}

// Rows of r that pairs of queries and keys allowed by the rule read, before lengths and masks.
void plan_rows(const DecodeArgs& args, KeyRange keys, DecodePlan& plan) {
  const int64_t Tk = args.Tk(), Tq = args.Tq, R = args.R;
  // j - p of a pair that may meet.
  int64_t nearest = args.rule.window_right, farthest = -args.rule.window_left;
  if (args.q_start.data == nullptr) {  // p = i + Tk - Tq
    nearest = std::min(nearest, keys.end - 1 - (Tk - Tq));
    farthest = std::max(farthest, keys.begin - (Tk - 1));
  }
  // Any offset is valid; beyond these limits every pair is outside r, on the same side.
  constexpr int64_t kFar = int64_t(1) << 40;
  const int64_t to_row = Tk - Tq + std::clamp(args.offset, -kFar, kFar);
  int64_t begin = farthest + to_row, end = nearest + to_row + 1;
  if (args.clamp)
    begin = std::clamp<int64_t>(begin, 0, R - 1), end = std::clamp<int64_t>(end, 1, R);
  begin = std::clamp<int64_t>(begin, 0, R), end = std::clamp(end, begin, R);
  plan.row_begin = static_cast<int>(begin), plan.n_rows = static_cast<int>(end - begin);
}

bool on_16_bytes(const Tensor4& x, int64_t element_bytes) {
  auto multiple = [&](int64_t elements) { return elements * element_bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && multiple(x.stride_b) &&
         multiple(x.stride_h) && multiple(x.stride_t);
}

// Whether all rows, `columns` long, begin on 16 bytes and are multiples of them.
template <typename T>
bool aligned(std::initializer_list<int> columns, std::initializer_list<Tensor4> tensors) {
  auto is_whole = [](int n) { return n * sizeof(T) % 16 == 0; };
  return std::all_of(columns.begin(), columns.end(), is_whole) &&
         std::all_of(tensors.begin(), tensors.end(),
                     [](const Tensor4& x) { return on_16_bytes(x, sizeof(T)); });
}

template <typename T, int kHead, bool kAligned>
cudaError_t run_positions(const DecodeArgs& args, void* stream) {
  constexpr int kTile = kWarps * kRows * Lanes<T, kHead, kAligned>::kGroups;
  const int64_t blocks =
      ceil_div(args.plan.n_rows, kTile) * args.H * ceil_div(args.B, args.plan.batches_per_block);
  return launch(&rel_attention_positions_kernel<T, kHead, kAligned>, blocks, args, stream);
}

template <typename T, int kHead>
cudaError_t run_positions(const DecodeArgs& args, void* stream) {
  return aligned<T>({args.Dp}, {args.q_pos, args.r}) ? run_positions<T, kHead, true>(args, stream)
                                                     : run_positions<T, kHead, false>(args, stream);
}

template <typename T, int kHead, int kQueries>
cudaError_t run_splits(const DecodeArgs& args, void* stream) {
  const int64_t blocks = int64_t(args.B) * args.Hk * args.plan.n_splits * args.plan.query_blocks;
  return aligned<T>({args.D, args.Dv}, {args.q, args.k, args.v, args.mem_k, args.mem_v})
             ? launch(&rel_attention_split_kernel<T, kHead, kQueries, true>, blocks, args, stream)
             : launch(&rel_attention_split_kernel<T, kHead, kQueries, false>, blocks, args, stream);
}

template <typename T, int kHead>
cudaError_t run_splits(const DecodeArgs& args, void* stream) {
  return args.group() * args.Tq == 1 ? run_splits<T, kHead, 1>(args, stream)
                                     : run_splits<T, kHead, 4>(args, stream);
}

template <typename T>
cudaError_t run_dtype(const DecodeArgs& args, void* stream) {
  cudaError_t status = cudaSuccess;
  if (args.plan.n_rows > 0) {
    status = args.Dp <= 16    ? run_positions<T, 16>(args, stream)
             : args.Dp <= 64  ? run_positions<T, 64>(args, stream)
             : args.Dp <= 128 ? run_positions<T, 128>(args, stream)
                              : run_positions<T, 256>(args, stream);
  }
  if (status != cudaSuccess) return status;
  const int head = std::max(args.D, args.Dv);
  status = head <= 64    ? run_splits<T, 64>(args, stream)
           : head <= 128 ? run_splits<T, 128>(args, stream)
                         : run_splits<T, 256>(args, stream);
  if (status != cudaSuccess || args.plan.n_splits == 1) return status;
  const int64_t query_rows = int64_t(args.B) * args.H * args.Tq;
  return launch(&rel_attention_combine_kernel<T>, ceil_div(query_rows, kWarps), args, stream);
}

}  // namespace

DecodePlan plan_decode(const DecodeArgs& args) {
  DecodePlan plan;
  const KeyRange keys = keys_by_rule(args);
  if (keys.begin < keys.end && args.R > 0) plan_rows(args, keys, plan);

  const int64_t queries = int64_t(args.group()) * args.Tq;
  plan.query_blocks = static_cast<int>(ceil_div(queries, kBlockQueries));
  plan.block_queries = static_cast<int>(ceil_div(queries, plan.query_blocks));
  const int64_t pairs = int64_t(args.B) * args.Hk * plan.query_blocks;
  const int64_t wanted = int64_t(kBlocksPerMultiprocessor) * multiprocessors();
  const auto most = static_cast<int>(ceil_div(wanted, pairs));
  plan.n_splits = std::max(1, Splits::of(static_cast<int>(keys.end - keys.begin), most).n);
  const bool shared = args.r.stride_b == 0;
  const int64_t tiles = ceil_div(plan.n_rows, kWarps * kRows * 2);
  const int64_t parts = tiles == 0 ? 1 : ceil_div(wanted / 4, tiles * args.H);
  const int64_t batches = ceil_div(args.B, std::min<int64_t>(parts, args.B));
  plan.batches_per_block = shared ? static_cast<int>(std::min<int64_t>(batches, kWarp)) : 1;
  return plan;
}

const char* rel_attention_decode(Scalar dtype, const DecodeArgs& args, void* stream) {
  switch (dtype) {
    case Scalar::f32:
      return error_of(run_dtype<float>(args, stream));
    case Scalar::f16:
      return error_of(run_dtype<__half>(args, stream));
    case Scalar::bf16:
      return error_of(run_dtype<__nv_bfloat16>(args, stream));
    default:
      return "rel_attention_decode takes no float64";
  }
}

}  // namespace txl
