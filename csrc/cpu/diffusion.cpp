// q_sample and ddim_step on the CPU. See common/diffusion.h for the maths.
//
// Both are one pass over samples that lie one after the other, each dense in any order of its axes;
// an operand in another layout than the first one's is copied before. q_sample is the step whose
// second operand is the noise: sqrt(abar) x + sqrt(1 - abar) noise.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "../common/diffusion_tensor.h"
#include "dtype_of.h"
#include "kernels/ddim.h"

namespace diffad {
namespace {

// Fewer elements than this are not worth a thread.
constexpr int64_t kGrain = 32768;

DdimOperand operand(const Tensor& x) {
  return {x.const_data_ptr(), dtype_of(x, "ddim_step"), false};
}

// `given` in the layout of x, shared where it has one sample for all of x; `keep` owns it.
DdimOperand operand_like(const Tensor& given, const Tensor& x, Tensor& keep) {
  const bool shared = x.size(0) > 1 && (given.size(0) == 1 || given.stride(0) == 0);
  keep = in_layout_of(x, given, shared);
  return {keep.const_data_ptr(), dtype_of(keep, "ddim_step"), shared};
}

// ᾱ in double: a number for all samples, or the n entries of a tensor.
struct Alpha {
  Alpha(double number, const std::optional<Tensor>& given, int64_t n) : first(number) {
    if (!given) return;
    STD_TORCH_CHECK(given->dim() == 0 || (given->dim() == 1 && given->size(0) == n),
                    "ddim_step: an alpha tensor must have one entry, or one a sample");
    keep = torch::stable::contiguous(
        torch::stable::to(*given, torch::headeronly::ScalarType::Double));
    data = static_cast<const double*>(keep.const_data_ptr());
    first = data[0];
    if (given->dim() == 0) data = nullptr;
  }
  double operator[](int64_t i) const { return data ? data[i] : first; }

  const double* data = nullptr;  // null: the same for all samples
  double first;
  Tensor keep;
};

// One sample for all where nothing tells the samples apart: fewer, longer runs.
void merge_samples(DdimArgs& args) {
  if (args.coefficients_shared && !args.m.shared && !args.y.shared && !args.z.shared) {
    args.size *= args.samples;
    args.samples = 1;
  }
  args.tiles = (args.size + kDdimTile - 1) / kDdimTile;
}

void run(const DdimArgs& args, void (*kernel)(const DdimArgs&, int64_t, int64_t)) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(args.size, kDdimTile));
  torch::stable::parallel_for(0, args.samples * args.tiles, grain, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end);
  });
}

// The quantile `ratio` of n > 0 magnitudes with linear interpolation between the two nearest, as
// torch.lerp computes it. Bits of floats that are not negative order as the floats do, NaN last.
//
// A histogram of the leading 12 bits (sign, exponent, 3 or 0 bits of fraction) finds the numbers
// among which the quantile is; only they are selected from.
template <class C>
C quantile(const C* magnitude, int64_t n, double ratio) {
  using U = std::conditional_t<std::is_same_v<C, double>, uint64_t, uint32_t>;
  constexpr int kShift = sizeof(U) * 8 - 12;
  const U* all = reinterpret_cast<const U*>(magnitude);
  const double position = ratio * static_cast<double>(n - 1);
  int64_t rank = static_cast<int64_t>(position);
  const C weight = static_cast<C>(position - static_cast<double>(rank));

  std::vector<int64_t> histogram(4096);
  for (int64_t i = 0; i < n; ++i) ++histogram[all[i] >> kShift];
  U bin = 0;
  while (rank >= histogram[bin]) rank -= histogram[bin++];
  std::vector<U> near;
  near.reserve(histogram[bin]);
  U next = ~U{0};  // the smallest beyond the bin
  for (int64_t i = 0; i < n; ++i) {
    if (all[i] >> kShift == bin) near.push_back(all[i]);
    else if (all[i] >> kShift > bin) next = std::min(next, all[i]);
  }
  const auto at = near.begin() + rank;
  std::nth_element(near.begin(), at, near.end());
  const U below_bits = *at;
  U above_bits = at + 1 < near.end() ? *std::min_element(at + 1, near.end()) : next;
  if (above_bits == ~U{0}) above_bits = below_bits;  // the largest of all
  C below, above;
  std::memcpy(&below, &below_bits, sizeof(C));
  std::memcpy(&above, &above_bits, sizeof(C));
  return weight < C(0.5) ? below + weight * (above - below)
                         : above - (above - below) * (1 - weight);
}

// Puts the dynamic threshold of every sample into its coefficients.
template <class C>
void set_thresholds(DdimArgs args, DdimCoefficients<C>* coefficients, double ratio,
                    double largest) {
  std::vector<C> magnitude(args.samples * args.size);
  args.out = magnitude.data();
  run(args, ddim_magnitude_kernel());
  torch::stable::parallel_for(0, args.samples, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      C s = quantile(magnitude.data() + i * args.size, args.size, ratio);
      s = s < 1 ? C(1) : s > C(largest) ? C(largest) : s;  // NaN stays
      set_threshold(coefficients[i], s);
    }
  });
}

Tensor ddim_step(const Tensor& x_t, const Tensor& model_output, std::optional<Tensor> alpha_t,
                 std::optional<Tensor> alpha_s, std::optional<Tensor> noise,
                 std::optional<Tensor> guide, double number_t, double number_s, int64_t prediction,
                 double eta, double guidance, double clip, double ratio, double largest,
                 bool recompute_epsilon) {
  check_step(x_t, model_output, noise, guide, prediction, eta);
  if (x_t.numel() == 0) return torch::stable::empty_like(x_t);
  const Tensor x = dense_samples(x_t);
  const Tensor out = empty_as(x);
  Tensor keep[3];
  DdimArgs args{x.size(0), x.numel() / x.size(0)};
  args.x = operand(x);
  args.m = operand_like(model_output, x, keep[0]);
  if (guide) args.y = operand_like(*guide, x, keep[1]);
  if (eta > 0) args.z = operand_like(*noise, x, keep[2]);
  args.out = out.mutable_data_ptr();

  const bool threshold = ratio >= 0;
  args.limited = threshold || clip < INFINITY;
  const DdimOptions options{static_cast<Prediction>(prediction), guide.has_value(), args.limited,
                            recompute_epsilon, guidance, eta};
  const Alpha a(number_t, alpha_t, args.samples), b(number_s, alpha_s, args.samples);
  args.coefficients_shared = !threshold && !a.data && !b.data;
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    // One is the usual number, and no reason to allocate.
    DdimCoefficients<C> one;
    std::vector<DdimCoefficients<C>> many(args.coefficients_shared ? 0 : args.samples);
    DdimCoefficients<C>* coefficients = args.coefficients_shared ? &one : many.data();
    args.coefficients = coefficients;
    for (int64_t i = 0; i < (args.coefficients_shared ? 1 : args.samples); ++i) {
      DdimCoefficients<double> c = ddim_coefficients(a[i], b[i], options);
      c.limit = clip;
      coefficients[i] = c.as<C>();
    }
    merge_samples(args);
    if (threshold) set_thresholds(args, coefficients, ratio, largest);
    run(args, ddim_update_kernel());
  };
  args.x.dtype == DType::kDouble ? go(double{}) : go(float{});
  return out;
}

// ᾱ of every sample: the entries t of the table.
std::vector<double> alphas_at(const Tensor& t, const Tensor& table, int64_t samples) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == samples,
                  "q_sample: t must be int64, one a sample");
  STD_TORCH_CHECK(table.dim() == 1, "q_sample: the table must have one axis");
  const Tensor times = torch::stable::contiguous(t);
  const auto* time = static_cast<const int64_t*>(times.const_data_ptr());
  const int64_t length = table.size(0), stride = table.stride(0);
  std::vector<double> found(samples);
  for_floating_dtype(table, "q_sample", [&](auto entry) {
    const auto* alphas = static_cast<const decltype(entry)*>(table.const_data_ptr());
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t k = time[i] < 0 ? time[i] + length : time[i];
      STD_TORCH_CHECK(0 <= k && k < length, "q_sample: t[", i, "] = ", time[i],
                      " is not an index into the table of ", length);
      found[i] = static_cast<double>(alphas[k * stride]);
    }
  });
  return found;
}

// `x`, dense and not empty, noised to `out`; and where there is a `target`, its velocity
// sqrt(abar) noise - sqrt(1 - abar) x.
void noise_samples(const Tensor& x, const Tensor& noise, const std::vector<double>& alphas,
                   const Tensor& out, const Tensor* target) {
  Tensor keep;
  DdimArgs args{x.size(0), x.numel() / x.size(0)};
  args.x = operand(x);
  args.m = operand_like(noise, x, keep);
  args.out = out.mutable_data_ptr();
  if (target) args.target = target->mutable_data_ptr();
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    std::vector<DdimCoefficients<C>> coefficients(args.samples);
    for (int64_t i = 0; i < args.samples; ++i) {
      const C signal = static_cast<C>(std::sqrt(alphas[i]));
      const C spread = static_cast<C>(std::sqrt(1 - alphas[i]));
      coefficients[i].s_x = signal, coefficients[i].s_m = spread;
      coefficients[i].x0_x = -spread, coefficients[i].x0_m = signal;
    }
    args.coefficients = coefficients.data();
    merge_samples(args);
    run(args, target ? noised_velocity_kernel() : ddim_update_kernel());
  };
  args.x.dtype == DType::kDouble ? go(double{}) : go(float{});
}

Tensor q_sample(const Tensor& x0, const Tensor& t, const Tensor& noise, const Tensor& table) {
  check_operand(noise, x0, true, "q_sample: noise");
  const std::vector<double> alphas = alphas_at(t, table, x0.size(0));
  if (x0.numel() == 0) return torch::stable::empty_like(x0);
  const Tensor x = dense_samples(x0);
  const Tensor out = empty_as(x);
  noise_samples(x, noise, alphas, out, nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> noised_velocity(const Tensor& x0, const Tensor& t,
                                                   const Tensor& noise, const Tensor& table,
                                                   double snr_limit) {
  check_operand(noise, x0, true, "noised_velocity: noise");
  const std::vector<double> alphas = alphas_at(t, table, x0.size(0));
  const Tensor weight = empty_dense(x0, {x0.size(0)}, torch::headeronly::ScalarType::Float);
  auto* weights = static_cast<float*>(weight.mutable_data_ptr());
  for (size_t i = 0; i < alphas.size(); ++i) {
    const double snr = alphas[i] / (1 - alphas[i]);
    weights[i] = static_cast<float>(std::min(snr, snr_limit) / (snr + 1));
  }
  const Tensor x = x0.numel() == 0 ? torch::stable::contiguous(x0) : dense_samples(x0);
  const Tensor out = empty_as(x), velocity = empty_as(x);
  if (x0.numel() != 0) noise_samples(x, noise, alphas, out, &velocity);
  return {out, velocity, weight};
}

// A row of coefficients for each pair of levels, for the kernels of a captured loop.
Tensor ddim_table(const Tensor& alphas, int64_t prediction, double eta, double guidance,
                  double clip, bool recompute_epsilon) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(alphas.scalar_type() == ScalarType::Double && alphas.dim() == 2 &&
                      alphas.size(1) == 2 && alphas.is_contiguous(),
                  "ddim_table: alphas must be contiguous float64 (steps, 2)");
  STD_TORCH_CHECK(0 <= prediction && prediction <= 2, "ddim_table: unknown prediction ",
                  prediction);
  const int64_t steps = alphas.size(0), columns = sizeof(DdimCoefficients<float>) / sizeof(float);
  const Tensor table = empty_dense(alphas, {steps, columns}, ScalarType::Float);
  const auto* alpha = static_cast<const double*>(alphas.const_data_ptr());
  auto* rows = static_cast<DdimCoefficients<float>*>(table.mutable_data_ptr());
  const DdimOptions options{static_cast<Prediction>(prediction), guidance != 0, clip < INFINITY,
                            recompute_epsilon, guidance, eta};
  for (int64_t i = 0; i < steps; ++i) {
    DdimCoefficients<double> c = ddim_coefficients(alpha[2 * i], alpha[2 * i + 1], options);
    c.limit = clip;
    rows[i] = c.as<float>();
  }
  return table;
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("ddim_table", TORCH_BOX(&ddim_table));
  m.impl("noised_velocity", TORCH_BOX(&noised_velocity));
  m.impl("q_sample", TORCH_BOX(&q_sample));
  m.impl("ddim_step", TORCH_BOX(&ddim_step));
}

}  // namespace
}  // namespace diffad
