// The anomaly map on the CPU: kernels/anomaly_map.h tells its stages.
#include "kernels/anomaly_map.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/anomaly_map.h"
#include "dtype_of.h"

namespace diffad {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGroup = 1 << 19;  // pixels of the samples that go through the stages together
constexpr int64_t kGrain = 1 << 14;  // pixels or feature values that are worth a thread

Samples samples_of(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

// Bilinear upsampling along one axis (align_corners=False): each of `size` pixels lies between the
// source pixels left[i] and left[i] + 1, the second of which has the weight share[i].
template <class A>
void bilinear(int64_t source, int64_t size, std::vector<int32_t>& left, std::vector<A>& share) {
  left.resize(size);
  share.resize(size);
  const double scale = static_cast<double>(source) / static_cast<double>(size);
  for (int64_t i = 0; i < size; ++i) {
    const double position = std::max(0.0, (static_cast<double>(i) + 0.5) * scale - 0.5);
    left[i] = static_cast<int32_t>(std::min(static_cast<int64_t>(position), source - 1));
    share[i] = static_cast<A>(position - left[i]);
  }
}

// One scale of features, and how it is upsampled.
template <class A>
struct Scale {
  Tensor f, f_hat;
  std::vector<int32_t> left, above;
  std::vector<A> share, share_y;
};

template <class A>
void run(AnomalyMapArgs& a, const Tensor& x, const std::vector<Tensor>& of_x,
         const std::vector<Tensor>& of_x_hat, double sigma) {
  const int64_t batch = x.size(0);
  const int64_t group = std::clamp<int64_t>(kGroup / (a.height * a.width), 1, batch);
  std::vector<Scale<A>> scales;
  for (size_t i = 0; i < of_x.size(); ++i) scales.push_back({of_x[i], of_x_hat[i], {}, {}, {}, {}});
  std::vector<FeatureScale> features;
  std::vector<Tensor> buffers;  // PyTorch's memory, which is not cleared first
  const auto buffer = [&](int64_t height) {
    buffers.push_back(empty_dense(x, {group, height, a.pitch}, computed_in(x)));
    return buffers.back().mutable_data_ptr();
  };
  // Features that lie next to each other along x, or else along the channels. The stride of an axis
  // of one entry means nothing: 1 tells the kernels that the former are.
  const auto features_of = [](const Tensor& f) {
    Samples s = samples_of(f);
    if (f.size(3) == 1 && f.stride(1) != 1) s.stride[3] = 1;
    return s;
  };
  for (auto& s : scales) {
    const auto dense = [](const Tensor& f, const Tensor& g, int axis) {
      return f.stride(axis) == 1 && g.stride(axis) == 1;
    };
    if (!dense(s.f, s.f_hat, 3) && !dense(s.f, s.f_hat, 1)) {
      s.f = torch::stable::contiguous(s.f);
      s.f_hat = torch::stable::contiguous(s.f_hat);
    }
    const int64_t h = s.f.size(2), w = s.f.size(3);
    bilinear(w, a.width, s.left, s.share);
    bilinear(h, a.height, s.above, s.share_y);
    features.push_back({dtype_of(s.f, "anomaly_map"), features_of(s.f), features_of(s.f_hat),
                        s.f.size(1), h, w, std::max<int64_t>(1, 128 / w), s.left.data(),
                        s.share.data(), s.above.data(), s.share_y.data(), buffer(h), 0,
                        a.pitch, a.width});
  }
  a.features = features.data();
  a.feature_count = static_cast<int64_t>(features.size());
  const std::vector<A> kernel = half_gaussian<A>(a.radius, sigma);
  a.kernel = kernel.data();
  a.rows = buffer(a.height);

  const auto parallel = [](int64_t items, int64_t work, auto&& f) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
    torch::stable::parallel_for(0, items, grain, f);
  };
  for (a.first = 0; a.first < batch; a.first += group) {
    const int64_t samples = std::min(group, batch - a.first);
    for (auto& f : features) {
      f.first = a.first;
      const int64_t blocks = (f.height + f.block - 1) / f.block;
      parallel(samples * blocks, f.block * (f.width * f.channels + a.width),
               [&](int64_t begin, int64_t end) {
                 std::vector<A> scratch((f.block + 1) * f.width + 1);
                 feature_rows_kernel()(f, scratch.data(), begin, end);
               });
    }
    parallel(samples * (a.height >> a.levels), a.width << a.levels,
             [&](int64_t begin, int64_t end) {
               std::vector<A> scratch(anomaly_scratch(a));
               anomaly_rows_kernel()(a, scratch.data(), begin, end);
             });
    parallel(samples * a.height, a.width,
             [&](int64_t begin, int64_t end) { anomaly_columns_kernel()(a, begin, end); });
    parallel(samples, a.height * a.width, [&](int64_t begin, int64_t end) {
      anomaly_scores_kernel()(a, a.first + begin, a.first + end);
    });
  }
}

std::tuple<Tensor, Tensor> anomaly_map(const Tensor& x, const Tensor& x_hat,
                                       std::vector<Tensor> features,
                                       std::vector<Tensor> features_hat,
                                       std::vector<double> weights, int64_t levels,
                                       std::vector<Tensor> stats, double sigma, double top,
                                       std::optional<Tensor> base) {
  check_anomaly_map(x, x_hat, features, features_hat, weights, levels, stats, sigma, top, base);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const bool wide = dtype_of(x, "anomaly_map") == DType::kDouble;
  AnomalyMapArgs a{};
  a.dtype = dtype_of(x, "anomaly_map");
  const Tensor map = empty_dense(x, {n, h, w}, computed_in(x));
  const Tensor score = empty_dense(x, {n}, computed_in(x));
  if (n == 0) return {map, score};
  a.x = samples_of(x);
  a.x_hat = samples_of(x_hat);
  a.channels = c;
  a.height = h;
  a.width = w;
  a.pitch = (w + 15) / 16 * 16;
  a.levels = static_cast<int>(levels);
  for (size_t i = 0; i < 3; ++i) a.weight[i] = weights[i];
  for (size_t i = 0; i < stats.size(); ++i) {
    Tensor& s = stats[i];
    if (s.stride(1) != 0 && s.stride(1) != 1) s = torch::stable::contiguous(s);
    Statistics& entry = a.stats[i / 2];
    entry.data[i % 2] = s.const_data_ptr();
    entry.stride_y[i % 2] = s.stride(0);
    entry.stride_x[i % 2] = s.stride(1);
  }
  Tensor first;  // owns what is added to
  if (base) {
    first = torch::stable::contiguous(*base);
    a.base = first.const_data_ptr();
  }
  a.radius = gaussian_radius(sigma);
  a.map = map.mutable_data_ptr();
  a.score = score.mutable_data_ptr();
  a.top = top_count(top, h * w);
  if (wide) {
    run<double>(a, x, features, features_hat, sigma);
  } else {
    run<float>(a, x, features, features_hat, sigma);
  }
  return {map, score};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) { m.impl("anomaly_map", TORCH_BOX(&anomaly_map)); }

}  // namespace
}  // namespace diffad
