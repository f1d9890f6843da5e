// The end of a captured loop on represented images: the last DDIM step, the standardisation undone,
// the inverse Haar packet, the clamp to [0, 1], and the residual maps D_p and D_w against the
// input, in one pass over memory. See common/diffusion.h and common/haar.h for the maths,
// ops.anomaly_map for the maps.
//
// A thread block takes a tile of R rows by up to 256 columns of the image, R = 2^level, and keeps
// it in shared memory: each R x R block of pixels depends on its own R^2 coefficients alone, and so
// do its residuals' sub-bands. The channels follow each other, and the maps' sums over them stay on
// the chip:
//   1. each thread finishes R coefficients of one block, undoes the standardisation and transforms
//      them along x (as haar.cu unpacks);
//   2. each thread transforms one column along y, clamps, stores the pixels, and leaves the
//      residual x - x_hat in the column's place;
//   3. level by level, each 2 x 2 block of the residual gives the magnitudes of its three details,
//      added up in `details`, and its low band, in its first element's place.
// The coefficients of a block lie R^2 channels apart (or side by side in channels_last): both
// layouts touch every byte of the lines that they read.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../common/diffusion_tensor.h"
#include "../common/haar_tensor.h"
#include "launch.h"
#include "step_table.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

constexpr int kColumns = 256;

template <class M>
struct FinishArgs {
  HaarGeometry g;  // packed: of the state, the output and the guide; image: of the input
  const float *x, *y;
  const M* m;
  const float *mean, *deviation;  // a channel of the state each
  const float* images;
  float *x_hat, *d_p, *d_w;  // dense (N,C,H,W), (N,H,W), (N,H,W)
  const StepCoefficients* table;
  StepCounter* counter;
  int32_t steps;
  int blocks;             // R x R blocks of a tile, fewer at the right edge
  int64_t across, count;  // tiles along x, all tiles
  bool clamp;
};

// Elements before those of level `l` (1, 2, ...) in the pyramid of a tile of R rows: 2 x 2 blocks
// of level l number R / 2^l by columns / 2^l.
template <int R>
__device__ __forceinline__ int details_before(int l) {
  int sum = 0;
  for (int k = 1; k < l; ++k) sum += (R >> k) * (kColumns >> k);
  return sum;
}

template <int R, int kLevel, class M>
__global__ void __launch_bounds__(kColumns) finish_kernel(const FinishArgs<M> args) {
  constexpr int kPitch = kColumns + kColumns / R;  // a word of padding a block, see haar.cu
  __shared__ float shared[R * kPitch];
  __shared__ float details[R * kColumns / 3 + 1];  // 1/4 + 1/16 + ...

  const int32_t step = args.counter->step;
  advance(args.counter, args.steps);
  const StepCoefficients c = args.table[step];
  const HaarGeometry& g = args.g;
  const int thread = threadIdx.x, width = args.blocks * R;
  const int column = thread, column_block = thread / R;
  const int block = thread % args.blocks, v = thread / args.blocks;  // in pass 1
  const int height = static_cast<int>(g.rows) * R;
  const int64_t image_width = g.cols * R, plane = height * image_width;

  for (int64_t i = blockIdx.x; i < args.count; i += gridDim.x) {
    const int64_t block0 = i % args.across * args.blocks;
    const int64_t row = i / args.across % g.rows;
    const int64_t n = i / args.across / g.rows;
    const bool packed_active = thread < width && block0 + block < g.cols;
    const bool active = thread < width && block0 + column_block < g.cols;
    const int64_t pixel = row * R * image_width + block0 * R + column;  // of the output's planes
    float d_p[R] = {};
    for (int k = thread; k < static_cast<int>(sizeof(details) / sizeof(float)); k += blockDim.x) {
      details[k] = 0;
    }

    for (int64_t channel = 0; channel < g.channels; ++channel) {
      __syncthreads();  // the last channel is done with `shared`
      if (packed_active) {
        float w[R];
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) {
          const int64_t packed = (spread(v) + 2 * spread(k)) * g.channels + channel;
          const int64_t at = n * g.packed.n + packed * g.packed.c + row * g.packed.y +
                             (block0 + block) * g.packed.x;
          const float y = args.y ? args.y[at] : 0.0f;
          const float x0 = one::ddim_update<true, true, false>(
              c, args.x[at], static_cast<float>(args.m[at]), y, 0.0f);
          w[k] = one::fma(x0, args.deviation[packed], args.mean[packed]);
        }
        walsh(w);
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) shared[v * kPitch + block * (R + 1) + k] = w[k];
      }
      __syncthreads();
      float* own = shared + column + column_block;
      if (active) {
        float w[R];
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) w[k] = own[k * kPitch];
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
          x_hat[k * image_width] = value;
          const float residual = image[k * g.image.y] - value;
          d_p[k] += ::fabsf(residual);
          own[k * kPitch] = residual;
        }
      } else if (thread < width) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) own[k * kPitch] = 0;
      }
      DIFFAD_UNROLL
      for (int l = 1; l <= kLevel; ++l) {
        __syncthreads();
        const int columns = width >> l, half = 1 << (l - 1);
        for (int k = thread; k < (R >> l) * columns; k += blockDim.x) {
          const int y = k / columns, x = k % columns;
          // Elements of the low band before stand 2^(l-1) apart.
          float* corner = shared + (y << l) * kPitch;
          const int left = x << l, right = left + half;
          const int left_slot = left + left / R, right_slot = right + right / R;
          const float a = corner[left_slot], b = corner[right_slot];
          const float d = corner[half * kPitch + left_slot];
          const float e = corner[half * kPitch + right_slot];
          const float high =
              ::fabsf(a + b - d - e) + ::fabsf(a - b + d - e) + ::fabsf(a - b - d + e);
          const float low = (a + b + d + e) * 0.5f;
          corner[left_slot] = low;
          details[details_before<R>(l) + y * (kColumns >> l) + x] +=
              high * 0.5f + (l == kLevel ? ::fabsf(low) : 0.0f);
        }
      }
    }
    __syncthreads();
    if (active) {
      const float share = 1.0f / static_cast<float>(g.channels);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        float sum = 0;
        DIFFAD_UNROLL
        for (int l = 1; l <= kLevel; ++l) {
          sum += details[details_before<R>(l) + (k >> l) * (kColumns >> l) + (column >> l)];
        }
        args.d_p[n * plane + pixel + k * image_width] = d_p[k] * share;
        args.d_w[n * plane + pixel + k * image_width] = sum * share;
      }
    }
    __syncthreads();  // the next tile clears the details
  }
}

template <int R, int kLevel, class M>
void launch(FinishArgs<M> args, cudaStream_t stream) {
  static_assert(1 << kLevel == R);
  args.blocks = static_cast<int>(std::min<int64_t>(args.g.cols, kColumns / R));
  args.across = (args.g.cols + args.blocks - 1) / args.blocks;
  args.count = args.g.batch * args.g.rows * args.across;
  const int threads = (args.blocks * R + 31) / 32 * 32;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(args.count, 0x7fffffff));
  finish_kernel<R, kLevel><<<grid, threads, 0, stream>>>(args);
  check_launch("ddim_finish");
}

std::tuple<Tensor, Tensor, Tensor> ddim_finish(const Tensor& x, const Tensor& model_output,
                                               std::optional<Tensor> guide, const Tensor& table,
                                               Tensor counter, const Tensor& mean,
                                               const Tensor& deviation, const Tensor& images,
                                               int64_t level, bool clamp) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float,
                  "ddim_finish: the state must be float32 (N, C, H, W)");
  STD_TORCH_CHECK(1 <= level && level <= kHaarMaxLevel, "ddim_finish: level must be 1 to ",
                  kHaarMaxLevel, ", got ", level);
  check_operand(model_output, x, false, "ddim_finish: model_output");
  if (guide) check_operand(*guide, x, false, "ddim_finish: guide");
  check_table(table, counter, x);
  const int64_t r = int64_t{1} << level, channels = x.size(1) / (r * r);
  STD_TORCH_CHECK(images.dim() == 4 && images.scalar_type() == ScalarType::Float &&
                      images.device() == x.device() && images.size(0) == x.size(0) &&
                      images.size(1) == channels && channels * r * r == x.size(1) &&
                      images.size(2) == x.size(2) * r && images.size(3) == x.size(3) * r,
                  "ddim_finish: images must be float32 of the size that x_t unpacks to");
  for (const Tensor& one_a_channel : {mean, deviation}) {
    STD_TORCH_CHECK(one_a_channel.scalar_type() == ScalarType::Float &&
                        one_a_channel.numel() == x.size(1) && one_a_channel.is_contiguous() &&
                        one_a_channel.device() == x.device(),
                    "ddim_finish: mean and deviation must be contiguous float32, one a channel");
  }
  const Tensor x_hat = empty_4d(images, {images.size(0), channels, images.size(2), images.size(3)},
                                false);
  const int64_t map_size[3] = {images.size(0), images.size(2), images.size(3)};
  const Tensor d_p = torch::stable::new_empty(x, {map_size, 3});
  const Tensor d_w = torch::stable::new_empty(x, {map_size, 3});
  if (x.numel() == 0) return {x_hat, d_p, d_w};
  const cudaStream_t stream = current_stream(x);
  const Tensor m = in_layout_of(x, model_output, false);
  Tensor y;
  if (guide) y = in_layout_of(x, torch::stable::to(*guide, ScalarType::Float), false);

  const auto go = [&](auto zero) {
    using M = decltype(zero);
    FinishArgs<M> args{};
    args.g = {x.size(0),        channels,        x.size(2), x.size(3),
              strides_of(images), strides_of(x), is_channels_last(x)};
    args.x = static_cast<const float*>(x.const_data_ptr());
    args.y = guide ? static_cast<const float*>(y.const_data_ptr()) : nullptr;
    args.m = static_cast<const M*>(m.const_data_ptr());
    args.mean = static_cast<const float*>(mean.const_data_ptr());
    args.deviation = static_cast<const float*>(deviation.const_data_ptr());
    args.images = static_cast<const float*>(images.const_data_ptr());
    args.x_hat = static_cast<float*>(x_hat.mutable_data_ptr());
    args.d_p = static_cast<float*>(d_p.mutable_data_ptr());
    args.d_w = static_cast<float*>(d_w.mutable_data_ptr());
    args.table = reinterpret_cast<const StepCoefficients*>(table.const_data_ptr());
    args.counter = reinterpret_cast<StepCounter*>(counter.mutable_data_ptr());
    args.steps = static_cast<int32_t>(table.size(0));
    args.clamp = clamp;
    switch (level) {
      case 1: return launch<2, 1>(args, stream);
      case 2: return launch<4, 2>(args, stream);
      case 3: return launch<8, 3>(args, stream);
      default: return launch<16, 4>(args, stream);
    }
  };
  switch (m.scalar_type()) {
    case ScalarType::Float: go(float{}); break;
    case ScalarType::BFloat16: go(torch::headeronly::BFloat16{}); break;
    case ScalarType::Half: go(torch::headeronly::Half{}); break;
    default: STD_TORCH_CHECK(false, "ddim_finish: not implemented for ", m.scalar_type());
  }
  return {x_hat, d_p, d_w};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("ddim_finish", TORCH_BOX(&ddim_finish));
}

}  // namespace
}  // namespace diffad
