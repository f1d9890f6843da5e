// conv3x3 on the CPU: what the operator hands to its kernels. All numbers are float32.
#pragma once

#include "isa.h"

namespace diffad {

// Outputs are computed in squares of kTile x kTile, each from a window of kWindow x kWindow pixels
// around it, which the transform turns into kPoints numbers.
constexpr int64_t kTile = 4, kWindow = 6, kPoints = kWindow * kWindow;
// Both counts of channels are multiples of the widest vector.
constexpr int64_t kChannelBlock = 16;
// Between the arrays of two points lie so many floats, lest all points of a tile share one set of
// the cache: the arrays' own sizes are multiples of high powers of two.
constexpr int64_t kPointGap = 16;

struct TileGrid {
  int64_t height, width;  // of an image
  int64_t rows, columns;  // of its tiles
};

// Images whose channels lie next to each other; the distances are in floats.
struct Pixels {
  const float* data;
  int64_t image, row, column;
};

// Weights and what the products take in their place, (outputs / 16, kPoints, inputs, 16).
struct ConvPack {
  const float* weight;
  int64_t output, input, row, column;  // distances in floats, of either sign
  int64_t inputs;
  float* packed;
};
// Items (block of 16 outputs, input), numbered with the inputs fastest.
DIFFAD_KERNEL(conv3x3_pack, const ConvPack& args, int64_t begin, int64_t end)

// y = the convolution of x, plus bias and residual.
struct ConvForward {
  TileGrid grid;
  int64_t inputs, outputs;
  Pixels x;
  const float *packed, *bias;  // bias may be null
  Pixels residual;             // its data may be null
  float* y;                    // dense, channels last
  const float* zeros;          // `inputs` of them
  int64_t at_once;             // the most tiles that are transformed before they are multiplied
};
// Floats of scratch memory that a call needs.
constexpr int64_t conv3x3_scratch(int64_t inputs, int64_t at_once) {
  return kPoints * (at_once * (inputs + 2 * kChannelBlock) + 2 * kPointGap);
}
// Tiles [begin, end) of all images, outputs [first, last), multiples of kChannelBlock.
DIFFAD_KERNEL(conv3x3_forward, const ConvForward& args, float* scratch, int64_t begin, int64_t end,
              int64_t first, int64_t last)

// The gradient for the weights, from chunks of tiles one after another.
struct ConvGradient {
  TileGrid grid;
  int64_t inputs, outputs;
  Pixels x, grad;
  const float* zeros;    // as many as there are inputs and as there are outputs
  int64_t first, tiles;  // the chunk
  float* x_points;       // (kPoints, inputs / 16, tiles, 16) with gaps
  float* grad_points;    // (kPoints, outputs / 16, tiles, 16) with gaps
  float* packed;         // (kPoints, outputs / 16, inputs, 16) with gaps between the points: the sum
                         // over all chunks so far
};
// Transforms tiles [begin, end) of the chunk.
DIFFAD_KERNEL(conv3x3_transform, const ConvGradient& args, int64_t begin, int64_t end)
// Items (point, group of kGroup outputs, the last of which may be half as large).
constexpr int64_t kGroup = 2 * kChannelBlock;
DIFFAD_KERNEL(conv3x3_products, const ConvGradient& args, int64_t begin, int64_t end)

// (kPoints, outputs / 16, inputs, 16) with gaps to dense weights (outputs, inputs, 3, 3); items as above.
struct ConvUnpack {
  const float* packed;
  int64_t inputs, outputs;
  float* weight;
};
DIFFAD_KERNEL(conv3x3_unpack, const ConvUnpack& args, int64_t begin, int64_t end)

}  // namespace diffad
