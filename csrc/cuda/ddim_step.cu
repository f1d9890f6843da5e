// q_sample and ddim_step on CUDA, and the step of a captured loop. See common/diffusion.h for the
// maths.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "../common/diffusion_tensor.h"
#include "ddim_step_kernels.h"
#include "launch.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

unsigned blocks_for(int64_t work) {
  // Some waves of a large GPU; the kernels loop over the rest.
  const int64_t blocks = (work + kStepThreads - 1) / kStepThreads;
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 132 * 32));
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class C, class X, class M>
void launch(StepArgs<C, X, M> args, double ratio, double largest, C* limits, cudaStream_t stream) {
  if (limits) {
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(args.samples, 65535));
    threshold_kernel<<<blocks, kThresholdThreads, 0, stream>>>(args, ratio,
                                                               static_cast<C>(largest), limits);
    check_launch("ddim_step: threshold");
    args.limits = limits;
  }
  if (!args.coefficients && !limits && !args.m_shared && !args.y_shared && !args.z_shared &&
      args.one.s_z == 0) {
    args.size *= args.samples;  // nothing tells the samples apart
    args.samples = 1;
  }
  const bool packed = args.size % kPack == 0 && aligned(args.x) && aligned(args.m) &&
                      aligned(args.y) && aligned(args.z) && aligned(args.out) &&
                      aligned(args.input);
  const int64_t work = args.samples * args.size / (packed ? kPack : 1);
  if (packed) {
    step_kernel<kPack><<<blocks_for(work), kStepThreads, 0, stream>>>(args);
  } else {
    step_kernel<1><<<blocks_for(work), kStepThreads, 0, stream>>>(args);
  }
  check_launch("ddim_step");
}

// Calls f(C{}, X{}, M{}) for the dtypes of x and of the network's output that have a kernel: equal
// ones, or a narrow output beside float.
template <class F>
void for_step_dtypes(const Tensor& x, const Tensor& m, F&& f) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (x.scalar_type() == ScalarType::Float && m.scalar_type() == ScalarType::BFloat16) {
    return f(float{}, float{}, BFloat16{});
  }
  if (x.scalar_type() == ScalarType::Float && m.scalar_type() == ScalarType::Half) {
    return f(float{}, float{}, Half{});
  }
  STD_TORCH_CHECK(x.scalar_type() == m.scalar_type(), "ddim_step: no kernel for ", x.scalar_type(),
                  " beside ", m.scalar_type());
  for_floating_dtype(x, "ddim_step", [&](auto zero) {
    f(acc_t<decltype(zero)>{}, zero, zero);
  });
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// `given` in the layout of x and in `dtype`, one sample where it is the same for all.
struct Operand {
  Operand(const Tensor& given, const Tensor& x, ScalarType dtype)
      : shared(x.size(0) > 1 && (given.size(0) == 1 || given.stride(0) == 0)),
        tensor(in_layout_of(
            x, given.scalar_type() == dtype ? given : torch::stable::to(given, dtype), shared)) {}
  bool shared;
  Tensor tensor;
};

ScalarType output_dtype(const Tensor& x, const Tensor& m) {
  const bool narrow =
      m.scalar_type() == ScalarType::BFloat16 || m.scalar_type() == ScalarType::Half;
  return x.scalar_type() == ScalarType::Float && narrow ? m.scalar_type() : x.scalar_type();
}

// Is x narrow and an operand of another dtype? It would be rounded to that of x: then all is
// computed in float, and the result rounded once.
bool wants_float(const Tensor& x, std::initializer_list<const Tensor*> operands) {
  const ScalarType dtype = x.scalar_type();
  return (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half) &&
         std::any_of(operands.begin(), operands.end(),
                     [&](const Tensor* y) { return y && y->scalar_type() != dtype; });
}

Tensor doubles(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, ScalarType::Double));
}

// One value on the host, of a tensor () of the CPU, which torch lets meet tensors of any device.
bool on_host(const std::optional<Tensor>& x) { return x && x->is_cpu(); }

// Room for `count` values of T on x's device.
template <class T>
Tensor room(const Tensor& x, int64_t count) {
  return empty_dense(x, {count * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte);
}

Tensor ddim_step(const Tensor& x_t, const Tensor& model_output, std::optional<Tensor> alpha_t,
                 std::optional<Tensor> alpha_s, std::optional<Tensor> noise,
                 std::optional<Tensor> guide, double number_t, double number_s, int64_t prediction,
                 double eta, double guidance, double clip, double ratio, double largest,
                 bool recompute_epsilon) {
  const torch::stable::accelerator::DeviceGuard guard(x_t.get_device_index());
  check_step(x_t, model_output, noise, guide, prediction, eta);
  if (x_t.numel() == 0) return torch::stable::empty_like(x_t);
  if (wants_float(x_t, {&model_output, guide ? &*guide : nullptr, eta > 0 ? &*noise : nullptr})) {
    return torch::stable::to(
        ddim_step(torch::stable::to(dense_samples(x_t), ScalarType::Float), model_output, alpha_t,
                  alpha_s, noise, guide, number_t, number_s, prediction, eta, guidance, clip, ratio,
                  largest, recompute_epsilon),
        x_t.scalar_type());
  }
  const cudaStream_t stream = current_stream(x_t);
  const Tensor x = dense_samples(x_t);
  const Tensor out = torch::stable::empty_like(x);
  const Operand m(model_output, x, output_dtype(x, model_output));
  std::optional<Operand> y, z;
  if (guide) y.emplace(*guide, x, x.scalar_type());
  if (eta > 0) z.emplace(*noise, x, x.scalar_type());

  const int64_t samples = x.size(0);
  const bool threshold = ratio >= 0;
  const DdimOptions options{static_cast<Prediction>(prediction), guide.has_value(),
                            threshold || clip < INFINITY, recompute_epsilon, guidance, eta};
  Tensor keep[2];
  const auto alpha = [&](const std::optional<Tensor>& given, double number, Tensor& kept) -> Alpha {
    if (!given) return {nullptr, number, 0};
    STD_TORCH_CHECK(given->dim() == 0 || (given->dim() == 1 && given->size(0) == samples),
                    "ddim_step: an alpha tensor must have one entry, or one a sample");
    kept = doubles(*given);
    if (on_host(given)) {
      STD_TORCH_CHECK(given->dim() == 0, "ddim_step: an alpha tensor is on another device");
      return {nullptr, *data<double>(kept), 0};
    }
    return {data<double>(kept), 0, given->dim()};
  };
  const Alpha a = alpha(alpha_t, number_t, keep[0]), b = alpha(alpha_s, number_s, keep[1]);

  for_step_dtypes(x, m.tensor, [&](auto compute, auto x_type, auto m_type) {
    using C = decltype(compute);
    using X = decltype(x_type);
    using M = decltype(m_type);
    StepArgs<C, X, M> args{};
    args.samples = samples;
    args.size = x.numel() / samples;
    args.x = data<X>(x);
    args.m = data<M>(m.tensor), args.m_shared = m.shared;
    if (y) args.y = data<X>(y->tensor), args.y_shared = y->shared;
    if (z) args.z = data<X>(z->tensor), args.z_shared = z->shared;
    args.out = static_cast<X*>(out.mutable_data_ptr());
    Tensor many, limits;
    if (a.data || b.data) {
      many = room<DdimCoefficients<C>>(x, samples);
      auto* target = static_cast<DdimCoefficients<C>*>(many.mutable_data_ptr());
      coefficients_kernel<C><<<blocks_for(samples), kStepThreads, 0, stream>>>(a, b, options, clip,
                                                                           samples, target);
      check_launch("ddim_step: coefficients");
      args.coefficients = target;
    } else {
      DdimCoefficients<double> c = ddim_coefficients(a.number, b.number, options);
      c.limit = clip;
      args.one = c.as<C>();
    }
    if (threshold) limits = room<C>(x, samples);
    launch(args, ratio, largest, threshold ? static_cast<C*>(limits.mutable_data_ptr()) : nullptr,
           stream);
  });
  return out;
}

Tensor q_sample(const Tensor& x0, const Tensor& t, const Tensor& noise, const Tensor& table) {
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  check_operand(noise, x0, true, "q_sample: noise");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == x0.size(0) &&
                      t.device() == x0.device(),
                  "q_sample: t must be int64, one a sample, on the device of x0");
  STD_TORCH_CHECK(table.dim() == 1 && table.device() == x0.device(),
                  "q_sample: the table must have one axis, on the device of x0");
  if (x0.numel() == 0) return torch::stable::empty_like(x0);
  if (wants_float(x0, {&noise})) {
    const Tensor wide = torch::stable::to(dense_samples(x0), ScalarType::Float);
    return torch::stable::to(q_sample(wide, t, noise, table), x0.scalar_type());
  }
  const cudaStream_t stream = current_stream(x0);
  const Tensor x = dense_samples(x0);
  const Tensor out = torch::stable::empty_like(x);
  const Operand m(noise, x, output_dtype(x, noise));
  const Tensor times = torch::stable::contiguous(t), alphas = doubles(table);
  const int64_t samples = x.size(0);
  for_step_dtypes(x, m.tensor, [&](auto compute, auto x_type, auto m_type) {
    using C = decltype(compute);
    StepArgs<C, decltype(x_type), decltype(m_type)> args{};
    args.samples = samples;
    args.size = x.numel() / samples;
    args.x = data<decltype(x_type)>(x);
    args.m = data<decltype(m_type)>(m.tensor), args.m_shared = m.shared;
    args.out = static_cast<decltype(x_type)*>(out.mutable_data_ptr());
    const Tensor many = room<DdimCoefficients<C>>(x, samples);
    auto* target = static_cast<DdimCoefficients<C>*>(many.mutable_data_ptr());
    noising_kernel<C><<<blocks_for(samples), kStepThreads, 0, stream>>>(
        data<int64_t>(times), data<double>(alphas), table.size(0), samples, target);
    check_launch("q_sample: coefficients");
    args.coefficients = target;
    launch(args, -1, 1, static_cast<C*>(nullptr), stream);
  });
  return out;
}

// x_t becomes x_s; `next_input` gets the same numbers in the network's dtype. It has x_t's layout,
// as has the loop's first input, x_t in that dtype: one index serves both, and the network meets
// one layout at all steps.
void ddim_loop_step(Tensor x, const Tensor& model_output, std::optional<Tensor> guide,
                    const Tensor& table, Tensor counter, std::optional<Tensor> next_input,
                    int64_t seed, int64_t draw, double ratio, double largest) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_operand(model_output, x, false, "ddim_loop_step_: model_output");
  const bool inside = x.dim() == 4 && is_channels_last(x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.numel() > 0 && has_dense_samples(x) &&
                      (inside || x.is_contiguous()),
                  "ddim_loop_step_: the state must be contiguous or channels_last float32");
  check_table(table, counter, x);
  if (guide) check_operand(*guide, x, false, "ddim_loop_step_: guide");
  const cudaStream_t stream = current_stream(x);
  const Operand m(model_output, x, output_dtype(x, model_output));
  std::optional<Operand> y;
  if (guide) y.emplace(*guide, x, x.scalar_type());
  if (next_input) {
    check_operand(*next_input, x, false, "ddim_loop_step_: next_input");
    STD_TORCH_CHECK(next_input->scalar_type() == m.tensor.scalar_type() &&
                        has_layout_of(x, *next_input, false),
                    "ddim_loop_step_: next_input must have the output's dtype and x_t's layout");
  }
  for_step_dtypes(x, m.tensor, [&](auto compute, auto x_type, auto m_type) {
    using X = decltype(x_type);
    using M = decltype(m_type);
    if constexpr (std::is_same_v<X, float>) {
      StepArgs<float, float, M> args{};
      args.samples = x.size(0);
      args.size = x.numel() / args.samples;
      args.x = data<float>(x);
      args.out = static_cast<float*>(x.mutable_data_ptr());
      args.m = data<M>(m.tensor), args.m_shared = m.shared;
      if (y) args.y = data<float>(y->tensor), args.y_shared = y->shared;
      if (next_input) args.input = static_cast<M*>(next_input->mutable_data_ptr());
      args.coefficients = reinterpret_cast<const StepCoefficients*>(data<float>(table));
      args.counter = reinterpret_cast<StepCounter*>(counter.mutable_data_ptr());
      args.steps = static_cast<int32_t>(table.size(0));
      const int64_t channels = inside ? x.size(1) : 1;
      args.noise = {static_cast<uint64_t>(seed), static_cast<uint64_t>(draw),
                    {channels, args.size / channels, inside}};
      Tensor limits;
      if (ratio >= 0) limits = room<float>(x, args.samples);
      launch(args, ratio, largest,
             ratio >= 0 ? static_cast<float*>(limits.mutable_data_ptr()) : nullptr, stream);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("q_sample", TORCH_BOX(&q_sample));
  m.impl("ddim_step", TORCH_BOX(&ddim_step));
  m.impl("ddim_loop_step_", TORCH_BOX(&ddim_loop_step));
}

}  // namespace
}  // namespace diffad
