// group_norm_silu and its backward on the CPU: arguments, layouts, threads. The maths is in
// kernels/group_norm_silu.cpp.
#include "kernels/group_norm_silu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "dtype_of.h"
#include "layout.h"
#include "operators.h"

namespace diffad {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Fewer elements than this are not worth a thread.
constexpr int64_t kGrain = 16384;
// Pixels of a tile: at least kTilePixels, so that what a tile leaves is small beside it, and more
// where there are few channels.
constexpr int64_t kTilePixels = 64, kTileElements = 4096;

// From a pixel to the next in the same row; of the only one of a row to that of the next row, since
// the stride of an axis of one entry means nothing.
int64_t pixel_distance(const Tensor& x) { return x.stride(x.size(3) > 1 ? 3 : 2); }

// Pixels next to each other, or channels next to each other and pixels at one distance. Slices of
// the batch and of the channels are that; anything else is copied.
Tensor with_dense_pixels(const Tensor& x, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const int64_t w = x.size(3), pixel = pixel_distance(x);
  const bool rows = x.size(2) == 1 || x.stride(2) == w * pixel;
  if (channels_last) {
    return rows && x.stride(1) == 1 ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  }
  return rows && pixel == 1 ? x : torch::stable::contiguous(x, MemoryFormat::Contiguous);
}

NormTensor strided(const Tensor& x, bool channels_last) {
  void* data = const_cast<void*>(x.const_data_ptr());
  return {data, x.stride(0), channels_last ? 1 : x.stride(1), channels_last ? pixel_distance(x) : 1};
}

// A parameter of shape (C), or (N, C) `by_sample`.
NormParameter parameter(const OptionalTensor& p, const Tensor& x, bool by_sample) {
  if (!p) return {nullptr, DType::kFloat, 0, 0};
  const bool fits = by_sample ? p->dim() == 2 && p->size(0) == x.size(0) && p->size(1) == x.size(1)
                              : p->dim() == 1 && p->size(0) == x.size(1);
  STD_TORCH_CHECK(fits, "group_norm_silu: a parameter does not have the shape of the channels");
  return {const_cast<void*>(p->const_data_ptr()), dtype_of(*p, "group_norm_silu"),
          by_sample ? p->stride(0) : 0, p->stride(by_sample ? 1 : 0)};
}

NormArgs arguments(const Tensor& x, bool channels_last, int64_t groups, const OptionalTensor& weight,
                   const OptionalTensor& bias, const OptionalTensor& scale,
                   const OptionalTensor& shift, bool activation) {
  NormArgs a{};
  a.dtype = dtype_of(x, "group_norm_silu");
  a.channels_last = channels_last;
  a.activation = activation;
  a.channels = x.size(1);
  a.pixels = x.size(2) * x.size(3);
  a.groups = groups;
  a.tile = kTileElements;
  if (channels_last) a.tile = std::max(kTilePixels, kTileElements / std::max<int64_t>(a.channels, 1));
  a.tiles = (a.pixels + a.tile - 1) / a.tile;
  a.x = strided(x, channels_last);
  a.weight = parameter(weight, x, false);
  a.bias = parameter(bias, x, false);
  a.scale = parameter(scale, x, true);
  a.shift = parameter(shift, x, true);
  return a;
}

void check(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 4, "group_norm_silu: expected a tensor (N, C, H, W), got ", x.dim(),
                  " axes");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "group_norm_silu: ", x.size(1),
                  " channels do not divide into ", groups, " groups");
}

using Kernel = void (*)(const NormArgs&, int64_t, int64_t);

// Runs `reduce` over all items of a sample, then `fold`, then `apply` over all items. Where every
// thread gets samples of its own it takes one after the other, whose second pass finds it in the
// cache; otherwise the threads share all samples, pass by pass. The bits are the same.
void run(const NormArgs& a, int64_t batch, Kernel reduce, Kernel fold, Kernel apply) {
  const int64_t items = a.items(), work = a.channels * a.pixels;
  const int64_t threads = torch::stable::get_num_threads();
  const auto samples = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      reduce(a, n * items, (n + 1) * items);
      fold(a, n, n + 1);
      apply(a, n * items, (n + 1) * items);
    }
  };
  if (threads == 1 || batch * work <= kGrain) return samples(0, batch);
  if (batch % threads == 0 || batch >= 4 * threads) {
    return torch::stable::parallel_for(0, batch, std::max<int64_t>(1, kGrain / work), samples);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain * items / work);
  const auto over_items = [&](Kernel kernel) {
    torch::stable::parallel_for(0, batch * items, grain,
                                [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };
  over_items(reduce);
  fold(a, 0, batch);
  over_items(apply);
}

// Both formats lay a single pixel out alike, and channels next to each other are the faster ones.
bool as_channels_last(const Tensor& x) {
  return is_channels_last(x) || (x.size(2) * x.size(3) == 1 && x.stride(1) == 1);
}

}  // namespace

std::tuple<Tensor, Tensor> group_norm_silu(const Tensor& input, int64_t groups,
                                           OptionalTensor weight, OptionalTensor bias, double eps,
                                           OptionalTensor scale, OptionalTensor shift,
                                           bool activation) {
  check(input, groups);
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  const bool last = as_channels_last(input);
  Tensor y = empty_4d(input, {n, c, h, w}, is_channels_last(input));
  Tensor stats = empty_dense(input, {n, groups, 2}, computed_in(input));
  if (y.numel() == 0) return {y, torch::stable::zero_(stats)};
  const Tensor x = with_dense_pixels(input, last);
  NormArgs a = arguments(x, last, groups, weight, bias, scale, shift, activation);
  a.eps = eps;
  a.y = strided(y, last);
  a.stats = stats.mutable_data_ptr();
  const int64_t floats = n * c * 2 * (a.tiles + 1);
  const Scratch scratch = scratch_of(floats * (a.dtype == DType::kDouble ? 8 : 4));
  a.partial = scratch.get();
  a.coefficients = scratch.get() + n * c * 2 * a.tiles * (a.dtype == DType::kDouble ? 8 : 4);
  run(a, n, norm_moments_kernel(), norm_fold_kernel(), norm_apply_kernel());
  return {y, stats};
}

namespace {

// Gradients of x, weight, bias, scale and shift; bit i of `needs` asks for the i-th, the others
// come back without elements.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& input, const Tensor& stats, int64_t groups,
    OptionalTensor weight, OptionalTensor bias, OptionalTensor scale, OptionalTensor shift,
    bool activation, int64_t needs) {
  check(input, groups);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.scalar_type() == input.scalar_type(),
                  "group_norm_silu_backward: the gradient does not have the form of the output");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(grad.size(i) == input.size(i),
                    "group_norm_silu_backward: the gradient does not have the output's shape");
  }
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  STD_TORCH_CHECK(stats.dim() == 3 && stats.size(0) == n && stats.size(1) == groups &&
                      stats.size(2) == 2 && stats.scalar_type() == computed_in(input) &&
                      stats.is_contiguous(),
                  "group_norm_silu_backward: stats are not those of the forward");
  const bool last = as_channels_last(input);
  const bool dense = needs & 1;
  Tensor dx = dense ? empty_4d(input, {n, c, h, w}, is_channels_last(input))
                    : empty_dense(input, {0}, input.scalar_type());
  const auto output = [&](int bit, const OptionalTensor& p, bool by_sample) {
    const auto dtype = p ? p->scalar_type() : input.scalar_type();
    if (!(needs >> bit & 1)) return empty_dense(input, {0}, dtype);
    STD_TORCH_CHECK(p, "group_norm_silu_backward: gradient of an absent parameter");
    return by_sample ? empty_dense(input, {n, c}, dtype) : empty_dense(input, {c}, dtype);
  };
  Tensor dweight = output(1, weight, false), dbias = output(2, bias, false);
  Tensor dscale = output(3, scale, true), dshift = output(4, shift, true);
  if (grad.numel() == 0) {
    for (Tensor* p : {&dweight, &dbias, &dscale, &dshift}) torch::stable::zero_(*p);
    return {dx, dweight, dbias, dscale, dshift};
  }
  const Tensor x = with_dense_pixels(input, last);
  const Tensor dy = with_dense_pixels(grad, last);
  NormArgs a = arguments(x, last, groups, weight, bias, scale, shift, activation);
  a.dy = strided(dy, last);
  if (dense) a.dx = strided(dx, last);
  const auto target = [&](Tensor& p, bool by_sample) -> NormParameter {
    if (p.numel() == 0) return {nullptr, DType::kFloat, 0, 0};
    return {p.mutable_data_ptr(), dtype_of(p, "group_norm_silu"), by_sample ? c : 0, 1};
  };
  a.dweight = target(dweight, false), a.dbias = target(dbias, false);
  a.dscale = target(dscale, true), a.dshift = target(dshift, true);
  a.stats = const_cast<void*>(stats.const_data_ptr());
  const int64_t size = a.dtype == DType::kDouble ? 8 : 4;
  const Scratch scratch = scratch_of(n * c * (2 * a.tiles + 5) * size);
  a.partial = scratch.get();
  a.coefficients = scratch.get() + n * c * 2 * a.tiles * size;
  norm_prepare_gradient_kernel()(a, 0, n);
  const auto nothing = [](const NormArgs&, int64_t, int64_t) {};
  run(a, n, norm_gradient_sums_kernel(), norm_fold_gradient_kernel(),
      dense ? norm_apply_gradient_kernel() : nothing);
  if (needs >> 1) norm_parameter_gradients_kernel()(a, n);
  return {dx, dweight, dbias, dscale, dshift};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace
}  // namespace diffad
