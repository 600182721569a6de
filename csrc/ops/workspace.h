// Scratch memory of the native ops, on huge pages if it is large.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>

#include <bit>
#include <mutex>
#include <utility>

namespace txl {

constexpr int64_t kPage = 4096, kHugePage = 1 << 21;

constexpr int64_t round_to_page(int64_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

// At most a quarter more than `bytes`, one of four sizes between two powers of two. Scratch memory
// of nearly equal calls then has one size, and the allocator reuses it; sizes that grow a little at
// every call would leave a hole each time.
constexpr int64_t round_to_coarse_size(int64_t bytes) {
  const int64_t step = std::max<int64_t>(
      kPage, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(bytes))) / 4);
  return (bytes + step - 1) / step * step;
}

// Advises the system to use huge pages inside [begin, begin + bytes); the system may decline.
inline void advise_huge_pages(void* begin, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// One piece of scratch memory that a call leaves to the next: the system clears fresh pages, which
// takes 2% of the time of an attention's backward. At most `kMost` bytes are kept.
class KeptMemory {
 public:
  // Never destroyed: a thread may still run an op while the process ends.
  static KeptMemory& instance() {
    static auto* const kept = new KeptMemory;
    return *kept;
  }
  at::Tensor take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      if (memory_.defined() && memory_.numel() >= bytes) return std::exchange(memory_, {});
    }
    const at::Tensor fresh =
        at::empty({round_to_coarse_size(bytes)}, at::device(at::kCPU).dtype(at::kByte));
    advise_huge_pages(fresh.data_ptr(), fresh.numel());
    return fresh;
  }
  // Keeps the larger of `memory` and the piece that is there.
  void keep(at::Tensor memory) {
    if (memory.numel() > kMost) return;
    const std::lock_guard lock(mutex_);
    if (!memory_.defined() || memory_.numel() < memory.numel()) std::swap(memory_, memory);
  }

 private:
  static constexpr int64_t kMost = 1 << 24;
  std::mutex mutex_;
  at::Tensor memory_;
};

// Scratch memory for `threads` threads, on huge pages if it is large: packed matrices are read with
// strides of many small pages, and every row would miss the TLB (a quarter of the time at D 128,
// Tk 3,900).
class Workspace {
 public:
  Workspace(int64_t threads, int64_t bytes) {
    stride_ = round_to_page(bytes);  // no two threads share a page
    total_ = threads * stride_;
    const int64_t align = total_ >= kHugePage ? kHugePage : kPage;
    memory_ = KeptMemory::instance().take(total_ + align);
    base_ = static_cast<char*>(memory_.data_ptr());
    base_ += align - reinterpret_cast<uintptr_t>(base_) % align;
  }
  ~Workspace() { KeptMemory::instance().keep(std::move(memory_)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* of(int64_t thread) const { return base_ + thread * stride_; }

  // Returns the pages after the first `bytes` to the system; their contents are lost.
  void release_after(int64_t bytes) const {
    const int64_t kept = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    if (kept < total_) madvise(base_ + kept, static_cast<size_t>(total_ - kept), MADV_DONTNEED);
  }

 private:
  at::Tensor memory_;
  int64_t stride_, total_;
  char* base_;
};

}  // namespace txl
