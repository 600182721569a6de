// bfloat16 on the CPU, rounded as CUDA does (to nearest even).
#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t(std::isnan(x) ? bits >> 16 | 1 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
