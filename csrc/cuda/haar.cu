// haar_pack and haar_unpack on CUDA. See common/haar.h for the maths.
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
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "../common/haar_tensor.h"
#include "haar_block.h"
#include "launch.h"

namespace diffad {
namespace {

constexpr int kColumns = 256;

// How the columns of a tile are laid out: column ((block * R) + sample) * lanes + lane.
struct Tile {
  int blocks, lanes;  // per tile; fewer at the right edge and in the last group of channels
  uint32_t across;    // tiles along x
};

template <class scalar_t, int R, bool kPack>
__global__ void __launch_bounds__(kColumns)
haar_kernel(HaarGeometry g, Tile tile, const scalar_t* __restrict__ in,
            scalar_t* __restrict__ out) {
  using acc = acc_t<scalar_t>;
  // One word of padding a block: with one lane, threads that read sample k of neighbouring blocks
  // are R + 1 words apart, which is odd, and hit different banks.
  constexpr int kPitch = kColumns + kColumns / R;
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
  const uint32_t line = blockIdx.x / tile.across, rows = static_cast<uint32_t>(g.rows);
  const int64_t block0 = static_cast<int64_t>(blockIdx.x % tile.across) * tile.blocks;
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

constexpr int kBlockThreads = 128;

template <class scalar_t, int R, bool kLast, bool kPack>
__global__ void __launch_bounds__(kBlockThreads)
haar_block_kernel(HaarGeometry g, uint32_t threads, const scalar_t* __restrict__ in,
                  scalar_t* __restrict__ out) {
  const uint32_t i = blockIdx.x * kBlockThreads + threadIdx.x;
  for (int64_t n = blockIdx.y; i < threads && n < g.batch; n += gridDim.y) {
    haar_block<scalar_t, R, kLast, kPack>(g, n, i, in, out);
  }
}

// Whether it was done so.
template <class scalar_t, int R, bool kLast, bool kPack>
bool launch_blocks(const HaarGeometry& g, const scalar_t* in, scalar_t* out, cudaStream_t stream) {
  if constexpr (HaarBlocks<scalar_t, R, kLast>::kFits) {
    const void *image = in, *packed = out;
    if (!kPack) std::swap(image, packed);
    const int64_t threads = haar_threads<scalar_t, R, kLast>(g, image, packed);
    if (threads == 0 || threads > int64_t{1} << 31) return false;
    const dim3 grid(static_cast<unsigned>((threads + kBlockThreads - 1) / kBlockThreads),
                    static_cast<unsigned>(std::min<int64_t>(g.batch, 65535)));
    haar_block_kernel<scalar_t, R, kLast, kPack>
        <<<grid, kBlockThreads, 0, stream>>>(g, static_cast<uint32_t>(threads), in, out);
    check_launch(kPack ? "haar_pack" : "haar_unpack");
    return true;
  }
  return false;
}

template <class scalar_t, int R, bool kPack>
void haar_launch(const HaarGeometry& g, const Tensor& in, const Tensor& out, cudaStream_t stream) {
  const auto* from = static_cast<const scalar_t*>(in.const_data_ptr());
  auto* to = static_cast<scalar_t*>(out.mutable_data_ptr());
  if (g.channels_last ? launch_blocks<scalar_t, R, true, kPack>(g, from, to, stream)
                      : launch_blocks<scalar_t, R, false, kPack>(g, from, to, stream)) {
    return;
  }
  Tile tile;
  tile.lanes = g.channels_last ? static_cast<int>(std::min<int64_t>(g.channels, kColumns / R)) : 1;
  tile.blocks = static_cast<int>(std::min<int64_t>(g.cols, kColumns / (R * tile.lanes)));
  const int64_t across = (g.cols + tile.blocks - 1) / tile.blocks;
  const int64_t groups = (g.channels + tile.lanes - 1) / tile.lanes;
  const int64_t count = groups * g.rows * across;
  STD_TORCH_CHECK(count < int64_t{1} << 31, "haar: a sample of ", count, " tiles of ",
                  tile.blocks * R * tile.lanes * R, " values is more than a launch can have");
  tile.across = static_cast<uint32_t>(across);
  const int threads = (tile.blocks * R * tile.lanes + 31) / 32 * 32;
  const dim3 grid(static_cast<unsigned>(count),
                  static_cast<unsigned>(std::min<int64_t>(g.batch, 65535)));
  haar_kernel<scalar_t, R, kPack><<<grid, threads, 0, stream>>>(g, tile, from, to);
  check_launch(kPack ? "haar_pack" : "haar_unpack");
}

template <bool kPack>
Tensor haar(const Tensor& x, int64_t level) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = haar_output(x, level, kPack);
  if (out.numel() == 0) return out;
  const cudaStream_t stream = current_stream(x);
  const HaarGeometry g = haar_geometry(kPack ? x : out, kPack ? out : x, is_channels_last(x));
  for_floating_dtype(x, "haar", [&](auto zero) {
    using scalar_t = decltype(zero);
    switch (level) {
      case 1: return haar_launch<scalar_t, 2, kPack>(g, x, out, stream);
      case 2: return haar_launch<scalar_t, 4, kPack>(g, x, out, stream);
      case 3: return haar_launch<scalar_t, 8, kPack>(g, x, out, stream);
      default: return haar_launch<scalar_t, 16, kPack>(g, x, out, stream);
    }
  });
  return out;
}

Tensor haar_pack(const Tensor& x, int64_t level) { return haar<true>(x, level); }
Tensor haar_unpack(const Tensor& y, int64_t level) { return haar<false>(y, level); }

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("haar_pack", TORCH_BOX(&haar_pack));
  m.impl("haar_unpack", TORCH_BOX(&haar_unpack));
}

}  // namespace
}  // namespace diffad
