// Marks what nvcc compiles for both sides; nothing to any other compiler.
#pragma once

#ifdef __CUDACC__
#define TXL_HOST_DEVICE __host__ __device__
#else
#define TXL_HOST_DEVICE
#endif
