// float16 on the CPU, rounded as CUDA does (to nearest even).
#pragma once
#include <immintrin.h>

struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half __float2half_rn(float x) { return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)}; }
