// Vectors of the widest registers of the instruction set that this file is compiled for.
//
// Vec<float> and Vec<double> are the compiler's own vectors: + - * / and comparisons work on them,
// and `mask ? a : b` chooses by lane. Contraction of a*b+c is off (setup.py), so a fused
// multiply-add happens where fma() says so and nowhere else; without FMA in the instruction set it
// is a product and a sum, which lets instruction sets differ by rounding. Loads and stores convert
// from and to the dtypes of tensors, rounding to nearest even; partial ones touch n elements only.
// Everything here is private to its instruction set, see isa.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "dtype.h"

#define DIFFAD_SIMD inline __attribute__((always_inline))

namespace diffad::DIFFAD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
typedef int32_t VecI32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class To, class From>
DIFFAD_SIMD To bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// All lanes equal to `value`.
template <class T>
DIFFAD_SIMD Vec<T> splat(T value) {
  return value - Vec<T>{};  // (x - 0): the compilers make a broadcast of it, and keep -0
}

DIFFAD_SIMD VecU32 splat_u32(uint32_t value) { return value - VecU32{}; }

// ---------------------------------------------------------------- arithmetic

// a * b + c, rounded once where the instruction set can.
DIFFAD_SIMD Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

DIFFAD_SIMD Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// The same for one number, so that the tail of a loop has the bits of its vectors.
DIFFAD_SIMD float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

DIFFAD_SIMD double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// As std::min and std::max of each lane; a NaN in `a` gives `b`.
template <class V>
DIFFAD_SIMD V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
DIFFAD_SIMD V max(V a, V b) {
  return a > b ? a : b;
}

// For float by the instruction, which has the same rule; compilers make two of the choice above.
#if defined(__AVX512F__)
DIFFAD_SIMD Vec<float> min(Vec<float> a, Vec<float> b) { return _mm512_min_ps(a, b); }
DIFFAD_SIMD Vec<float> max(Vec<float> a, Vec<float> b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
DIFFAD_SIMD Vec<float> min(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
DIFFAD_SIMD Vec<float> max(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
#endif

DIFFAD_SIMD Vec<float> abs(Vec<float> x) {
  return bits<Vec<float>>(bits<VecU32>(x) & 0x7fffffffu);
}
// -0 becomes 0 too: quantiles order the bits.
DIFFAD_SIMD Vec<double> abs(Vec<double> x) {
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  return bits<Vec<double>>(bits<Bits>(x) & 0x7fffffffffffffffu);
}

DIFFAD_SIMD Vec<float> sqrt(Vec<float> x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}
DIFFAD_SIMD Vec<double> sqrt(Vec<double> x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_pd(x);
#else
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

template <class V>
using lane_t = std::remove_reference_t<decltype(std::declval<V&>()[0])>;

// Is any lane of `a` less than that of `b`?
template <class V>
DIFFAD_SIMD bool any_below(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(a[0]) == 4) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ) != 0;
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32(bits<VecU32>(a < b)) != 0;
#else
  const auto below = a < b;
  lane_t<std::remove_const_t<decltype(below)>> found = 0;
  for (size_t i = 0; i < sizeof(a) / sizeof(a[0]); ++i) found |= below[i];
  return found != 0;
#endif
}

// Sum of the lanes: halves are folded onto each other, in a fixed order.
template <class V>
DIFFAD_SIMD lane_t<V> sum_of_lanes(V x) {
  constexpr int lanes = sizeof(V) / sizeof(lane_t<V>);
  lane_t<V> lane[lanes];
  std::memcpy(lane, &x, sizeof(x));
#pragma GCC unroll 8
  for (int half = lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// ------------------------------------------------------------- words and lanes

typedef uint64_t VecU64 __attribute__((vector_size(kVectorBytes)));

// The product of the low words of each lane of `a` with `b`.
DIFFAD_SIMD VecU64 multiply_words(VecU64 a, uint32_t b) {
#if defined(__AVX512F__)
  return bits<VecU64>(_mm512_mul_epu32(bits<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return bits<VecU64>(_mm256_mul_epu32(bits<__m256i>(a), _mm256_set1_epi64x(b)));
#elif defined(__SSE2__)
  return bits<VecU64>(_mm_mul_epu32(bits<__m128i>(a), _mm_set1_epi64x(b)));
#elif defined(__aarch64__)
  return vmull_n_u32(vmovn_u64(a), b);
#else
  return (a & 0xffffffffu) * static_cast<uint64_t>(b);
#endif
}

// The nearest float of an unsigned and of a signed integer, given by its bits.
DIFFAD_SIMD Vec<float> to_float(VecU32 x) { return __builtin_convertvector(x, Vec<float>); }
DIFFAD_SIMD Vec<float> to_float_signed(VecU32 x) {
  return __builtin_convertvector(bits<VecI32>(x), Vec<float>);
}

// ------------------------------------------------------------ loads and stores

DIFFAD_SIMD Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DIFFAD_SIMD Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
DIFFAD_SIMD void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof(v)); }
DIFFAD_SIMD void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof(v)); }

typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

DIFFAD_SIMD Vec<float> load(const bf16* p) {
  VecU16 raw;
  std::memcpy(&raw, p, sizeof(raw));
#if defined(__aarch64__)
  return bits<Vec<float>>(vmovl_u16(raw) << 16);
#else
  return bits<Vec<float>>(__builtin_convertvector(raw, VecU32) << 16);
#endif
}

DIFFAD_SIMD void store(bf16* p, Vec<float> v) {
  const VecU32 all = bits<VecU32>(v);
  // Half of the last kept bit, less one on ties to even; NaN keeps its top bits and stays quiet.
  const VecU32 rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
  const VecU32 nan = (all >> 16) | 0x40u;
  const VecU32 result = (all & 0x7fffffffu) > 0x7f800000u ? nan : rounded;
  const VecU16 raw = __builtin_convertvector(result, VecU16);
  std::memcpy(p, &raw, sizeof(raw));
}

#if defined(__AVX512F__)
DIFFAD_SIMD Vec<float> load(const half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DIFFAD_SIMD void store(half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
DIFFAD_SIMD Vec<float> load(const half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DIFFAD_SIMD void store(half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__aarch64__)
DIFFAD_SIMD Vec<float> load(const half* p) {
  float16x4_t raw;
  std::memcpy(&raw, p, sizeof(raw));
  return vcvt_f32_f16(raw);
}
DIFFAD_SIMD void store(half* p, Vec<float> v) {
  const float16x4_t raw = vcvt_f16_f32(v);
  std::memcpy(p, &raw, sizeof(raw));
}
#else
// Selects and integer arithmetic that agree with IEEE 754.
DIFFAD_SIMD Vec<float> load(const half* p) {
  VecU16 raw;
  std::memcpy(&raw, p, sizeof(raw));
  const VecU32 all = __builtin_convertvector(raw, VecU32);
  const VecU32 magnitude = (all & 0x7fffu) << 13;  // exponent and fraction, in place
  const VecU32 exponent = magnitude & 0x0f800000u;
  // The exponent's bias goes from 15 to 127; infinity and NaN go to the largest exponent.
  const VecU32 normal = magnitude + (exponent == 0x0f800000u ? splat_u32(224u << 23)
                                                             : splat_u32(112u << 23));
  // A subnormal is fraction * 2^-24: with an exponent of 2^-14 put in front, subtract that.
  const Vec<float> front = bits<Vec<float>>(splat_u32(113u << 23));
  const VecU32 subnormal = bits<VecU32>(bits<Vec<float>>(magnitude + (113u << 23)) - front);
  return bits<Vec<float>>((exponent == 0 ? subnormal : normal) | (all & 0x8000u) << 16);
}
DIFFAD_SIMD void store(half* p, Vec<float> v) {
  const VecU32 all = bits<VecU32>(v);
  const VecU32 magnitude = all & 0x7fffffffu;
  // Round to 10 bits of fraction (half of the last kept bit, less one on ties to even), a carry
  // moving on into the exponent, and change the bias from 127 to 15.
  const VecU32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the last bit is worth 2^-24, as that of a float in [0.5, 1): add rounds there.
  const VecU32 subnormal = bits<VecU32>(bits<Vec<float>>(magnitude) + 0.5f) - (126u << 23);
  VecU32 result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? splat_u32(0x7c00u) : result;  // 65536 and more
  result = magnitude > 0x7f800000u ? splat_u32(0x7e00u) : result;    // NaN
  const VecU16 raw = __builtin_convertvector(result | ((all >> 16) & 0x8000u), VecU16);
  std::memcpy(p, &raw, sizeof(raw));
}
#endif

// The first n < kLanes elements; the other lanes are 0.
template <class T>
DIFFAD_SIMD Vec<compute_t<T>> load_partial(const T* p, int64_t n) {
  T buffer[kLanes<compute_t<T>>] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
DIFFAD_SIMD void store_partial(T* p, Vec<compute_t<T>> v, int64_t n) {
  T buffer[kLanes<compute_t<T>>];
  store(buffer, v);
  std::memcpy(p, buffer, n * sizeof(T));
}

// The same for a number that is known.
template <int N, class T>
DIFFAD_SIMD Vec<compute_t<T>> load_first(const T* p) {
  if constexpr (N == kLanes<compute_t<T>>) return load(p);
  return load_partial(p, N);
}
template <int N, class T>
DIFFAD_SIMD void store_first(T* p, Vec<compute_t<T>> v) {
  if constexpr (N == kLanes<compute_t<T>>) return store(p, v);
  store_partial(p, v, N);
}

// Copies n elements past the caches: for results that the caches cannot hold, since memory that is
// stored to the usual way is read before it is written. Only from a vector's boundary on; in whole
// lines it is fastest. finish_streams() before another thread may read.
template <class T>
DIFFAD_SIMD void stream(T* to, const T* from, int64_t n) {
  int64_t i = 0;
#if defined(__SSE2__)
  constexpr int64_t lanes = kVectorBytes / static_cast<int64_t>(sizeof(T));
  if (reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
    for (; i + lanes <= n; i += lanes) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#elif defined(__AVX2__)
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), v);
#else
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), v);
#endif
    }
  }
#endif
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
}

DIFFAD_SIMD void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// One element, by the same conversions. Where there is none, without a vector, and never by way of
// load_partial: compilers take it through memory in pieces of other sizes, which costs more than all
// that is done with a number.
template <class T>
DIFFAD_SIMD compute_t<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    return *p;
  } else {
    const VecU16 raw = {p->x};
    return load(reinterpret_cast<const T*>(&raw))[0];
  }
}
template <class T>
DIFFAD_SIMD void store_one(T* p, compute_t<T> value) {
  if constexpr (std::is_same_v<T, compute_t<T>>) {
    *p = value;
  } else {
    store_partial(p, splat(value), 1);
  }
}

// --------------------------------------------------------- even and odd elements

template <class V, int... I>
DIFFAD_SIMD void deinterleave(V a, V b, V& even, V& odd, std::integer_sequence<int, I...>) {
  even = __builtin_shufflevector(a, b, (2 * I)...);
  odd = __builtin_shufflevector(a, b, (2 * I + 1)...);
}
// The elements at even and at odd positions of the 2 lanes long sequence a, b.
template <class V>
DIFFAD_SIMD void deinterleave(V a, V b, V& even, V& odd) {
  constexpr int lanes = sizeof(V) / sizeof(lane_t<V>);
  deinterleave(a, b, even, odd, std::make_integer_sequence<int, lanes>{});
}

template <class V, int... I>
DIFFAD_SIMD void interleave(V even, V odd, V& a, V& b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  a = __builtin_shufflevector(even, odd, (I / 2 + I % 2 * lanes)...);
  b = __builtin_shufflevector(even, odd, (I / 2 + I % 2 * lanes + lanes / 2)...);
}
// The inverse.
template <class V>
DIFFAD_SIMD void interleave(V even, V odd, V& a, V& b) {
  constexpr int lanes = sizeof(V) / sizeof(lane_t<V>);
  interleave(even, odd, a, b, std::make_integer_sequence<int, lanes>{});
}

// Lane I of the result is element 3 I + K of the 3 lanes long sequence a, b, c.
template <int K, class V, int... I>
DIFFAD_SIMD V every_third(V a, V b, V c, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  const V ab = __builtin_shufflevector(a, b, (3 * I + K < 2 * lanes ? 3 * I + K : 0)...);
  return __builtin_shufflevector(ab, c, (3 * I + K < 2 * lanes ? I : 3 * I + K - lanes)...);
}
// Parts triples: v holds 3 lanes elements in order, then the first of each, the second, the third.
template <class V>
DIFFAD_SIMD void deinterleave(V (&v)[3]) {
  constexpr auto all = std::make_integer_sequence<int, sizeof(V) / sizeof(lane_t<V>)>{};
  const V a = v[0], b = v[1], c = v[2];
  v[0] = every_third<0>(a, b, c, all);
  v[1] = every_third<1>(a, b, c, all);
  v[2] = every_third<2>(a, b, c, all);
}

// Lanes [M lanes, (M + 1) lanes) of the sequence a0 b0 c0 a1 b1 c1 ...
template <int M, class V, int... I>
DIFFAD_SIMD V third_of_triples(V a, V b, V c, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I), first = M * lanes;
  const V ab = __builtin_shufflevector(
      a, b, ((first + I) / 3 + ((first + I) % 3 == 1 ? lanes : 0))...);
  return __builtin_shufflevector(
      ab, c, ((first + I) % 3 == 2 ? lanes + (first + I) / 3 : I)...);
}
// And back.
template <class V>
DIFFAD_SIMD void interleave(V (&v)[3]) {
  constexpr auto all = std::make_integer_sequence<int, sizeof(V) / sizeof(lane_t<V>)>{};
  const V a = v[0], b = v[1], c = v[2];
  v[0] = third_of_triples<0>(a, b, c, all);
  v[1] = third_of_triples<1>(a, b, c, all);
  v[2] = third_of_triples<2>(a, b, c, all);
}

// Runs of Half lanes: (a0, b0, a2, b2, ...) or, of the odd ones, (a1, b1, a3, b3, ...).
template <int Half, bool kOdd, class V, int... I>
DIFFAD_SIMD V exchange_blocks(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I), odd = kOdd ? Half : 0;
  return __builtin_shufflevector(a, b, (I & Half ? n + I - Half + odd : I + odd)...);
}

// Element i of vector k goes to element k of vector i, for as many vectors as there are lanes.
template <int Half = 1, class V, int N>
DIFFAD_SIMD void transpose(V (&v)[N]) {
  static_assert(sizeof(V) == N * sizeof(v[0][0]));
  if constexpr (Half < N) {
    // Swap the upper right and the lower left quarter of every square of 2 Half elements.
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (i & Half) continue;
      const V a = v[i], b = v[i + Half];
      v[i] = exchange_blocks<Half, false>(a, b, std::make_integer_sequence<int, N>());
      v[i + Half] = exchange_blocks<Half, true>(a, b, std::make_integer_sequence<int, N>());
    }
    transpose<2 * Half>(v);
  }
}

// Half 0 or 1 of the lanes as doubles, and back from both.
#if defined(__aarch64__)
template <int Half>
DIFFAD_SIMD Vec<double> widen(Vec<float> v) {
  return Half == 0 ? vcvt_f64_f32(vget_low_f32(v)) : vcvt_high_f64_f32(v);
}
DIFFAD_SIMD Vec<float> narrow(Vec<double> low, Vec<double> high) {
  return vcvt_high_f32_f64(vcvt_f32_f64(low), high);
}
#else
template <int Half, int... I>
DIFFAD_SIMD Vec<double> widen(Vec<float> v, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_convertvector(__builtin_shufflevector(v, v, (I + Half * lanes)...), Vec<double>);
}
template <int Half>
DIFFAD_SIMD Vec<double> widen(Vec<float> v) {
  return widen<Half>(v, std::make_integer_sequence<int, kLanes<double>>{});
}
template <int... I>
DIFFAD_SIMD Vec<float> narrow(Vec<double> low, Vec<double> high,
                              std::integer_sequence<int, I...>) {
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  return __builtin_shufflevector(__builtin_convertvector(low, Half),
                                 __builtin_convertvector(high, Half), I...);
}
DIFFAD_SIMD Vec<float> narrow(Vec<double> low, Vec<double> high) {
  return narrow(low, high, std::make_integer_sequence<int, kLanes<float>>{});
}
#endif

// ------------------------------------------------------------------- functions

// Gradient checks alone run in double: no speed is needed, the library's accuracy is.
DIFFAD_SIMD Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// The natural logarithm of normal numbers above 0, within 1.1 units in the last place; infinity and NaN
// stay. x = 2^k m with m in [sqrt(1/2), sqrt(2)), and with s = (m - 1) / (m + 1) <= 0.172
// ln m = 2 artanh s = 2 (s + s^3/3 + s^5/5 + ...), of which the term after the last taken is 1e-9.
DIFFAD_SIMD Vec<float> log(Vec<float> x) {
  const VecI32 shifted = bits<VecI32>(x) - 0x3f3504f3;  // the bits of sqrt(1/2)
  const Vec<float> m = bits<Vec<float>>(bits<VecI32>(x) - (shifted >> 23 << 23)) - 1.0f;
  const Vec<float> s = m / (m + 2.0f), square = s * s;
  Vec<float> p = splat(2.0f / 9);
  p = fma(p, square, splat(2.0f / 7));
  p = fma(p, square, splat(2.0f / 5));
  p = fma(p, square, splat(2.0f / 3));
  // 2 s = m - m s, whose first term is exact.
  p = fma(s, fma(p, square, -m), m);
  const Vec<float> result =
      fma(__builtin_convertvector(shifted >> 23, Vec<float>), splat(0.693147181f), p);
  return x < __builtin_inff() ? result : x;
}
DIFFAD_SIMD Vec<double> log(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log(x[i]);
  return x;
}

// 1 + e^-x for x of at least -87, for functions that divide by it: within 3 units in the last place
// for |x| < 30, and its value at 87 serves all larger x. NaN stays. e^-x = 2^k 2^f, k the integer
// next to -x / ln 2; the polynomial is the minimax one of 2^f on [-1/2, 1/2], up to 8e-8.
DIFFAD_SIMD Vec<float> one_plus_exp_minus(Vec<float> x) {
  const Vec<float> limited = min(splat(87.0f), x);
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec<float> magic = splat(12582912.0f);
  const Vec<float> shifted = fma(limited, splat(-1.44269504f), magic);
  const Vec<float> f = fma(limited, splat(-1.44269504f), magic - shifted);
  Vec<float> p = splat(0.00132764725f);
  p = fma(p, f, splat(0.00967554096f));
  p = fma(p, f, splat(0.0555071309f));
  p = fma(p, f, splat(0.240221202f));
  p = fma(p, f, splat(0.693146944f));
  p = fma(p, f, splat(1.00000012f));
  return bits<Vec<float>>(bits<VecI32>(p) + (bits<VecI32>(shifted) << 23)) + 1.0f;
}
DIFFAD_SIMD Vec<double> one_plus_exp_minus(Vec<double> x) { return 1 + exp(-x); }

// 2^x for x <= 0, within 1.5 units in the last place; 0 below -126.5, NaN for NaN.
// x = k + r with |r| <= 1/2; the polynomial is the minimax one of degree 6 for 2^r that is 1 at 0.
DIFFAD_SIMD Vec<float> exp2_negative(Vec<float> x) {
  const Vec<float> limited = max(splat(-127.0f), x);
  const Vec<float> magic = splat(12582912.0f);  // as above
  const Vec<float> shifted = limited + magic;
  const Vec<float> r = limited - (shifted - magic);
  Vec<float> p = splat(1.5353362e-4f);
  p = fma(p, r, splat(1.3398875e-3f));
  p = fma(p, r, splat(9.6184369e-3f));
  p = fma(p, r, splat(5.5503324e-2f));
  p = fma(p, r, splat(2.4022648e-1f));
  p = fma(p, r, splat(6.9314718e-1f));
  p = fma(p, r, splat(1.0f));
  // 2^k has the exponent k + 127: all bits 0, which is 0, for k = -127.
  return p * bits<Vec<float>>((bits<VecI32>(shifted) - (bits<VecI32>(magic) - 127)) << 23);
}
DIFFAD_SIMD Vec<double> exp2_negative(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// 1 / (1 + e^-x).
template <class V>
DIFFAD_SIMD V sigmoid(V x) {
  return 1 / one_plus_exp_minus(max(V{} - 87, x));
}

// x / (1 + e^-x). Below -87 the value is that at -87, which is -1e-36.
template <class V>
DIFFAD_SIMD V silu(V x) {
  const V limited = max(V{} - 87, x);
  return limited / one_plus_exp_minus(limited);
}

}  // namespace diffad::DIFFAD_ISA
