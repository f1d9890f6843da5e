// anomaly_map on CUDA: the arguments of the kernels in anomaly_map_tile.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../common/anomaly_map.h"
#include "../common/haar_tensor.h"
#include "anomaly_map_tile.h"
#include "launch.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

unsigned grid_of(int64_t tiles) {
  STD_TORCH_CHECK(tiles <= std::numeric_limits<int32_t>::max(),
                  "anomaly_map: ", tiles, " tiles are more than a launch can have");
  return static_cast<unsigned>(tiles);
}

template <bool kLast, class T>
__global__ void __launch_bounds__(kCosineThreads) cosine_kernel(const CosineArgs<T> args) {
  cosine_tile<kLast>(args);
}

template <int kLevel, class T>
__global__ void __launch_bounds__(kWeightedThreads, kLevel < 4 ? 4 : 2) weighted_kernel(
    const WeightedArgs<T> args) {
  weighted_tile<kLevel>(args);
}

template <int kHalo>
__global__ void __launch_bounds__(kBlurThreads) blur_kernel(const BlurArgs args) {
  extern __shared__ __align__(16) float shared[];
  blur_tile<kHalo>(args, shared);
}

template <int kDigit>
__global__ void __launch_bounds__(kTopThreads) top_digit_kernel(const TopArgs args) {
  top_digit<kDigit>(args);
}

__global__ void __launch_bounds__(kTopThreads) top_small_kernel(const TopArgs args) {
  top_small(args);
}

__global__ void __launch_bounds__(kTopThreads) top_score_kernel(const TopArgs args) {
  top_score(args);
}

// (N, h w)
Tensor cosines(const Tensor& f, const Tensor& f_hat, cudaStream_t stream) {
  const int64_t pixels = f.size(2) * f.size(3);
  Tensor result = empty_dense(f, {f.size(0), pixels}, ScalarType::Float);
  for_narrow_dtype(f, "anomaly_map", [&](auto zero) {
    using T = decltype(zero);
    CosineArgs<T> args{};
    args.f = static_cast<const T*>(f.const_data_ptr());
    args.f_hat = static_cast<const T*>(f_hat.const_data_ptr());
    args.stride = strides_of(f);
    args.stride_hat = strides_of(f_hat);
    args.channels = f.size(1);
    args.width = f.size(3);
    args.pixels = pixels;
    args.count = f.size(0) * pixels;
    args.result = static_cast<float*>(result.mutable_data_ptr());
    const auto launch = [&](auto kernel, int of_a_block) {
      kernel<<<grid_of((args.count + of_a_block - 1) / of_a_block), kCosineThreads, 0, stream>>>(
          args);
    };
    if (is_channels_last(f)) {
      launch(cosine_kernel<true, T>, kCosinePixels<true>);
    } else {
      launch(cosine_kernel<false, T>, kCosinePixels<false>);
    }
    check_launch("anomaly_map: cosines");
  });
  return result;
}

template <int kLevel, class T>
void launch_weighted(WeightedArgs<T> args, int64_t batch, cudaStream_t stream) {
  const unsigned threads = weighted_grid<kLevel>(args, batch);
  weighted_kernel<kLevel><<<grid_of(args.count), threads, 0, stream>>>(args);
  check_launch("anomaly_map: sum of the maps");
}

template <int kHalo = kBlurHaloStep>
void launch_blur_kernel(const BlurArgs& args, int64_t radius, cudaStream_t stream) {
  if constexpr (kHalo < kBlurMostRadius) {
    if (radius > kHalo) return launch_blur_kernel<kHalo + kBlurHaloStep>(args, radius, stream);
  }
  // Of the device in use: a call for each device, so for each launch.
  constexpr int bytes = blur_shared_bytes(kHalo);
  const cudaError_t error = cudaFuncSetAttribute(
      blur_kernel<kHalo>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
  STD_TORCH_CHECK(error == cudaSuccess, "anomaly_map: no ", bytes, " bytes of shared memory: ",
                  cudaGetErrorString(error));
  blur_kernel<kHalo><<<grid_of(args.count), kBlurThreads, bytes, stream>>>(args);
  check_launch("anomaly_map: Gaussian");
}

void launch_blur(const Tensor& x, const Tensor& result, double sigma, TopState* state,
                 cudaStream_t stream) {
  const int64_t radius = gaussian_radius(sigma);
  const std::vector<float> taps = half_gaussian<float>(radius, sigma);
  BlurArgs args{};
  args.x = static_cast<const float*>(x.const_data_ptr());
  args.result = static_cast<float*>(result.mutable_data_ptr());
  args.height = x.size(1);
  args.width = x.size(2);
  std::copy(taps.begin(), taps.end(), args.taps);
  args.state = state;
  blur_grid(args, x.size(0));
  launch_blur_kernel(args, radius, stream);
}

// Smooths `total` into `map`, where these are two, and takes the scores of `map`.
void launch_blur_and_top(const Tensor& total, const Tensor& map, const Tensor& score, double sigma,
                         double top, cudaStream_t stream) {
  const bool smooth = gaussian_radius(sigma) > 0;
  const int64_t n = map.size(0), pixels = map.size(1) * map.size(2);
  TopArgs args{};
  args.map = static_cast<const float*>(map.const_data_ptr());
  args.pixels = pixels;
  args.top = top_count(top, pixels);
  args.blocks = (pixels + kTopShare - 1) / kTopShare;
  args.score = static_cast<float*>(score.mutable_data_ptr());
  const auto images = static_cast<unsigned>(n), blocks = static_cast<unsigned>(n * args.blocks);
  if (args.blocks == 1) {
    if (smooth) launch_blur(total, map, sigma, nullptr, stream);
    top_small_kernel<<<images, kTopThreads, 0, stream>>>(args);
    return check_launch("anomaly_map: score");
  }
  static_assert(sizeof(TopState) % sizeof(float) == 0);
  const Tensor state = empty_dense(map, {n, sizeof(TopState) / sizeof(float)}, ScalarType::Float);
  const Tensor partial = empty_dense(map, {n, args.blocks}, ScalarType::Float);
  args.state = static_cast<TopState*>(state.mutable_data_ptr());
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  const cudaError_t error = cudaMemsetAsync(args.state, 0, n * sizeof(TopState), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "anomaly_map: ", cudaGetErrorString(error));
  if (smooth) {
    launch_blur(total, map, sigma, args.state, stream);
  } else {
    top_digit_kernel<0><<<blocks, kTopThreads, 0, stream>>>(args);
  }
  top_digit_kernel<1><<<blocks, kTopThreads, 0, stream>>>(args);
  top_digit_kernel<2><<<blocks, kTopThreads, 0, stream>>>(args);
  check_launch("anomaly_map: largest values");
  top_score_kernel<<<images, kTopThreads, 0, stream>>>(args);
  check_launch("anomaly_map: score");
}

std::tuple<Tensor, Tensor> anomaly_map(const Tensor& x, const Tensor& x_hat,
                                       std::vector<Tensor> features,
                                       std::vector<Tensor> features_hat,
                                       std::vector<double> weights, int64_t levels,
                                       std::vector<Tensor> stats, double sigma, double top,
                                       std::optional<Tensor> base) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_anomaly_map(x, x_hat, features, features_hat, weights, levels, stats, sigma, top, base);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(levels <= kHaarMaxLevel && features.size() <= kMostScales &&
                      gaussian_radius(sigma) <= kBlurMostRadius &&
                      std::max(h, w) <= std::numeric_limits<int32_t>::max() / 4 &&
                      h * w <= std::numeric_limits<uint32_t>::max(),
                  "anomaly_map: too many levels, feature maps or pixels for the CUDA kernels, or too "
                  "wide a Gaussian");
  const auto empty_map = [&] {
    return empty_strided(x, {n, h, w}, {h * w, w, 1}, ScalarType::Float);
  };
  const Tensor map = empty_map(), score = empty_strided(x, {n}, {1}, ScalarType::Float);
  if (n == 0) return {map, score};
  const cudaStream_t stream = current_stream(x);

  const Tensor total = gaussian_radius(sigma) > 0 ? empty_map() : map;
  std::vector<Tensor> kept;  // what the launched kernels read
  MapScale scales[kMostScales] = {};
  for (size_t i = 0; i < features.size(); ++i) {
    STD_TORCH_CHECK(features[i].size(2) * features[i].size(3) <= std::numeric_limits<int32_t>::max(),
                    "anomaly_map: too many positions of a feature map for the CUDA kernels");
    kept.push_back(cosines(features[i], features_hat[i], stream));
    scales[i] = map_scale(static_cast<const float*>(kept.back().const_data_ptr()),
                          features[i].size(2), features[i].size(3), h, w);
  }
  if (base) kept.push_back(torch::stable::contiguous(*base));
  for_narrow_dtype(x, "anomaly_map", [&](auto zero) {
    using T = decltype(zero);
    WeightedArgs<T> args{};
    args.x = static_cast<const T*>(x.const_data_ptr());
    args.x_hat = static_cast<const T*>(x_hat.const_data_ptr());
    args.stride = strides_of(x);
    args.stride_hat = strides_of(x_hat);
    args.channels = weights[0] != 0 || levels > 0 ? x.size(1) : 0;  // else nothing needs the pixels
    args.height = h;
    args.width = w;
    args.scales = static_cast<int>(features.size());
    std::copy(scales, scales + kMostScales, args.scale);
    args.base = base ? static_cast<const float*>(kept.back().const_data_ptr()) : nullptr;
    args.result = static_cast<float*>(total.mutable_data_ptr());
    for (int i = 0; i < 3; ++i) {
      args.weight[i] = static_cast<float>(weights[i]);
      for (int k = 0; k < 2; ++k) {
        MapStatistic& entry = args.statistic[i][k];
        entry.number = static_cast<float>(k);  // without statistics: mean 0, deviation 1
        if (stats.empty()) continue;
        const Tensor& s = stats[2 * i + k];
        const auto* data = static_cast<const float*>(s.const_data_ptr());
        if (s.device() == x.device()) {
          entry.data = data;
          entry.y = s.stride(0);
          entry.x = s.stride(1);
        } else {  // a number, see diffad_fast/ops/maps.py
          STD_TORCH_CHECK(s.is_cpu() && (h == 1 || s.stride(0) == 0) && (w == 1 || s.stride(1) == 0),
                          "anomaly_map: statistics must be numbers or on the device of x");
          entry.number = *data;
        }
      }
    }
    switch (levels) {
      case 0: return launch_weighted<0>(args, n, stream);
      case 1: return launch_weighted<1>(args, n, stream);
      case 2: return launch_weighted<2>(args, n, stream);
      case 3: return launch_weighted<3>(args, n, stream);
      default: return launch_weighted<4>(args, n, stream);
    }
  });
  launch_blur_and_top(total, map, score, sigma, top, stream);
  return {map, score};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) { m.impl("anomaly_map", TORCH_BOX(&anomaly_map)); }

}  // namespace
}  // namespace diffad
