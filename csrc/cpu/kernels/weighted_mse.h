// The training loss, see ../weighted_mse.cpp.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace diffad {

// Samples of `size` elements, one after the other, in the same layout. The target has the dtype of
// the prediction, or the one that is computed in. Task i is tile i % tiles of sample i / tiles.
struct MseArgs {
  int64_t size, tiles;
  DType dtype, target_dtype;
  const void *prediction, *target;
  void* sums = nullptr;           // one a task, of the type computed in
  const void* factors = nullptr;  // one a sample, of that type
  void* gradient = nullptr;       // of `dtype`
};

constexpr int64_t kMseTile = 4096;

// Sums of (prediction - target)^2 over tiles, always added in the same order.
DIFFAD_KERNEL(square_sums, const MseArgs&, int64_t begin, int64_t end)
// factor (prediction - target).
DIFFAD_KERNEL(mse_gradient, const MseArgs&, int64_t begin, int64_t end)

}  // namespace diffad
