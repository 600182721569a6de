// Memory of the native ops: scratch for threads, and large pages for what is large.
#pragma once

#include <ATen/ATen.h>
#include <sys/mman.h>

namespace txl {

constexpr int64_t kPage = 4096, kHugePage = 1 << 21;

constexpr int64_t round_to_page(int64_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

// Asks for huge pages under the whole ones of [begin, begin + bytes); may be refused.
inline void advise_huge_pages(void* begin, int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Scratch memory for `threads` threads, on huge pages where it is large: packed matrices are read
// with strides of many pages, and would miss the TLB at every row (a quarter of the time at D 128,
// Tk 3,900).
class Workspace {
 public:
  Workspace(int64_t threads, int64_t bytes) {
    stride_ = round_to_page(bytes);  // no two threads share a page
    total_ = threads * stride_;
    const int64_t align = total_ >= kHugePage ? kHugePage : kPage;
    memory_ = at::empty({total_ + align}, at::kByte);
    base_ = static_cast<char*>(memory_.data_ptr());
    base_ += align - reinterpret_cast<uintptr_t>(base_) % align;
    if (align == kHugePage) advise_huge_pages(base_, total_);
  }
  char* of(int64_t thread) const { return base_ + thread * stride_; }

  // Hands the pages behind the first `bytes` back to the system, with what stands there.
  void give_back_behind(int64_t bytes) const {
    const int64_t kept = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    if (kept < total_) madvise(base_ + kept, static_cast<size_t>(total_ - kept), MADV_DONTNEED);
  }

 private:
  at::Tensor memory_;
  int64_t stride_, total_;
  char* base_;
};

}  // namespace txl
