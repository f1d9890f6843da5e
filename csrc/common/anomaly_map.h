// anomaly_map: argument checks, the Gaussian and the count of the score, the same on every device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include "tensor.h"

namespace diffad {

inline void check_anomaly_map(const Tensor& x, const Tensor& x_hat,
                              const std::vector<Tensor>& features,
                              const std::vector<Tensor>& features_hat,
                              const std::vector<double>& weights, int64_t levels,
                              const std::vector<Tensor>& stats, double sigma, double top,
                              const std::optional<Tensor>& base) {
  using torch::headeronly::ScalarType;
  const auto wide = [](const Tensor& t) { return t.scalar_type() == ScalarType::Double; };
  const ScalarType computed = wide(x) ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(x.dim() == 4 && x.sizes().equals(x_hat.sizes()),
                  "anomaly_map: x and x_hat must be (N, C, H, W)");
  STD_TORCH_CHECK(x.scalar_type() == x_hat.scalar_type() && x.device() == x_hat.device(),
                  "anomaly_map: x_hat differs in dtype or device");
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3);
  STD_TORCH_CHECK(x.size(1) > 0 && h > 0 && w > 0, "anomaly_map: x has no pixels");
  STD_TORCH_CHECK(weights.size() == 3 && features.size() == features_hat.size() &&
                      (stats.empty() || stats.size() == 6),
                  "anomaly_map: three weights, as many features_hat as features, 0 or 6 stats");
  STD_TORCH_CHECK(0 <= levels && levels <= 16 && h % (int64_t{1} << levels) == 0 &&
                      w % (int64_t{1} << levels) == 0,
                  "anomaly_map: ", h, " x ", w, " does not divide by 2^", levels);
  STD_TORCH_CHECK(0 <= sigma && sigma <= 1e6 && 0 <= top && top <= 1,
                  "anomaly_map: sigma or top out of range");
  for (size_t i = 0; i < features.size(); ++i) {
    const Tensor &f = features[i], &g = features_hat[i];
    STD_TORCH_CHECK(f.dim() == 4 && f.size(0) == n && f.size(2) > 0 && f.size(3) > 0 &&
                        f.sizes().equals(g.sizes()),
                    "anomaly_map: features ", i, " must be (N, C, h, w), as their counterparts");
    STD_TORCH_CHECK(f.scalar_type() == g.scalar_type() && wide(f) == wide(x) &&
                        f.device() == x.device() && g.device() == x.device(),
                    "anomaly_map: features ", i, " differ in dtype or device");
  }
  for (const Tensor& s : stats) {
    STD_TORCH_CHECK(s.dim() == 2 && s.size(0) == h && s.size(1) == w && s.scalar_type() == computed,
                    "anomaly_map: statistics must be (H, W), in the dtype of the map");
  }
  if (base) {
    STD_TORCH_CHECK(base->dim() == 3 && base->size(0) == n && base->size(1) == h &&
                        base->size(2) == w && base->scalar_type() == computed &&
                        base->device() == x.device(),
                    "anomaly_map: base must be (N, H, W), in the dtype of the map");
  }
}

inline int64_t gaussian_radius(double sigma) { return static_cast<int64_t>(4 * sigma + 0.5); }

// Half of a Gaussian whose whole sum is 1.
template <class A>
std::vector<A> half_gaussian(int64_t radius, double sigma) {
  std::vector<double> value(radius + 1, 1.0);
  double sum = 1.0;
  for (int64_t j = 1; j <= radius; ++j) {
    const double z = static_cast<double>(j) / sigma;
    value[j] = std::exp(-0.5 * z * z);
    sum += 2 * value[j];
  }
  std::vector<A> kernel(radius + 1);
  for (int64_t j = 0; j <= radius; ++j) kernel[j] = static_cast<A>(value[j] / sum);
  return kernel;
}

// Values whose mean is the score, of an image's `pixels`.
inline int64_t top_count(double top, int64_t pixels) {
  return std::max<int64_t>(1, std::llrint(top * static_cast<double>(pixels)));
}

}  // namespace diffad
