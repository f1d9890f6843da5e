// Haar packets: the per-element maths and the geometry that the CPU and the CUDA kernels share.
//
// One level of the orthonormal Haar transform on a 2x2 block (a b / c d), in PyWavelets' order, is
//   cA = (a+b+c+d)/2   cH = (a+b-c-d)/2   cV = (a-b+c-d)/2   cD = (a-b-c+d)/2,
// so cH is high along the rows (y), cV high along the columns (x). The digit of a band is therefore
// vbit + 2 hbit with vbit = "high along y" and hbit = "high along x".
//
// The full packet of L levels splits every band again, which makes both directions independent: on
// R = 2^L samples the stages l = 1..L take sum and difference of the positions that differ in bit
// l-1. That is the Walsh-Hadamard transform in natural order, W[k][i] = (-1)^popcount(k & i), and
// bit l-1 of the result index k says whether level l went high. With indices v (along y) and h
// (along x) the band is
//   band(v, h) = sum over l of (vbit_l + 2 hbit_l) 4^(l-1) = spread(v) + 2 spread(h),
// the coarsest level most significant. W is symmetric and W W = R I, so packing and unpacking are
// the same butterfly, scaled by 1/R in total over both directions. R is a power of two: the scaling
// is exact and may be done anywhere.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define DIFFAD_INLINE __host__ __device__ __forceinline__
#define DIFFAD_UNROLL _Pragma("unroll")
#else
#define DIFFAD_INLINE inline __attribute__((always_inline))
#define DIFFAD_UNROLL _Pragma("GCC unroll 16")
#endif

namespace diffad {

constexpr int kHaarMaxLevel = 4;

// Puts the bits of k at the even positions: the base-4 digits of spread(k) are the bits of k.
DIFFAD_INLINE constexpr int spread(int k) {
  return (k & 1) | (k & 2) << 1 | (k & 4) << 2 | (k & 8) << 3;
}
static_assert(spread(0b1011) == 0b1000101 && kHaarMaxLevel == 4);

// Unnormalised Walsh-Hadamard transform of R values in registers, in place, R a power of two:
// stages from `Half` on. Recursive, so that every loop is unrolled and every index a constant.
template <int Half = 1, int R, class T>
DIFFAD_INLINE void walsh(T (&v)[R]) {
  if constexpr (Half < R) {
    DIFFAD_UNROLL
    for (int i = 0; i < R / 2; ++i) {
      const int k = i / Half * 2 * Half + i % Half;
      const T a = v[k], b = v[k + Half];
      v[k] = a + b;
      v[k + Half] = a - b;
    }
    walsh<2 * Half>(v);
  }
}

// Sums are taken in float, for double in double.
template <class scalar_t>
using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Strides in elements of a 4-d tensor (N, C, H, W).
struct Strides {
  int64_t n, c, y, x;
};

// `image` is (batch, channels, R rows, R cols), `packed` is (batch, R R channels, rows, cols).
struct HaarGeometry {
  int64_t batch, channels, rows, cols;
  Strides image, packed;
  bool channels_last;
};

}  // namespace diffad
