// The kernels of haar_pack and haar_unpack, apart from torch: a test on the CPU runs this very
// code, thread by thread (tests/emulation/). See common/haar.h for the maths.
//
// Where a thread can hold whole blocks of pixels it does, see haar_block.h. Elsewhere, for larger
// blocks, and for strides and channels that allow no runs, a thread block takes a tile: R rows of up
// to 256 columns, which are `blocks` R x R blocks of `lanes` neighbouring channels (one channel in
// NCHW, several in channels_last). Each thread transforms one column of R values along y, in
// registers, with loads that are consecutive across threads. Through shared memory the tile is then
// cut the other way: each thread takes the R samples of one block in one row, transforms them along
// x and stores them to R bands, where threads run along x (NCHW) or along the channels
// (channels_last). No thread holds more than R values, so four levels need no more registers than
// one, and memory is read and written once. Unpacking runs the same two passes backwards.
#pragma once

#include <algorithm>
#include <cstdint>

#include "haar_block.h"

namespace diffad {

constexpr int kHaarColumns = 256;

// How the columns of a tile are laid out: column ((block * R) + sample) * lanes + lane.
struct HaarTile {
  int blocks, lanes;  // per tile; fewer at the right edge and in the last group of channels
  int64_t across;     // tiles along x
  int64_t count;      // of a sample
  int threads;
};

template <int R>
HaarTile haar_tile(const HaarGeometry& g) {
  HaarTile tile;
  tile.lanes =
      g.channels_last ? static_cast<int>(std::min<int64_t>(g.channels, kHaarColumns / R)) : 1;
  tile.blocks = static_cast<int>(std::min<int64_t>(g.cols, kHaarColumns / (R * tile.lanes)));
  tile.across = (g.cols + tile.blocks - 1) / tile.blocks;
  tile.count = (g.channels + tile.lanes - 1) / tile.lanes * g.rows * tile.across;
  tile.threads = (tile.blocks * R * tile.lanes + 31) / 32 * 32;
  return tile;
}

template <class scalar_t, int R, bool kPack>
__global__ void __launch_bounds__(kHaarColumns)
haar_kernel(HaarGeometry g, HaarTile tile, const scalar_t* __restrict__ in,
            scalar_t* __restrict__ out) {
  using acc = acc_t<scalar_t>;
  // One word of padding a block: with one lane, threads that read sample k of neighbouring blocks
  // are R + 1 words apart, which is odd, and hit different banks.
  constexpr int kPitch = kHaarColumns + kHaarColumns / R;
  static_assert(R * kPitch * sizeof(acc) <= 48 * 1024);
  __shared__ acc shared[R * kPitch];

  const int width = tile.blocks * R * tile.lanes;
  const int thread = threadIdx.x;
  // This thread's column in the pass along y, and its block and row v in the pass along x.
  const int y_lane = thread % tile.lanes, y_x = thread / tile.lanes;
  const int y_slot = thread + y_x / R;
  const int x_lane = y_lane, x_block = thread / tile.lanes % tile.blocks;
  const int x_v = thread / (tile.lanes * tile.blocks);
  const int x_slot = x_v * kPitch + x_block * (R * tile.lanes + 1) + x_lane;

  // A sample's tiles are counted in 32 bits: divisions in 64 take longer than the transform.
  const auto across = static_cast<uint32_t>(tile.across), rows = static_cast<uint32_t>(g.rows);
  const uint32_t line = blockIdx.x / across;
  const int64_t block0 = static_cast<int64_t>(blockIdx.x % across) * tile.blocks;
  const int64_t y = line % rows, c0 = static_cast<int64_t>(line / rows) * tile.lanes;
  for (int64_t n = blockIdx.y; n < g.batch; n += gridDim.y) {
    const bool y_active = thread < width && block0 + y_x / R < g.cols && c0 + y_lane < g.channels;
    const bool x_active = thread < width && block0 + x_block < g.cols && c0 + x_lane < g.channels;
    const int64_t image = n * g.image.n + (c0 + y_lane) * g.image.c + y * R * g.image.y +
                          (block0 * R + y_x) * g.image.x;
    const int64_t packed = n * g.packed.n + (spread(x_v) * g.channels + c0 + x_lane) * g.packed.c +
                           y * g.packed.y + (block0 + x_block) * g.packed.x;
    const int64_t band = 2 * g.channels * g.packed.c;

    acc v[R];
    if constexpr (kPack) {
      if (y_active) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) v[k] = static_cast<acc>(in[image + k * g.image.y]);
        walsh(v);
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) shared[k * kPitch + y_slot] = v[k] * (acc(1) / R);
      }
      __syncthreads();
      if (x_active) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) v[k] = shared[x_slot + k * tile.lanes];
        walsh(v);
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) out[packed + spread(k) * band] = static_cast<scalar_t>(v[k]);
      }
    } else {
      if (x_active) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) v[k] = static_cast<acc>(in[packed + spread(k) * band]);
        walsh(v);
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) shared[x_slot + k * tile.lanes] = v[k];
      }
      __syncthreads();
      if (y_active) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) v[k] = shared[k * kPitch + y_slot];
        walsh(v);
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) {
          out[image + k * g.image.y] = static_cast<scalar_t>(v[k] * (acc(1) / R));
        }
      }
    }
    __syncthreads();  // the next sample's tile overwrites the shared memory
  }
}

constexpr int kHaarBlockThreads = 128;

template <class scalar_t, int R, bool kLast, bool kPack>
__global__ void __launch_bounds__(kHaarBlockThreads)
haar_block_kernel(HaarGeometry g, uint32_t threads, const scalar_t* __restrict__ in,
                  scalar_t* __restrict__ out) {
  const uint32_t i = blockIdx.x * kHaarBlockThreads + threadIdx.x;
  for (int64_t n = blockIdx.y; i < threads && n < g.batch; n += gridDim.y) {
    haar_block<scalar_t, R, kLast, kPack>(g, n, i, in, out);
  }
}

}  // namespace diffad
