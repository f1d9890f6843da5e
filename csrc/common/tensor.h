// Argument checks and layouts for 4-d tensors (N, C, H, W); host code of both devices.
// The Python side checks first and raises ValueError or TypeError: the checks here only keep a
// direct call of torch.ops.diffad_fast.* from touching memory that is not its own.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>
#include <optional>
#include <utility>

namespace diffad {

using torch::stable::Tensor;

// A tensor counts as channels_last when the channels lie next to each other and the columns do not
// lie within them. This holds for slices of a channels_last tensor too, and for one channel it
// tells (HW, 1, W, 1) from (HW, HW, W, 1). diffad_fast/ops/layout.py has the same rule.
inline bool is_channels_last(const Tensor& x) {
  return x.stride(1) == 1 && x.stride(3) >= x.size(1);
}

using torch::headeronly::IntHeaderOnlyArrayRef;

// A new tensor of `like`'s device and, without another, dtype. The operator aten::empty would be
// looked up by its name and called through boxes, which takes longer than a small operator's work.
inline Tensor empty_strided(const Tensor& like, IntHeaderOnlyArrayRef size,
                            IntHeaderOnlyArrayRef stride,
                            std::optional<torch::headeronly::ScalarType> other = std::nullopt) {
  using torch::stable::detail::from, torch::stable::detail::to;
  int32_t dtype, device, index;
  if (other) {
    dtype = to<int32_t>(from(*other));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  }
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(),
                                                  stride.data(), dtype, device, index, &made));
  return Tensor(made);
}

// Like x, which has neither gaps nor overlaps.
inline Tensor empty_as(const Tensor& x) { return empty_strided(x, x.sizes(), x.strides()); }

// Contiguous, of up to five axes.
inline Tensor empty_dense(const Tensor& like, IntHeaderOnlyArrayRef size,
                          std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  std::array<int64_t, 5> stride;
  STD_TORCH_CHECK(size.size() <= stride.size(), "empty_dense: more than five axes");
  int64_t next = 1;
  for (size_t i = size.size(); i-- > 0; next *= size[i] > 0 ? size[i] : 1) stride[i] = next;
  return empty_strided(like, size, {stride.data(), size.size()}, dtype);
}

// What an operator computes in: float32 at least.
inline torch::headeronly::ScalarType computed_in(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Dense, contiguous or in channels_last.
inline Tensor empty_4d(const Tensor& like, std::array<int64_t, 4> size, bool channels_last) {
  const auto [n, c, h, w] = size;
  const std::array<int64_t, 4> stride = channels_last ? std::array{h * w * c, int64_t{1}, w * c, c}
                                                      : std::array{c * h * w, h * w, w, int64_t{1}};
  return empty_strided(like, {size.data(), 4}, {stride.data(), 4});
}

// Calls f(scalar_t{}) for a tensor of float, bfloat16 or half.
template <class F>
void for_narrow_dtype(const Tensor& x, const char* name, F&& f) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, name, ": not implemented for ", x.scalar_type());
  }
}

// The same, or double.
template <class F>
void for_floating_dtype(const Tensor& x, const char* name, F&& f) {
  if (x.scalar_type() == torch::headeronly::ScalarType::Double) return f(double{});
  for_narrow_dtype(x, name, std::forward<F>(f));
}

}  // namespace diffad
