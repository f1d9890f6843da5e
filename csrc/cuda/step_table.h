// The table of a captured loop: a row of coefficients for each step, and which step is next. Both
// lie in device memory, so that one captured node serves every step and every replay.
#pragma once

#include <cstdint>

#include "../common/diffusion.h"

namespace diffad {

using StepCoefficients = DdimCoefficients<float>;

struct StepCounter {
  int32_t step;      // the row that the next kernel takes
  int32_t finished;  // blocks of the running kernel that have read it; 0 between kernels
};

// Called once by every block after it has read the counter: the last one moves it on, and back to
// the first row after the last. The fences order what each block has read before what that one writes;
// counting alone orders nothing.
__device__ __forceinline__ void advance(StepCounter* counter, int32_t steps) {
  __syncthreads();  // all threads of this block have read it
  if (threadIdx.x != 0) return;
  const int32_t blocks = static_cast<int32_t>(gridDim.x);
  __threadfence();
  if (atomicAdd(&counter->finished, 1) == blocks - 1) {
    __threadfence();
    counter->finished = 0;
    counter->step = counter->step + 1 < steps ? counter->step + 1 : 0;
  }
}

}  // namespace diffad
