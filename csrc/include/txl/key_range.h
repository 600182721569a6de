// Which keys a query sees, dense masks apart: one run per query, the same rule on every device.
#pragma once

#include <cstdint>

#include "txl/host_device.h"

namespace txl {

constexpr int64_t kOpen = INT64_MAX / 4;  // a window side without a bound

struct KeyRange {
  int64_t begin, end;  // keys [begin, end) over [memory; segment]

  TXL_HOST_DEVICE KeyRange within(int64_t lowest, int64_t highest) const {
    return {begin < lowest ? lowest : begin, end > highest ? highest : end};
  }
};

struct KeyRule {
  bool causal = false;
  int64_t window_left = kOpen, window_right = kOpen;
  int64_t chunk_size = 0, chunk_left = 0, chunk_phase = 0;

  // What is left of `keys` for a query at key position `p`; empty if begin >= end. Both ends grow
  // with p.
  TXL_HOST_DEVICE KeyRange narrow(KeyRange keys, int64_t p) const {
    if (causal) keys = keys.within(keys.begin, p + 1);
    if (window_left < kOpen) keys = keys.within(p - window_left, keys.end);
    if (window_right < kOpen) keys = keys.within(keys.begin, p + window_right + 1);
    if (chunk_size > 0) {
      const int64_t phased = p + chunk_phase;
      const int64_t chunk = phased / chunk_size - (phased % chunk_size < 0);
      keys = keys.within((chunk - chunk_left) * chunk_size - chunk_phase,
                         (chunk + 1) * chunk_size - chunk_phase);
    }
    return keys;
  }
};

}  // namespace txl
