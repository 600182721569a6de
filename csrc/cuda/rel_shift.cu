// The relative shift and its adjoint on CUDA: each row is one misaligned copy between two runs of
// zeros.
#include <algorithm>

#include "launch.cuh"
#include "txl/rel_shift_cuda.h"

namespace txl::cuda {

constexpr int kAccess = 16;  // bytes that one load or store moves
constexpr int kBatch = 4;    // slots that a lane has in flight

// Bytes [skip, skip + 16) of `low` and `high` put one behind the other, 0 <= skip < 16.
__device__ uint4 bytes_from(uint4 low, uint4 high, int skip) {
  if (skip & 8) low = {low.z, low.w, high.x, high.y}, high = {high.z, high.w, 0, 0};
  if (skip & 4) low = {low.y, low.z, low.w, high.x}, high.x = high.y;
  const int bits = skip % 4 * 8;
  return {__funnelshift_r(low.x, low.y, bits), __funnelshift_r(low.y, low.z, bits),
          __funnelshift_r(low.z, low.w, bits), __funnelshift_r(low.w, high.x, bits)};
}

// A warp's row, and the walk over it. Slots are the destination's aligned 16 bytes that lie inside
// the row; at most one element less than a slot stands before and behind them.
template <typename T>
struct Row {
  static constexpr int kSlot = kAccess / sizeof(T);
  const T* src;
  T* dst;
  int64_t n_src, n_dst, shift;  // dst[c] = src[c + shift]
  int64_t head, n_slots;        // elements before the first slot

  __device__ T at(int64_t column) const {
    const int64_t from = column + shift;
    return from >= 0 && from < n_src ? src[from] : T(0);
  }
};

__device__ int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// One warp copies one row. Slots whose source lies inside the tensor in whole aligned 16 bytes are
// read as two of those (the second is the neighbour lane's first and comes from L1) and put
// together by byte shifts, the same for the whole row; slots beyond the source's ends are zeros;
// the few others and the row's ends go element by element. Copies only: nothing is summed or
// rounded.
template <typename T>
__global__ void __launch_bounds__(kThreads) rel_shift_kernel(const ShiftArgs args) {
  const int lane = threadIdx.x % kWarp;
  const int64_t i_row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i_row >= args.n) return;
  const T* tensor = static_cast<const T*>(args.src);
  Row<T> row{tensor + i_row * args.n_src,
             static_cast<T*>(args.dst) + i_row * args.n_dst,
             args.n_src,
             args.n_dst,
             args.step * (i_row % args.Tq) + args.base,
             0,
             0};
  const int into_slot = reinterpret_cast<uintptr_t>(row.dst) % kAccess / sizeof(T);
  row.head = clamped((row.kSlot - into_slot) % row.kSlot, 0, row.n_dst);
  row.n_slots = (row.n_dst - row.head) / row.kSlot;

  // Slots [whole_begin, whole_end) read whole 16 bytes, inside the row and inside the tensor.
  const int64_t first = row.head + row.shift;  // source column of slot 0
  const auto* source = reinterpret_cast<const char*>(row.src + first);
  const int skip = reinterpret_cast<uintptr_t>(source) % kAccess;
  const auto* aligned = reinterpret_cast<const uint4*>(source - skip);
  auto* slots = reinterpret_cast<uint4*>(row.dst + row.head);
  const auto* begin = reinterpret_cast<const char*>(tensor);
  const auto* end = reinterpret_cast<const char*>(tensor + args.n * args.n_src);
  const auto* origin = reinterpret_cast<const char*>(aligned);
  auto slots_up = [](int64_t bytes) { return (bytes + kAccess - 1) / kAccess; };
  const int64_t in_row = first < 0 ? slots_up(-first * int64_t(sizeof(T))) : 0;
  const int64_t in_tensor = origin < begin ? slots_up(begin - origin) : 0;
  const int64_t row_slots = row.n_src > first ? (row.n_src - first) / row.kSlot : 0;
  const int64_t reach = skip > 0 ? 2 * kAccess : kAccess;
  const int64_t tensor_slots = end - origin >= reach ? (end - origin - reach) / kAccess + 1 : 0;
  const int64_t whole_begin = clamped(in_row > in_tensor ? in_row : in_tensor, 0, row.n_slots);
  const int64_t whole_end =
      clamped(row_slots < tensor_slots ? row_slots : tensor_slots, whole_begin, row.n_slots);

  for (int64_t first_slot = whole_begin + lane; first_slot < whole_end;
       first_slot += kBatch * kWarp) {
    uint4 low[kBatch], high[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t s = first_slot + u * kWarp;
      if (s < whole_end) low[u] = aligned[s];
      if (s < whole_end && skip > 0) high[u] = aligned[s + 1];
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int64_t s = first_slot + u * kWarp;
      if (s < whole_end) slots[s] = bytes_from(low[u], high[u], skip);
    }
  }
  const int64_t n_others = row.n_slots - (whole_end - whole_begin);
#pragma unroll 1
  for (int64_t n = lane; n < n_others; n += kWarp) {
    const int64_t s = n < whole_begin ? n : n + (whole_end - whole_begin);
    const int64_t from = first + s * row.kSlot;
    if (from >= row.n_src || from + row.kSlot <= 0) {
      slots[s] = uint4{0, 0, 0, 0};
    } else {
#pragma unroll 1
      for (int e = 0; e < row.kSlot; ++e) {
        const int64_t column = row.head + s * row.kSlot + e;
        row.dst[column] = row.at(column);
      }
    }
  }
  const int64_t tail = row.head + row.n_slots * row.kSlot;
  if (lane < row.head) row.dst[lane] = row.at(lane);
  if (tail + lane < row.n_dst) row.dst[tail + lane] = row.at(tail + lane);
}

}  // namespace txl::cuda

namespace txl {

const char* rel_shift_cuda(int64_t element_bytes, ShiftArgs args, void* stream) {
  using namespace txl::cuda;
  const int64_t blocks = (args.n + kWarps - 1) / kWarps;
  if (blocks == 0) return nullptr;
  // Any offset is valid; beyond these limits the whole result is zero.
  const int64_t farthest = args.n_src + args.n_dst + args.Tq;
  args.base = std::clamp(args.base, -farthest, farthest);
  auto run = [&](auto element) {
    return error_of(launch(&rel_shift_kernel<decltype(element)>, blocks, args, stream));
  };
  switch (element_bytes) {
    case 2:
      return run(uint16_t());
    case 4:
      return run(uint32_t());
    default:
      return run(uint64_t());
  }
}

}  // namespace txl
