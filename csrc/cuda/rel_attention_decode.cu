// rel_attention on CUDA for few queries: the cut of the work, and which instance of the kernels
// runs.
#include "rel_attention_decode.cuh"

#include <algorithm>
#include <type_traits>

namespace txl {
namespace {

using namespace txl::cuda;

// Enough blocks that every multiprocessor's memory requests overlap and the last wave is short.
constexpr int kBlocksPerMultiprocessor = 16;
constexpr int kLeastSplitKeys = 64;

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Rows of r that pairs of queries and keys allowed by the rule read, before lengths and masks.
void plan_rows(const DecodeArgs& args, DecodePlan& plan) {
  const int64_t Tk = args.Tk(), Tq = args.Tq, R = args.R;
  // j - p of a pair that may meet; p = i + Tk - Tq.
  int64_t nearest = plan.key_end - 1 - (Tk - Tq), farthest = plan.key_begin - (Tk - 1);
  const KeyRule& rule = args.rule;
  if (rule.window_right < kOpen) nearest = std::min(nearest, rule.window_right);
  if (rule.window_left < kOpen) farthest = std::max(farthest, -rule.window_left);
  // Any offset is valid; beyond these limits every pair is outside r, on the same side.
  const int64_t offset = std::clamp(args.offset, -Tk, R + Tq), to_row = Tk - Tq + offset;
  int64_t begin = farthest + to_row, end = nearest + to_row + 1;
  if (args.clamp)
    begin = std::clamp<int64_t>(begin, 0, R - 1), end = std::clamp<int64_t>(end, 1, R);
  begin = std::clamp<int64_t>(begin, 0, R), end = std::clamp(end, begin, R);
  plan.row_begin = static_cast<int>(begin), plan.n_rows = static_cast<int>(end - begin);
  plan.shift = static_cast<int>(offset - begin);
}

bool on_16_bytes(const Tensor4& x, int64_t element_bytes) {
  auto multiple = [&](int64_t elements) { return elements * element_bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && multiple(x.stride_b) &&
         multiple(x.stride_h) && multiple(x.stride_t);
}

template <typename T>
bool aligned(const DecodeArgs& args) {
  bool all = args.D * sizeof(T) % 16 == 0 && args.Dv * sizeof(T) % 16 == 0;
  for (const Tensor4& x : {args.q, args.k, args.v, args.mem_k, args.mem_v, args.r})
    all = all && on_16_bytes(x, sizeof(T));
  return all;
}

template <typename T, int kHead, int kQueries, bool kAligned>
cudaError_t run(const DecodeArgs& args, void* stream) {
  const DecodePlan& plan = args.plan;
  const int64_t pairs = int64_t(args.B) * args.H;
  if (plan.n_rows > 0) {
    constexpr int kTile = kWarps * kRows * Lanes<T, kHead, kAligned>::kGroups;
    const int64_t blocks =
        ceil_div(plan.n_rows, kTile) * args.H * ceil_div(args.B, plan.batches_per_block);
    const cudaError_t status =
        launch(&rel_attention_positions_kernel<T, kHead, kAligned>, blocks, args, stream);
    if (status != cudaSuccess) return status;
  }
  const cudaError_t status = launch(&rel_attention_split_kernel<T, kHead, kQueries, kAligned>,
                                    pairs * plan.n_splits, args, stream);
  if (status != cudaSuccess || plan.n_splits == 1) return status;
  return launch(&rel_attention_combine_kernel<T>, ceil_div(pairs * args.Tq, kWarps), args, stream);
}

template <typename T, int kHead>
cudaError_t run_head(const DecodeArgs& args, void* stream) {
  if (args.Tq == 1)
    return aligned<T>(args) ? run<T, kHead, 1, true>(args, stream)
                            : run<T, kHead, 1, false>(args, stream);
  return aligned<T>(args) ? run<T, kHead, 4, true>(args, stream)
                          : run<T, kHead, 4, false>(args, stream);
}

template <typename T>
cudaError_t run_dtype(const DecodeArgs& args, void* stream) {
  const int head = std::max(args.D, args.Dv);
  if (head <= 64) return run_head<T, 64>(args, stream);
  return head <= 128 ? run_head<T, 128>(args, stream) : run_head<T, 256>(args, stream);
}

}  // namespace

DecodePlan plan_decode(const DecodeArgs& args) {
  DecodePlan plan;
  const int64_t Tk = args.Tk(), pairs = int64_t(args.B) * args.H;
  const KeyRange all = {0, Tk};
  const KeyRange first = args.rule.narrow(all, Tk - args.Tq), last = args.rule.narrow(all, Tk - 1);
  plan.key_begin = static_cast<int>(std::clamp<int64_t>(first.begin, 0, Tk));
  plan.key_end = static_cast<int>(std::clamp<int64_t>(last.end, plan.key_begin, Tk));
  if (plan.key_begin < plan.key_end) plan_rows(args, plan);

  const int64_t n_keys = plan.key_end - plan.key_begin;
  const int64_t wanted = int64_t(kBlocksPerMultiprocessor) * multiprocessors();
  const int64_t splits = std::clamp<int64_t>(ceil_div(wanted, pairs), 1,
                                             std::max<int64_t>(1, n_keys / kLeastSplitKeys));
  plan.split_keys = static_cast<int>(ceil_div(ceil_div(n_keys, splits), 16) * 16);
  plan.n_splits = plan.split_keys == 0 ? 1 : static_cast<int>(ceil_div(n_keys, plan.split_keys));
  const bool shared = args.r.stride_b == 0;
  const int64_t tiles = ceil_div(plan.n_rows, kWarps * kRows * 2);
  const int64_t parts = tiles == 0 ? 1 : ceil_div(wanted / 4, tiles * args.H);
  plan.batches_per_block =
      shared ? static_cast<int>(ceil_div(args.B, std::min<int64_t>(parts, args.B))) : 1;
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
