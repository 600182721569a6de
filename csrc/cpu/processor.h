// Features of the processor that ATen's capability does not contain. Of the kernels' files only
// this one differs by architecture; CMakeLists.txt lists the sets of vector instructions.
#pragma once

#if defined(__x86_64__)
#include <ATen/cpu/Utils.h>
#endif

namespace txl {

#if defined(__x86_64__)

inline bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16");
}
// Tile registers for bfloat16, which init_amx requests from the operating system.
inline bool has_amx_bf16() {
  return at::cpu::init_amx() && __builtin_cpu_supports("amx-bf16");
}

#else

inline bool has_avx512_bf16() {
  return false;
}
inline bool has_amx_bf16() {
  return false;
}

#endif

}  // namespace txl
