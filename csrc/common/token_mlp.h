// token_mlp_loop: argument checks, the same on every device.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>

#include "tensor.h"

namespace diffad {

inline void check_token_mlp(const Tensor& x, const Tensor& w_in, const Tensor& b_in,
                            const Tensor& w1, const Tensor& w2, const Tensor& b2,
                            const Tensor& w_out, const Tensor& b_out, const Tensor& step_bias,
                            const Tensor& table) {
  STD_TORCH_CHECK(x.dim() == 2 && w_in.dim() == 2 && w1.dim() == 3 && table.dim() == 2,
                  "token_mlp_loop: expected x (M,D), W_in (W,D), W1 (B,W,W), table (S,5)");
  const int64_t d = x.size(1), width = w_in.size(0), blocks = w1.size(0), steps = table.size(0);
  const auto shaped = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    bool same = t.dim() == static_cast<int64_t>(shape.size()) && t.device() == x.device();
    int64_t axis = 0;
    for (const int64_t size : shape) same = same && t.size(axis++) == size;
    STD_TORCH_CHECK(same, "token_mlp_loop: ", name, " has a wrong shape or device");
  };
  const auto floating = [](const char* name, const Tensor& t) {
    using torch::headeronly::ScalarType;
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                        dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "token_mlp_loop: ", name, " is not of a floating dtype");
  };
  floating("x", x);
  floating("W_in", w_in);
  floating("step_bias", step_bias);
  floating("table", table);
  const auto weight = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
    shaped(name, t, shape);
    STD_TORCH_CHECK(t.scalar_type() == w_in.scalar_type(), "token_mlp_loop: ", name,
                    " is not of the dtype of W_in");
  };
  weight("W_in", w_in, {width, d});
  weight("b_in", b_in, {width});
  weight("W1", w1, {blocks, width, width});
  weight("W2", w2, {blocks, width, width});
  weight("b2", b2, {blocks, width});
  weight("W_out", w_out, {d, width});
  weight("b_out", b_out, {d});
  shaped("step_bias", step_bias, {steps, blocks, width});
  shaped("table", table, {steps, 5});
}

}  // namespace diffad
