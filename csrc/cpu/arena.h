// Workspace memory of a kernel, cut into aligned arrays.
#pragma once

#include <cstdint>

#include "operand.h"

namespace txl::TXL_ISA {

// Takes aligned arrays from a chunk's workspace; with a null base it only measures.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t n) {
    char* taken = base_ + used_;
    used_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(taken);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace txl::TXL_ISA
