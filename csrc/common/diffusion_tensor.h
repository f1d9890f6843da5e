// q_sample and ddim_step: argument checks and layouts, the same on every device.
#pragma once

#include <algorithm>
#include <array>
#include <optional>

#include "diffusion.h"
#include "tensor.h"

namespace diffad {

// `given` has x's shape, or 1 in place of its first entry where allowed, and x's device.
inline void check_operand(const Tensor& given, const Tensor& x, bool one_sample, const char* name) {
  STD_TORCH_CHECK(x.dim() > 0 && given.dim() == x.dim(), name, " must have ", x.dim(), " axes, at "
                  "least one");
  for (int64_t d = 0; d < x.dim(); ++d) {
    STD_TORCH_CHECK(given.size(d) == x.size(d) || (d == 0 && one_sample && given.size(0) == 1),
                    name, " has ", given.size(d), " entries along axis ", d, ", not ", x.size(d));
  }
  STD_TORCH_CHECK(given.device() == x.device(), name, " is on another device");
}

inline void check_step(const Tensor& x, const Tensor& output, const std::optional<Tensor>& noise,
                       const std::optional<Tensor>& guide, int64_t prediction, double eta) {
  check_operand(output, x, false, "ddim_step: model_output");
  if (guide) check_operand(*guide, x, false, "ddim_step: guide");
  STD_TORCH_CHECK(eta == 0 || noise, "ddim_step: eta > 0 needs noise");
  if (eta > 0) check_operand(*noise, x, true, "ddim_step: noise");
  STD_TORCH_CHECK(0 <= prediction && prediction <= 2, "ddim_step: unknown prediction ", prediction);
}

// A captured loop's table of coefficients and its counter: step and blocks that are done.
inline void check_table(const Tensor& table, const Tensor& counter, const Tensor& x) {
  using torch::headeronly::ScalarType;
  constexpr int64_t kColumns = sizeof(DdimCoefficients<float>) / sizeof(float);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 2 &&
                      table.size(1) == kColumns && table.size(0) > 0 && table.is_contiguous() &&
                      table.device() == x.device(),
                  "the table must be contiguous float32 (steps, ", kColumns, ") on x_t's device");
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Int && counter.numel() == 2 &&
                      counter.is_contiguous() && counter.device() == x.device(),
                  "the counter must be two contiguous int32 on x_t's device");
}

// Do the elements of each sample fill a run of memory, and the samples follow each other? The order
// of the axes within a sample is free: contiguous and channels_last are two of them.
inline bool has_dense_samples(const Tensor& x) {
  const int64_t size = x.numel() / x.size(0);
  if (x.size(0) > 1 && x.stride(0) != size) return false;
  int64_t run = 1;
  for (bool found = true; found && run < size;) {
    found = false;
    for (int64_t d = 1; d < x.dim() && !found; ++d) {
      if (x.size(d) > 1 && x.stride(d) == run) {
        run *= x.size(d);
        found = true;
      }
    }
  }
  return run == size;
}

// x, which is not empty, itself where its samples are dense, else a contiguous copy.
inline Tensor dense_samples(const Tensor& x) {
  return has_dense_samples(x) ? x : torch::stable::contiguous(x);
}

// An uninitialised tensor with the shape, the strides (where dense) and the device of x.
inline Tensor empty_like_in(const Tensor& x, torch::headeronly::ScalarType dtype) {
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{
      from(x),           from(std::optional<torch::headeronly::ScalarType>(dtype)),
      from(std::nullopt), from(std::nullopt),
      from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_like", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Has `given` (if `one_sample`, its first sample) the strides of x?
inline bool has_layout_of(const Tensor& x, const Tensor& given, bool one_sample) {
  bool same = one_sample || x.size(0) == 1 || given.stride(0) == x.stride(0);
  for (int64_t d = 1; d < x.dim(); ++d) {
    same = same && (x.size(d) == 1 || given.stride(d) == x.stride(d));
  }
  return same;
}

// `given` with the strides of x, whose samples are dense: itself or a copy. If `one_sample`, its
// first sample alone.
inline Tensor in_layout_of(const Tensor& x, const Tensor& given, bool one_sample) {
  if (has_layout_of(x, given, one_sample)) return given;
  const auto first = [&](const Tensor& all) {
    Tensor copy = all;
    return one_sample ? torch::stable::narrow(copy, 0, 0, 1) : copy;
  };
  Tensor copy = empty_like_in(first(x), given.scalar_type());
  torch::stable::copy_(copy, first(given));
  return copy;
}

}  // namespace diffad
