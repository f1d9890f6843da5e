// What lets one line of arithmetic serve one number in a CUDA thread and a vector on the CPU.
//
// Code inside `namespace diffad::DIFFAD_LANES` is written for types F (float or double) and U
// (uint32_t), each a number or a vector of such. In a CPU kernel the namespace is that of the
// instruction set (cpu/kernels/isa.h) and the functions are those of cpu/kernels/simd.h; anywhere
// else they are the ones below. A product and a sum that are to be rounded once are written as
// fma(), and nowhere else is one added to the other, so that nvcc has nothing to contract either.
#pragma once

#include <cstdint>

#ifdef DIFFAD_ISA

#include "../cpu/kernels/simd.h"
#define DIFFAD_LANES DIFFAD_ISA
#ifndef DIFFAD_INLINE
#define DIFFAD_INLINE DIFFAD_SIMD
#endif

#else

#include <cmath>
#include <cstring>
#define DIFFAD_LANES one
#ifndef DIFFAD_INLINE
#ifdef __CUDACC__
#define DIFFAD_INLINE __host__ __device__ __forceinline__
#else
#define DIFFAD_INLINE inline __attribute__((always_inline))
#endif
#endif

namespace diffad::one {

DIFFAD_INLINE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DIFFAD_INLINE double fma(double a, double b, double c) { return ::fma(a, b, c); }
DIFFAD_INLINE float sqrt(float x) { return ::sqrtf(x); }

template <class To, class From>
DIFFAD_INLINE To bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// The nearest float of an unsigned and of a signed integer, given by its bits.
DIFFAD_INLINE float to_float(uint32_t x) { return static_cast<float>(x); }
DIFFAD_INLINE float to_float_signed(uint32_t x) {
  return static_cast<float>(static_cast<int32_t>(x));
}

// The product of the low words.
DIFFAD_INLINE uint64_t multiply_words(uint64_t a, uint32_t b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * b;
}

}  // namespace diffad::one

#endif

namespace diffad::DIFFAD_LANES {

// A constant in every lane.
template <class V, class T>
DIFFAD_INLINE V all(T value) {
  return V{} + value;
}

}  // namespace diffad::DIFFAD_LANES
