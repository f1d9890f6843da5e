// The training loss on the CPU: with e_n the mean square of (prediction - target) over the M values
// of sample n, loss = sum_n weight_n e_n / N, so that
//   dloss / dprediction = 2 weight / (N M) (prediction - target) = -dloss / dtarget.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/diffusion_tensor.h"
#include "dtype_of.h"
#include "kernels/weighted_mse.h"

namespace diffad {
namespace {

// Fewer elements than this are not worth a thread.
constexpr int64_t kGrain = 32768;

struct Operands {
  Operands(const Tensor& given, const Tensor& given_target, const Tensor& given_weight) {
    using torch::headeronly::ScalarType;
    STD_TORCH_CHECK(given.dim() > 0 && given.numel() > 0, "weighted_mse: no samples");
    check_operand(given_target, given, false, "weighted_mse: target");
    STD_TORCH_CHECK(given_weight.dim() == 1 && given_weight.size(0) == given.size(0) &&
                        given_weight.device() == given.device(),
                    "weighted_mse: weight must have one entry a sample, on the same device");
    prediction = dense_samples(given);
    computed_in = given.scalar_type() == ScalarType::Double ? ScalarType::Double
                                                            : ScalarType::Float;
    target = given_target.scalar_type() == given.scalar_type()
                 ? given_target
                 : torch::stable::to(given_target, computed_in);
    target = in_layout_of(prediction, target, false);
    weights = torch::stable::contiguous(torch::stable::to(given_weight, ScalarType::Double));
    weight = static_cast<const double*>(weights.const_data_ptr());
    samples = prediction.size(0);
    args.size = prediction.numel() / samples;
    args.tiles = (args.size + kMseTile - 1) / kMseTile;
    args.dtype = dtype_of(prediction, "weighted_mse");
    args.target_dtype = dtype_of(target, "weighted_mse");
    args.prediction = prediction.const_data_ptr();
    args.target = target.const_data_ptr();
  }

  void run(void (*kernel)(const MseArgs&, int64_t, int64_t)) const {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::min(args.size, kMseTile));
    torch::stable::parallel_for(0, samples * args.tiles, grain, [&](int64_t begin, int64_t end) {
      kernel(args, begin, end);
    });
  }

  Tensor prediction, target, weights;
  torch::headeronly::ScalarType computed_in;
  const double* weight;
  int64_t samples;
  MseArgs args;
};

template <class F>
void for_compute(const Operands& given, F&& f) {
  given.args.dtype == DType::kDouble ? f(double{}) : f(float{});
}

std::tuple<Tensor, Tensor> weighted_mse(const Tensor& prediction, const Tensor& target,
                                        const Tensor& weight) {
  Operands given(prediction, target, weight);
  const Tensor errors = empty_dense(weight, {given.samples}, given.computed_in);
  const Tensor loss = empty_dense(weight, {}, given.computed_in);
  for_compute(given, [&](auto zero) {
    using C = decltype(zero);
    std::vector<C> sums(given.samples * given.args.tiles);
    given.args.sums = sums.data();
    given.run(square_sums_kernel());
    auto* error = static_cast<C*>(errors.mutable_data_ptr());
    double total = 0;
    for (int64_t i = 0; i < given.samples; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < given.args.tiles; ++k) sum += sums[i * given.args.tiles + k];
      sum /= static_cast<double>(given.args.size);
      error[i] = static_cast<C>(sum);
      total += given.weight[i] * sum;
    }
    *static_cast<C*>(loss.mutable_data_ptr()) =
        static_cast<C>(total / static_cast<double>(given.samples));
  });
  return {loss, errors};
}

// The gradient of the prediction, for the loss's own gradient `grad`.
Tensor weighted_mse_backward(const Tensor& grad, const Tensor& prediction, const Tensor& target,
                             const Tensor& weight) {
  Operands given(prediction, target, weight);
  STD_TORCH_CHECK(grad.numel() == 1, "weighted_mse: the gradient of the loss is one number");
  const Tensor whole = torch::stable::to(grad, torch::headeronly::ScalarType::Double);
  const double scale = 2 * *static_cast<const double*>(whole.const_data_ptr()) /
                       (static_cast<double>(given.samples) * static_cast<double>(given.args.size));
  const Tensor gradient = torch::stable::empty_like(given.prediction);
  for_compute(given, [&](auto zero) {
    using C = decltype(zero);
    std::vector<C> factors(given.samples);
    for (int64_t i = 0; i < given.samples; ++i) {
      factors[i] = static_cast<C>(scale * given.weight[i]);
    }
    given.args.factors = factors.data();
    given.args.gradient = gradient.mutable_data_ptr();
    given.run(mse_gradient_kernel());
  });
  return gradient;
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("weighted_mse", TORCH_BOX(&weighted_mse));
  m.impl("weighted_mse_backward", TORCH_BOX(&weighted_mse_backward));
}

}  // namespace
}  // namespace diffad
