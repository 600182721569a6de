// The keys that a query attends to by causality, window and chunks: one run of keys per query, by
// the same rule on every device.
#pragma once

#include <cstdint>

#include "txl/host_device.h"

namespace txl {

// A distance without a limit: farther than any two positions, small enough that a position and two
// such distances have a sum that does not overflow.
constexpr int64_t kOpen = INT64_MAX / 4;

struct KeyRange {
  int64_t begin, end;  // keys [begin, end) over [memory; segment]

  TXL_HOST_DEVICE KeyRange within(int64_t lowest, int64_t highest) const {
    return {begin < lowest ? lowest : begin, end > highest ? highest : end};
  }
};

struct KeyRule {
  int64_t window_left = kOpen, window_right = kOpen;
  int64_t chunk_size = 0, chunk_left = 0, chunk_phase = 0;

  // The part of `keys` that a query at key position `p` attends to; empty if begin >= end. Both
  // ends grow with p. Nothing overflows, whatever the options are.
  TXL_HOST_DEVICE KeyRange narrow(KeyRange keys, int64_t p) const {
    if (window_left < kOpen) keys = keys.within(p - window_left, keys.end);
    if (window_right < kOpen) keys = keys.within(keys.begin, p + window_right + 1);
    if (chunk_size > 0) {
      // Tokens of the query's own chunk before it, (p + phase) mod size, and from it on.
      const int64_t wrapped = into_chunk(p) - (chunk_size - into_chunk(chunk_phase));
      const int64_t before = wrapped < 0 ? wrapped + chunk_size : wrapped;
      const int64_t after = chunk_size - before;
      const int64_t reach = chunk_left <= kOpen / chunk_size ? chunk_left * chunk_size : kOpen;
      keys = keys.within(p - (before < kOpen ? before : kOpen) - reach,
                         p + (after < kOpen ? after : kOpen));
    }
    return keys;
  }

 private:
  TXL_HOST_DEVICE int64_t into_chunk(int64_t x) const {  // x mod size
    return x % chunk_size + (x % chunk_size < 0 ? chunk_size : 0);
  }
};

}  // namespace txl
