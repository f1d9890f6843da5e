// From a tensor's dtype to that of the kernels, which do not know torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "kernels/dtype.h"

namespace diffad {

inline DType dtype_of(const torch::stable::Tensor& x, const char* op) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::Double: return DType::kDouble;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    default: STD_TORCH_CHECK(false, op, ": not implemented for ", x.scalar_type());
  }
}

}  // namespace diffad
