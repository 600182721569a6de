// How a warp holds rows of a head: 16 bytes to a lane, as many rows at once as that gives.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.cuh"

namespace txl::cuda {

// One 32-bit word of a tensor, widened to float32, and float32 rounded to an element.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static __device__ void widen(uint32_t word, float* x) { x[0] = __uint_as_float(word); }
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
};

template <>
struct Word<__half> {
  static __device__ void widen(uint32_t word, float* x) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word));
    x[0] = pair.x, x[1] = pair.y;
  }
  static __device__ float widen(__half x) { return __half2float(x); }
  static __device__ __half narrow(float x) { return __float2half_rn(x); }
};

template <>
struct Word<__nv_bfloat16> {  // the upper half of a float32
  static __device__ void widen(uint32_t word, float* x) {
    x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
};

// Rows of up to kHead elements. Aligned: every row begins on 16 bytes and is a multiple of them
// long, and a lane holds whole 16 bytes; else it holds single elements, kLanes apart.
template <typename T, int kHead, bool kAligned>
struct Lanes {
  static constexpr int kLoad = 16 / sizeof(T);
  static constexpr int kLanes = kHead / kLoad < kWarp ? kHead / kLoad : kWarp;  // of one row
  static constexpr int kGroups = kWarp / kLanes;                                // rows at once
  static constexpr int kElements = kHead / kLanes;                              // in each lane
  static constexpr int kLoads = kElements / kLoad;

  // The column of element e of a row's lane.
  static __device__ int column(int lane, int e) {
    return kAligned ? (e / kLoad * kLanes + lane) * kLoad + e % kLoad : e * kLanes + lane;
  }

  // A lane's part of a row, as loaded: zeros beyond `n_columns` and where the row is not `present`.
  struct Part {
    // Whole 16 bytes as they are, single elements widened.
    std::conditional_t<kAligned, uint4[kLoads], float[kElements]> held;

    __device__ void load(const T* row, int n_columns, int lane, bool present) {
      if constexpr (kAligned) {
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
          held[n] = {0, 0, 0, 0};
          const int first = column(lane, n * kLoad);
          if (present && first < n_columns) held[n] = *reinterpret_cast<const uint4*>(row + first);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const bool there = present && column(lane, e) < n_columns;
          held[e] = there ? Word<T>::widen(row[column(lane, e)]) : 0;
        }
      }
    }

    __device__ void widen(float (&x)[kElements]) const {
      if constexpr (kAligned) {
        constexpr int kStep = 4 / sizeof(T);
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
          float* part = x + n * kLoad;
          Word<T>::widen(held[n].x, part), Word<T>::widen(held[n].y, part + kStep);
          Word<T>::widen(held[n].z, part + 2 * kStep), Word<T>::widen(held[n].w, part + 3 * kStep);
        }
      } else {
#pragma unroll
        for (int e = 0; e < kElements; ++e) x[e] = held[e];
      }
    }
  };
};

template <int n>
__device__ float dot(const float (&a)[n], const float (&b)[n]) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < n; ++e) sum += a[e] * b[e];
  return sum;
}

// The sum over kLanes neighbouring lanes, in each of them.
template <int kLanes>
__device__ float sum_over_lanes(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The sums of n values over kLanes neighbouring lanes. With kLanes >= n value u comes to the lanes
// of [u, u + 1) · kLanes / n, as x[0]; with fewer lanes lane l gets values l · n / kLanes and the
// ones after it, as x[0], x[1], …. Each step exchanges half of the values, so that it takes about n
// shuffles and not n log kLanes.
template <int kLanes, int n>
__device__ void deal_sums(float (&x)[n], int lane) {
  static_assert((n & (n - 1)) == 0);
  int held = n;
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    if (held > 1) {
      held /= 2;
      const bool upper = lane & distance;
#pragma unroll
      for (int u = 0; u < n / 2; ++u) {
        if (u >= held) continue;
        const float kept = upper ? x[u + held] : x[u], given = upper ? x[u] : x[u + held];
        x[u] = kept + __shfl_xor_sync(kAllLanes, given, distance);
      }
    } else {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
    }
  }
}

}  // namespace txl::cuda
