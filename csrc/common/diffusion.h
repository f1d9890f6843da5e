// The DDIM step: coefficients from its options, and what is done to an element.
//
// With a = abar_t and b = abar_s, every prediction, guidance towards y and the update itself are
// linear in x_t, the network's output m, y and the noise z; only the limit of x0 (a clip, or a
// dynamic threshold) is not. A step is therefore, for each element,
//   x0  = x0_x x + x0_m m + x0_y y
//   x_s = s_x x + s_m m + s_y y + s_x0 limited(x0) + s_z z
// and without a limit x0 is put into the second line, where s_x0 = 0. The numbers are worked out
// once, in double: no element sees the difference between predictions. The equations are those of
// diffad_fast/reference/diffusion.py.
#pragma once

#include "lanes.h"

namespace diffad {

// As in ops/diffusion.py.
enum class Prediction : int { kEpsilon, kSample, kVelocity };

struct DdimOptions {
  Prediction prediction;
  bool guided, limited, recompute_epsilon;
  double guidance, eta;
};

template <class T>
struct DdimCoefficients {
  T x0_x, x0_m, x0_y;
  T s_x, s_m, s_y, s_x0, s_z;
  T limit;  // x0 is kept in [-limit, limit]

  template <class To>
  DIFFAD_INLINE DdimCoefficients<To> as() const {
    return {To(x0_x), To(x0_m), To(x0_y), To(s_x), To(s_m),
            To(s_y),  To(s_x0), To(s_z),  To(limit)};
  }
};

#ifndef DIFFAD_ISA  // the kernels of the CPU are given the coefficients

// Of one pair of levels; `limit` is left to the caller.
DIFFAD_INLINE DdimCoefficients<double> ddim_coefficients(double a, double b,
                                                         const DdimOptions& options) {
  struct Combination {
    double x, m, y;
  };
  const double signal = ::sqrt(a), spread = ::sqrt(1 - a);
  const double target = ::sqrt(b);
  Combination epsilon, x0;
  if (options.prediction == Prediction::kEpsilon) {
    epsilon = {0, 1, 0};
    x0 = {1 / signal, -spread / signal, 0};
  } else if (options.prediction == Prediction::kSample) {
    epsilon = {1 / spread, -signal / spread, 0};
    x0 = {0, 1, 0};
  } else {
    epsilon = {spread, signal, 0};
    x0 = {signal, -spread, 0};
  }
  if (options.guided) {
    // epsilon - w spread (signal y + spread epsilon - x)
    const double w = options.guidance * spread, rest = 1 - w * spread;
    epsilon = {rest * epsilon.x + w, rest * epsilon.m, -w * signal};
    x0 = {(1 - spread * epsilon.x) / signal, -spread * epsilon.m / signal,
          -spread * epsilon.y / signal};
  }
  // By branch at eta = 0: in inversion (b < a) the root would be imaginary.
  double variance = 0;
  if (options.eta != 0) {
    variance = options.eta * options.eta * (1 - b) / (1 - a) * (1 - a / b);
  }
  // Not negative but for rounding; NaN, for a variance below 0, passes.
  double rest = 1 - b - variance;
  rest = ::sqrt(rest < 0 ? 0 : rest);
  DdimCoefficients<double> c{x0.x, x0.m, x0.y, 0, 0, 0, target, ::sqrt(variance), 0};
  if (!options.limited) {
    // Whether epsilon is computed again from an x0 that has not changed makes no difference.
    c.s_x = target * x0.x + rest * epsilon.x;
    c.s_m = target * x0.m + rest * epsilon.m;
    c.s_y = target * x0.y + rest * epsilon.y;
    c.s_x0 = 0;
  } else if (options.recompute_epsilon) {  // (x - signal x0) / spread
    c.s_x = rest / spread;
    c.s_x0 = target - rest * signal / spread;
  } else {
    c.s_x = rest * epsilon.x, c.s_m = rest * epsilon.m, c.s_y = rest * epsilon.y;
  }
  return c;
}

#endif

// The dynamic threshold s limits x0 to [-s, s] and divides by s (Saharia et al. 2022).
template <class T>
DIFFAD_INLINE void set_threshold(DdimCoefficients<T>& c, T s) {
  c.limit = s;
  c.s_x0 /= s;
}

namespace DIFFAD_LANES {

// The linear combination of the prediction of x0; y counts where kGuided.
template <bool kGuided, class T, class V>
DIFFAD_INLINE V ddim_x0(const DdimCoefficients<T>& c, V x, V m, V y) {
  V x0 = x * c.x0_x;
  x0 = fma(m, all<V>(c.x0_m), x0);
  return kGuided ? fma(y, all<V>(c.x0_y), x0) : x0;
}

template <bool kGuided, bool kLimited, bool kNoisy, class T, class V>
DIFFAD_INLINE V ddim_update(const DdimCoefficients<T>& c, V x, V m, V y, V z) {
  V next = x * c.s_x;
  next = fma(m, all<V>(c.s_m), next);
  if constexpr (kGuided) next = fma(y, all<V>(c.s_y), next);
  if constexpr (kLimited) {
    V x0 = ddim_x0<kGuided>(c, x, m, y);
    const V limit = all<V>(c.limit);
    x0 = x0 > limit ? limit : x0;  // a NaN stays one
    x0 = x0 < -limit ? -limit : x0;
    next = fma(x0, all<V>(c.s_x0), next);
  }
  if constexpr (kNoisy) next = fma(z, all<V>(c.s_z), next);
  return next;
}

}  // namespace DIFFAD_LANES
}  // namespace diffad
