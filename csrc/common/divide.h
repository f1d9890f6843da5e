// Division of counters.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIFFAD_DIVIDE __host__ __device__ __forceinline__
#else
#define DIFFAD_DIVIDE inline
#endif

namespace diffad {

// a / b of numbers that are not negative: in 32 bits where both fit, as a GPU has no division of 64
// and takes about a hundred instructions, as much as the rest of a thread's work.
DIFFAD_DIVIDE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace diffad
