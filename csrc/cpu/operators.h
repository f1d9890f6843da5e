// Operators that others are made of. Their schemas are in ops.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "../common/tensor.h"

namespace diffad {

Tensor conv3x3(const Tensor& input, const Tensor& packed, std::optional<Tensor> bias,
               std::optional<Tensor> residual);
std::tuple<Tensor, Tensor> group_norm_silu(const Tensor& input, int64_t groups,
                                           std::optional<Tensor> weight, std::optional<Tensor> bias,
                                           double eps, std::optional<Tensor> scale,
                                           std::optional<Tensor> shift, bool activation);
Tensor haar_pack(const Tensor& x, int64_t level);
Tensor haar_unpack(const Tensor& y, int64_t level);
std::tuple<Tensor, Tensor> wavelet_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const std::optional<Tensor>& logit_gain,
                                             const std::optional<Tensor>& value_gain, int64_t level,
                                             double scale);

}  // namespace diffad
