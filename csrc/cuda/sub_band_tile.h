// Magnitudes of the Haar sub-bands of a tile in shared memory, for the kernels of ddim_finish and of
// anomaly_map; apart from torch: tests on the CPU run this very code (tests/native/).
//
// The tile has R = 2^level rows and up to 256 columns, a thread each. Level by level, each 2 x 2 block
// gives the magnitudes of its three details, added up in `details`, and its low band, in its first
// element's place. The channels of an image follow each other.
#pragma once

#include <cstdint>

#include "../common/haar.h"

namespace diffad {

constexpr int kTileColumns = 256;

template <int R, int kLevel>
struct SubBandTile {
  static_assert(1 << kLevel == R);
  // A word of padding a block, see haar.cu, and one a row: threads along the rows of a block's
  // coefficients hit different banks too.
  static constexpr int kPitch = kTileColumns + kTileColumns / R + 1;
  static constexpr int kDetails = R * kTileColumns / 3 + 1;  // 1/4 + 1/16 + ...

  float values[R * kPitch];
  float details[kDetails];

  // Where a column starts; its elements lie kPitch apart.
  __device__ __forceinline__ float* column(int i) { return values + slot(i); }

  static __device__ __forceinline__ int slot(int column) { return column + column / R; }

  __device__ __forceinline__ void clear() {
    for (int k = threadIdx.x; k < kDetails; k += blockDim.x) details[k] = 0;
  }

  // Adds the sub-bands of the values of one channel, which are lost. Synchronises before it reads.
  __device__ __forceinline__ void add(int width) {
    DIFFAD_UNROLL
    for (int l = 1; l <= kLevel; ++l) {
      __syncthreads();
      const int columns = width >> l, half = 1 << (l - 1);
      for (int k = threadIdx.x; k < (R >> l) * columns; k += blockDim.x) {
        const int y = k / columns, x = k % columns;
        // Elements of the low band before stand 2^(l-1) apart.
        float* corner = values + (y << l) * kPitch;
        const int left = slot(x << l), right = slot((x << l) + half);
        const float a = corner[left], b = corner[right];
        const float d = corner[half * kPitch + left], e = corner[half * kPitch + right];
        const float high =
            ::fabsf(a + b - d - e) + ::fabsf(a - b + d - e) + ::fabsf(a - b - d + e);
        const float low = (a + b + d + e) * 0.5f;
        corner[left] = low;
        details[before(l) + y * (kTileColumns >> l) + x] +=
            high * 0.5f + (l == kLevel ? ::fabsf(low) : 0.0f);
      }
    }
  }

  // The sum over all sub-bands at a pixel, once all threads are through `add`.
  __device__ __forceinline__ float sum(int row, int column) const {
    float sum = 0;
    DIFFAD_UNROLL
    for (int l = 1; l <= kLevel; ++l) {
      sum += details[before(l) + (row >> l) * (kTileColumns >> l) + (column >> l)];
    }
    return sum;
  }

 private:
  // Elements before those of level `l` in `details`: the 2 x 2 blocks of level k number R / 2^k by
  // columns / 2^k, a fourth of those of the level before, and 1/4 + 1/16 + ... + 1/4^(l-1) is
  // (1 - 1/4^(l-1)) / 3.
  static __device__ __forceinline__ constexpr int before(int l) {
    return (R * kTileColumns - (R >> (l - 1)) * (kTileColumns >> (l - 1))) / 3;
  }
};

}  // namespace diffad
