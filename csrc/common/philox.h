// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011) and the Box-Muller transform. diffad_fast/reference/noise.py has the layout of the counter.
#pragma once

#include "lanes.h"

namespace diffad::DIFFAD_LANES {

// Turns a counter into four random words; words are the low halves of 64-bit lanes W.
//
// A round needs the two words of 32 x 32 bit products. Kept in 64-bit lanes, the high one is one
// shift away, the low one is where it has to be, and what is left in a lane's upper half is ignored
// by the next product.
template <class W>
DIFFAD_INLINE void philox4x32(W (&counter)[4], uint32_t key0, uint32_t key1) {
  W c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  for (int round = 0; round < 10; ++round) {
    const W p0 = multiply_words(c0, 0xD2511F53u);
    const W p1 = multiply_words(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(key0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(key1);
    c3 = p0;
    key0 += 0x9E3779B9u;  // the golden ratio - 1, times 2^32
    key1 += 0xBB67AE85u;  // sqrt(3) - 1, times 2^32
  }
  counter[0] = c0, counter[1] = c1, counter[2] = c2, counter[3] = c3;
}

// sqrt(-2 ln u) for u = (w + 1) 2^-32, within 2 units in the last place.
//
// u = 2^e (1 + f) with sqrt(1/2) < 1 + f < sqrt(2); ln(1 + f) = f - f^2/2 + f^3 P(f) with P the
// best polynomial of degree 7 (error of ln below 1e-8 of it). Near u = 1, where ln u is as small as
// 2^-32 and rounding u to a float would lose it, f = u - 1 = -(~w) 2^-32 is taken from the integer.
template <class F, class U>
DIFFAD_INLINE F normal_radius(U w) {
  const auto near_one = w >= 0xB504F333u;  // u > sqrt(1/2)
  const F x = to_float(near_one ? ~w : w + 1u);
  // The bits of sqrt(1/2) are 0x3f3504f3: with them subtracted, the exponent's field changes where
  // the fraction passes sqrt(2).
  const U shifted = bits<U>(x) - 0x3f3504f3u;
  const F fraction = bits<F>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
  const F f = near_one ? x * -0x1p-32f : fraction;
  const F exponent = to_float_signed(U(shifted >> 23)) - 32.0f;
  const F e = near_one ? F{} : exponent;
  F p = all<F>(-0.07865503688f);
  p = fma(p, f, all<F>(0.1287922308f));
  p = fma(p, f, all<F>(-0.1312528607f));
  p = fma(p, f, all<F>(0.141814164f));
  p = fma(p, f, all<F>(-0.1662497038f));
  p = fma(p, f, all<F>(0.200022827f));
  p = fma(p, f, all<F>(-0.2500079655f));
  p = fma(p, f, all<F>(0.3333331678f));
  const F square = f * f;
  // ln 2 in two parts, the first short enough that e times it is exact.
  F small = fma(square * f, p, e * -2.12194440e-4f);
  small = fma(square, all<F>(-0.5f), small);
  const F log = fma(e, all<F>(0.693359375f), f + small);
  return sqrt(log * -2.0f);
}

// Cosine and sine of 2 pi w 2^-32, within 2 units in the last place.
//
// w is k quarter turns and a rest of q eighths, |q| <= 1, both exact. Over a rest,
// sin(pi/4 q) = q (pi/4 + q^2 S(q^2)) and cos(pi/4 q) = 1 + q^2 C(q^2) with the best polynomials.
template <class F, class U>
DIFFAD_INLINE void cos_sin_turn(U w, F& cosine, F& sine) {
  const U k = (w + 0x20000000u) >> 30;
  const F q = to_float_signed(U(w - (k << 30))) * 0x1p-29f;
  const F square = q * q;
  F s = all<F>(-3.610933259e-5f);
  s = fma(s, square, all<F>(0.002490219943f));
  s = fma(s, square, all<F>(-0.0807455025f));
  s = fma(s, square, all<F>(-2.1855695e-8f));  // pi/4 less the float nearest to it
  s = fma(q, all<F>(0.78539819f), q * s);
  F c = all<F>(3.541966969e-6f);
  c = fma(c, square, all<F>(-0.0003259614017f));
  c = fma(c, square, all<F>(0.01585433816f));
  c = fma(c, square, all<F>(-0.3084251373f));
  c = fma(c, square, all<F>(1.0f));
  const auto swapped = (k & 1u) == 1u;
  const F a = swapped ? s : c, b = swapped ? c : s;
  cosine = bits<F>(bits<U>(a) ^ U(((k + 1u) & 2u) << 30));  // negative in turns 1 and 2
  sine = bits<F>(bits<U>(b) ^ U((k & 2u) << 30));           // negative in turns 2 and 3
}

// Two standard normal numbers from two words (Box & Muller 1958).
template <class F, class U>
DIFFAD_INLINE void box_muller(U w1, U w2, F& z1, F& z2) {
  F cosine, sine;
  cos_sin_turn(w2, cosine, sine);
  const F radius = normal_radius<F>(w1);
  z1 = radius * cosine;
  z2 = radius * sine;
}

}  // namespace diffad::DIFFAD_LANES
