// Group normalisation, modulation and SiLU: the passes over memory. See group_norm_silu.cpp here.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace diffad {

// A tensor (N, C, pixels); strides in elements. Either the channels or the pixels have stride 1.
struct NormTensor {
  void* data;
  int64_t sample, channel, pixel;
};

// A parameter (N, C), without samples where its stride is 0; absent where data is null.
struct NormParameter {
  void* data;
  DType dtype;
  int64_t sample, channel;
};

// The work of a sample is cut into items, which depend on its size alone: a tile of pixels with
// all channels where channels_last, a tile of pixels of one channel otherwise. Channel c of tile t
// leaves two numbers: its mean and its sum of squared deviations on the way forward, the sums of
// dz and of dz (x - mean) on the way back. Buffers are float, or double for double.
struct NormArgs {
  DType dtype;  // of x, y, dy and dx
  bool channels_last, activation;
  int64_t channels, pixels, groups;
  int64_t tile, tiles;  // pixels of a tile, tiles of a channel
  double eps;
  NormTensor x, y;       // y: forward alone
  NormTensor dy, dx;     // backward alone
  NormParameter weight, bias, scale, shift;
  NormParameter dweight, dbias, dscale, dshift;  // backward alone; where wanted
  void* partial;       // (N, tiles, 2, C)
  void* coefficients;  // (N, 2, C) forward, (N, 5, C) backward
  void* stats;         // (N, groups, 2): mean and 1 / deviation

  int64_t items() const { return channels_last ? tiles : channels * tiles; }
};

// Items [begin, end), counted through all samples.
DIFFAD_KERNEL(norm_moments, const NormArgs&, int64_t begin, int64_t end)
DIFFAD_KERNEL(norm_apply, const NormArgs&, int64_t begin, int64_t end)
DIFFAD_KERNEL(norm_gradient_sums, const NormArgs&, int64_t begin, int64_t end)
DIFFAD_KERNEL(norm_apply_gradient, const NormArgs&, int64_t begin, int64_t end)
// Samples [begin, end).
DIFFAD_KERNEL(norm_fold, const NormArgs&, int64_t begin, int64_t end)
DIFFAD_KERNEL(norm_prepare_gradient, const NormArgs&, int64_t begin, int64_t end)
DIFFAD_KERNEL(norm_fold_gradient, const NormArgs&, int64_t begin, int64_t end)
// Samples [0, batch), once norm_fold_gradient has seen them all.
DIFFAD_KERNEL(norm_parameter_gradients, const NormArgs&, int64_t batch)

}  // namespace diffad
