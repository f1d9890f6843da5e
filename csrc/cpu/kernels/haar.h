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
  // Grey or colour images in channels_last whose bands are one tensor: a block's coefficients follow
  // each other in memory.
  bool by_pixels = false;
  // With these, of the type computed in, one each for a block's coefficients: (y - mean) inverse is
  // written. When packing by pixels alone.
  const void *mean = nullptr, *inverse = nullptr;
  int64_t channels, lanes, rows, cols, tile_rows, tile_cols;
  void* image;
  Strides image_strides;  // x is `lanes`: rows have no gaps
  void* bands[1 << 2 * kHaarMaxLevel];
  Strides band_strides;  // of a block, in any band
};

// `scratch` has room for haar_scratch(args) elements of the dtype computed in.
constexpr int kHaarPadding = 256;

inline int64_t haar_scratch(const HaarArgs& args) {
  const int64_t numbers = args.lanes << 2 * args.level;  // of a block
  if (args.by_pixels) {
    // A row of blocks, the planes of one row of pixels, and the coefficients band by band.
    return numbers * args.tile_cols + kHaarPadding +
           args.lanes * ((args.tile_cols << args.level) + kHaarPadding) +
           numbers * (args.tile_cols + 32);
  }
  if (args.level == 1) return 0;  // one level is done in registers
  return (numbers * args.tile_rows * args.tile_cols + kHaarPadding) << args.past_cache;
}
DIFFAD_KERNEL(haar, const HaarArgs& args, void* scratch, int64_t begin, int64_t end)

}  // namespace diffad
