// The kernel of ddim_finish, apart from torch: a test on the CPU runs this very code, thread by
// thread (tests/emulation/).
//
// A thread block takes a tile of R rows by up to 256 columns of the image, R = 2^level: each R x R
// block of pixels depends on its own R^2 coefficients alone, and so do its residuals' sub-bands. The
// channels follow each other, and the maps' sums over them stay in registers:
//   1. each thread finishes R coefficients of one block, keeps them as x0, undoes the
//      standardisation and transforms them along x (as haar_kernels.h unpacks);
//   2. each thread transforms one column along y, clamps and stores the pixels; the residuals
//      image - x_hat give their sub-bands, see sub_bands.h.
// The coefficients of a block lie R^2 channels apart (or side by side in channels_last): both
// layouts touch every byte of the lines that they read. Neighbouring threads of pass 1 have
// neighbouring blocks (or coefficients), which lie together.
#pragma once

#include <cstdint>

#include "../common/diffusion.h"
#include "../common/divide.h"
#include "../common/haar.h"
#include "sub_bands.h"

namespace diffad {

constexpr int kTileColumns = 256;

template <class M>
struct FinishArgs {
  HaarGeometry g;  // packed: of the state, the output, the guide and x0; image: of the input
  const float *x, *y;
  const M* m;
  const float *mean, *deviation;  // a channel of the state each
  const float* images;
  float *x0, *x_hat, *pixel, *sub_band;  // the last three (N,C,H,W), (N,H,W), (N,H,W), dense
  DdimCoefficients<float> step;
  int blocks;             // R x R blocks of a tile, fewer at the right edge
  int64_t across, count;  // tiles along x, all tiles
  bool clamp;
};

// Sets the tiles of images whose blocks have R rows; returns the threads of a block.
template <class M>
inline unsigned finish_grid(FinishArgs<M>& args, int r) {
  const int most = kTileColumns / r;
  args.blocks = args.g.cols < most ? static_cast<int>(args.g.cols) : most;
  args.across = (args.g.cols + args.blocks - 1) / args.blocks;
  args.count = args.g.batch * args.g.rows * args.across;
  return static_cast<unsigned>((args.blocks * r + 31) / 32 * 32);
}

// The same number, of which the compiler knows nothing: what follows from it is worked out where it is
// used, and does not fill registers from a loop's beginning to its end.
__device__ __forceinline__ int64_t opaque(int64_t x) {
#ifdef __CUDACC__
  asm volatile("" : "+l"(x));
#endif
  return x;
}

template <int R, int kLevel, class M>
__device__ __forceinline__ void finish_tile(const FinishArgs<M>& args) {
  // A word of padding a block, see haar_kernels.h, and one a row: threads along the rows of a block's
  // coefficients hit different banks too.
  constexpr int kPitch = kTileColumns + kTileColumns / R + 1;
  __shared__ float tile[R * kPitch];

  const HaarGeometry& g = args.g;
  const int thread = threadIdx.x, width = args.blocks * R;
  const int column = thread, column_block = thread / R;
  // In pass 1.
  const int block = g.channels_last ? thread / R : thread % args.blocks;
  const int v = g.channels_last ? thread % R : thread / args.blocks;
  const int height = static_cast<int>(g.rows) * R;
  const int64_t image_width = g.cols * R, plane = height * image_width;

  const int64_t i = blockIdx.x;
  const int64_t line = quotient(i, args.across), block0 = (i - line * args.across) * args.blocks;
  const int64_t n = quotient(line, g.rows), row = line - n * g.rows;
  const bool packed_active = thread < width && block0 + block < g.cols;
  const bool active = thread < width && block0 + column_block < g.cols;
  const int64_t pixel = row * R * image_width + block0 * R + column;  // of the output's planes
  float magnitude[R] = {};
  SubBands<R, kLevel> sub_bands;

  for (int64_t channel = 0; channel < g.channels; ++channel) {
    const int64_t to_band = opaque(g.packed.c), down = opaque(g.image.y);
    const int64_t down_x_hat = opaque(image_width), channels = opaque(g.channels);
    if (channel > 0) __syncthreads();  // the last channel is done with the tile
    if (packed_active) {
      float w[R];
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        const int64_t packed = (spread(v) + 2 * spread(k)) * channels + channel;
        const int64_t at = n * g.packed.n + packed * to_band + row * g.packed.y +
                           (block0 + block) * g.packed.x;
        const float y = args.y ? args.y[at] : 0.0f;
        const float x0 = one::ddim_update<true, true, false>(
            args.step, args.x[at], static_cast<float>(args.m[at]), y, 0.0f);
        args.x0[at] = x0;
        w[k] = one::fma(x0, args.deviation[packed], args.mean[packed]);
      }
      walsh(w);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) tile[v * kPitch + block * (R + 1) + k] = w[k];
    }
    __syncthreads();
    float residual[R] = {};
    if (active) {
      float w[R];
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) w[k] = tile[k * kPitch + column + column_block];
      walsh(w);
      const float* image = args.images + n * g.image.n + channel * g.image.c +
                           row * R * g.image.y + (block0 * R + column) * g.image.x;
      float* x_hat = args.x_hat + (n * g.channels + channel) * plane + pixel;
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        float value = w[k] * (1.0f / R);
        if (args.clamp) {
          value = value > 1.0f ? 1.0f : value;  // a NaN stays one
          value = value < 0.0f ? 0.0f : value;
        }
        x_hat[k * down_x_hat] = value;
        residual[k] = image[k * down] - value;
        magnitude[k] += ::fabsf(residual[k]);
      }
    }
    sub_bands.add(residual);
  }
  if (active) {
    float sum[R];
    sub_bands.sum(sum);
    const float share = 1.0f / static_cast<float>(g.channels);
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) {
      args.pixel[n * plane + pixel + k * image_width] = magnitude[k] * share;
      args.sub_band[n * plane + pixel + k * image_width] = sum[k] * share;
    }
  }
}

}  // namespace diffad
