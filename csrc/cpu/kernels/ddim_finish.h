// What ddim_finish does to a strip of blocks between the kernels of ddim.h, haar.h and anomaly_map.h.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace diffad {

// One row of blocks. All arrays are of `dtype`, float or double.
struct FinishStrip {
  DType dtype;
  int64_t cols, coefficients;  // positions, and channels of each; they lie next to each other
  const void* x0;
  const void *mean, *deviation;  // a coefficient each
  void* standard;                // x0 deviation + mean
  // Rows of pixels, channels next to each other, to rows of planes, clamped to [0, 1] if asked.
  const void* pixels;
  int64_t channels, rows, width;
  bool clamp;
  void* planes;
  int64_t plane;  // elements from one channel to the next
};

DIFFAD_KERNEL(finish_coefficients_of_strip, const FinishStrip&)
DIFFAD_KERNEL(finish_pixels_of_strip, const FinishStrip&)

}  // namespace diffad
