// Haar packets of a plane, see common/haar.h for the maths and ../haar.cpp for the operator.
#pragma once

#include "../../common/haar.h"
#include "dtype.h"
#include "isa.h"

namespace diffad {

// Planes of `lanes` channels that lie next to each other: all of an image in channels_last, one
// otherwise, of which an image has `channels`. A tile is `tile_rows` by `tile_cols` blocks of R x R
// pixels, R = 2^level (fewer at the borders), and task i is tile i in the order (n, c, y, x).
struct HaarArgs {
  DType dtype;
  int level;
  bool pack;  // from the image to the bands, or back
  bool past_cache;  // the result is more than the caches hold: write around them
  int64_t channels, lanes, rows, cols, tile_rows, tile_cols;
  void* image;
  Strides image_strides;  // x is `lanes`: rows have no gaps
  void* bands[1 << 2 * kHaarMaxLevel];
  Strides band_strides;  // of a block, in any band
};

// `scratch` has room for R R lanes tile_rows tile_cols + kHaarPadding elements of the dtype computed
// in, twice that where results go past the caches.
constexpr int kHaarPadding = 256;
DIFFAD_KERNEL(haar, const HaarArgs& args, void* scratch, int64_t begin, int64_t end)

}  // namespace diffad
