// ddim_finish: argument checks, coefficients and outputs, the same on every device.
#pragma once

#include "diffusion_tensor.h"
#include "haar.h"

namespace diffad {

inline void check_finish(const Tensor& x, const Tensor& output, const std::optional<Tensor>& guide,
                         const Tensor& images, const Tensor& mean, const Tensor& deviation,
                         int64_t level, int64_t prediction) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 4 && (x.scalar_type() == ScalarType::Float ||
                                   x.scalar_type() == ScalarType::Double),
                  "ddim_finish: x_t must be float32 or float64 (N, C, H, W)");
  STD_TORCH_CHECK(0 <= level && level <= kHaarMaxLevel, "ddim_finish: level must be 0 to ",
                  kHaarMaxLevel, ", got ", level);
  STD_TORCH_CHECK(0 <= prediction && prediction <= 2, "ddim_finish: unknown prediction ",
                  prediction);
  check_operand(output, x, false, "ddim_finish: model_output");
  if (guide) check_operand(*guide, x, false, "ddim_finish: guide");
  const int64_t r = int64_t{1} << level;
  STD_TORCH_CHECK(images.dim() == 4 && images.scalar_type() == x.scalar_type() &&
                      images.device() == x.device() && images.size(0) == x.size(0) &&
                      images.size(1) * r * r == x.size(1) && images.size(2) == x.size(2) * r &&
                      images.size(3) == x.size(3) * r,
                  "ddim_finish: images must have the dtype of x_t and the size that it unpacks to");
  for (const Tensor* each : {&mean, &deviation}) {
    STD_TORCH_CHECK(each->dim() == 1 && each->size(0) == x.size(1) && each->is_contiguous() &&
                        each->scalar_type() == x.scalar_type() && each->device() == x.device(),
                    "ddim_finish: mean and deviation must be contiguous, in the dtype of x_t, one "
                    "number a channel");
  }
}

// Of the step from alpha_t to the end of the process, abar = 1, where x_s is x0 and no noise is added
// whatever eta. Always in the limited form, with a limit that may be infinite: one kernel serves both.
inline DdimCoefficients<double> finish_coefficients(double alpha_t, int64_t prediction, bool guided,
                                                    double guidance, double clip) {
  DdimCoefficients<double> c = ddim_coefficients(
      alpha_t, 1.0, {static_cast<Prediction>(prediction), guided, true, false, guidance, 0.0});
  c.limit = clip;
  return c;
}

struct FinishOutputs {
  Tensor x0, x_hat, pixel, sub_band;

  // x0 in the memory format of x, the others contiguous.
  FinishOutputs(const Tensor& x, const Tensor& images)
      : x0(empty_4d(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, is_channels_last(x))),
        x_hat(empty_4d(x, {images.size(0), images.size(1), images.size(2), images.size(3)}, false)) {
    for (Tensor* map : {&pixel, &sub_band}) {
      *map = empty_dense(x, {images.size(0), images.size(2), images.size(3)});
    }
  }
};

}  // namespace diffad
