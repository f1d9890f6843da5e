// Magnitudes of the Haar sub-bands of images in registers, for the kernels of ddim_finish and of
// anomaly_map; apart from torch: tests on the CPU run this very code (tests/emulation/).
//
// A thread has R pixels below each other, R a multiple of 2^kLevel, and the lanes of a warp have
// neighbouring columns. A level takes sums and differences of neighbouring rows in the thread and of
// neighbouring columns with the lane that has the other one. Both lanes get the same low band (x + y
// is y + x to the bit), so that they can go on with it, and the same magnitudes, those at their own
// pixels: nothing passes through shared memory.
#pragma once

#include <cstdint>

#include "../common/haar.h"

namespace diffad {

template <int R, int kLevel>
class SubBands {
  static_assert(R % (1 << kLevel) == 0 && 1 << kLevel <= 32, "a block's columns lie in one warp");

 public:
  // Adds those of one channel, from level l on, whose values are lost. All lanes of a warp together.
  // Recursive, as walsh is.
  template <int l = 1>
  __device__ __forceinline__ void add(float (&low)[R]) {
    if constexpr (l <= kLevel) {
      DIFFAD_UNROLL
      for (int j = 0; j < R >> l; ++j) {
        // Of the block (a b / d e) this lane has a and d, or b and e.
        const float sum = low[2 * j] + low[2 * j + 1], difference = low[2 * j] - low[2 * j + 1];
        const float sum_beside = __shfl_xor_sync(0xffffffffu, sum, 1 << (l - 1));
        const float difference_beside = __shfl_xor_sync(0xffffffffu, difference, 1 << (l - 1));
        low[j] = 0.5f * (sum + sum_beside);
        const float high = ::fabsf(difference + difference_beside) + ::fabsf(sum - sum_beside) +
                           ::fabsf(difference - difference_beside);
        magnitude[before(l) + j] += 0.5f * high + (l == kLevel ? ::fabsf(low[j]) : 0.0f);
      }
      add<l + 1>(low);
    }
  }

  // value[k] = the sum over all sub-bands at row k. After the last channel, once.
  __device__ __forceinline__ void sum(float (&value)[R]) {
    add_coarser<kLevel - 1>();
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) value[k] = kLevel == 0 ? 0.0f : magnitude[k / 2];
  }

 private:
  // Where level l starts: R/2 + R/4 + ... + R/2^(l-1) = R - R/2^(l-1).
  static __device__ __forceinline__ constexpr int before(int l) { return R - (R >> (l - 1)); }

  // To each level up to l what lies above it.
  template <int l>
  __device__ __forceinline__ void add_coarser() {
    if constexpr (l >= 1) {
      DIFFAD_UNROLL
      for (int j = 0; j < R >> l; ++j) magnitude[before(l) + j] += magnitude[before(l + 1) + j / 2];
      add_coarser<l - 1>();
    }
  }

  float magnitude[R] = {};  // level by level, R / 2^l rows of blocks each
};

}  // namespace diffad
