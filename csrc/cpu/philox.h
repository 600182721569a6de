// Dropout's mask, regenerated from its counter: Philox4x32-10 (Salmon et al. 2011).
#pragma once

#include <cstdint>

namespace txl::TXL_ISA {

// keep[j - j_begin] = 1 where element (row i of `pair`, key j) is kept, else 0, for n keys from
// j_begin, both multiples of 16. `threshold` = floor(p · 2^32): word j mod 4 of counter
// (j / 4, i, pair, 0) is kept from it on.
template <typename acc_t>
void dropout_keep(uint64_t seed, int64_t pair, int64_t i, int64_t j_begin, int64_t n,
                  uint64_t threshold, acc_t* keep) {
  constexpr int kLanes = 16;
  for (int64_t base = 0; base < n; base += 4 * kLanes) {
    uint32_t word[4][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      word[0][l] = static_cast<uint32_t>((j_begin + base) / 4 + l);
      word[1][l] = static_cast<uint32_t>(i);
      word[2][l] = static_cast<uint32_t>(pair);
      word[3][l] = 0;
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int l = 0; l < kLanes; ++l) {
        const uint64_t product0 = uint64_t{0xD2511F53} * word[0][l];
        const uint64_t product1 = uint64_t{0xCD9E8D57} * word[2][l];
        const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ word[1][l] ^ key0;
        const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ word[3][l] ^ key1;
        word[1][l] = static_cast<uint32_t>(product1);
        word[3][l] = static_cast<uint32_t>(product0);
        word[0][l] = next0;
        word[2][l] = next2;
      }
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int w = 0; w < 4; ++w) {
        const int64_t j = base + 4 * l + w;
        if (j < n) keep[j] = word[w][l] >= threshold ? acc_t(1) : acc_t(0);
      }
    }
  }
}

}  // namespace txl::TXL_ISA
