// The dtypes that kernels read and write, without torch's headers.
#pragma once

#include <cstdint>

namespace diffad {

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

// Bits of torch's types of the same name.
struct bf16 {
  uint16_t x;
};
struct half {
  uint16_t x;
};

// What a kernel computes in: double for double, float for all others.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

inline int64_t size_of(DType dtype) {
  return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
}

// Calls f(T{}) with the C++ type of `dtype`.
template <class F>
inline __attribute__((always_inline)) void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat: return f(float{});
    case DType::kDouble: return f(double{});
    case DType::kBFloat16: return f(bf16{});
    case DType::kHalf: return f(half{});
  }
}

}  // namespace diffad
