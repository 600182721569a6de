// As much of CUDA as our kernels use, on the CPU, for tests under g++'s sanitizers: one std::thread
// per CUDA thread of a block, blocks one after another from the last to the first.
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time: every thread sees the same
#define __launch_bounds__(...)

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x = 0) : x(x) {}
};
inline thread_local dim3 threadIdx, blockIdx;

namespace emulation {

constexpr unsigned kWarp = 32;
struct Warp { std::barrier<> barrier{kWarp}; uint32_t slots[kWarp]; };
struct Block {
  std::barrier<> barrier;
  std::deque<Warp> warps;
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kWarp) {}
};
inline thread_local Block* block = nullptr;

// Every lane of the warp writes a word and then reads the words of the others.
inline Warp& warp() { return block->warps[threadIdx.x / kWarp]; }
template <typename Read>
auto exchange(uint32_t word, Read read) {
  warp().slots[threadIdx.x % kWarp] = word;
  warp().barrier.arrive_and_wait();
  const auto result = read(warp().slots);
  warp().barrier.arrive_and_wait();
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }
inline void __syncwarp() { emulation::warp().barrier.arrive_and_wait(); }
template <typename T>
T __shfl_xor_sync(unsigned, T x, int distance) {
  return emulation::exchange(std::bit_cast<uint32_t>(x), [&](const uint32_t* slots) {
    return std::bit_cast<T>(slots[threadIdx.x % emulation::kWarp ^ unsigned(distance)]);
  });
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return emulation::exchange(x, [](const uint32_t* slots) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < emulation::kWarp; ++lane) bits |= slots[lane] << lane;
    return bits;
  });
}
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int bits) {
  return static_cast<uint32_t>((uint64_t(high) << 32 | low) >> (bits & 31));
}
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline const char* cudaGetErrorString(cudaError_t) { return "refused"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 1, cudaSuccess;
}

template <typename Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args), dim3 grid, dim3 threads, void** parameters,
                             size_t, cudaStream_t) {
  const Args args = *static_cast<Args*>(parameters[0]);
  for (unsigned b = grid.x; b-- > 0;) {
    emulation::Block block(threads.x);
    std::vector<std::jthread> team;
    for (unsigned t = 0; t < threads.x; ++t) {
      team.emplace_back([&block, &args, kernel, b, t] {
        threadIdx = dim3(t), blockIdx = dim3(b), emulation::block = &block;
        kernel(args);
      });
    }
  }
  return cudaSuccess;
}
