// A lane of a vector is a frame: all steps from its samples to its bands are the same arithmetic on
// as many frames as a vector has lanes, in memory that an L2 cache holds, and only bands leave it.
// All in double: rounding a frame in float leaves noise 130 dB below its loudest bins, as loud as
// what is to be heard in the quiet bands of recordings.
//
// The 2M samples of a frame are taken as M complex numbers z_k = x_2k + i x_2k+1. Their transform Z
// is found by decimation in time: of M = 4q numbers, those with index r modulo 4 are transformed to
// F_r of size q each, and with w = e^(-2 pi i / M)
//   Z_(j+pq) = sum_r (-i)^(rp) w^(rj) F_r[j]      j < q, p < 4,
// in place, F_r lying in the r-th quarter. Samples are brought into the order that this needs when
// they are read. A quarter stays in the first-level cache while it is transformed. The spectrum of
// the real samples is, with Z_M = Z_0 and the sums over even and odd samples E, O,
//   E_k = (Z_k + conj Z_(M-k)) / 2     O_k = (Z_k - conj Z_(M-k)) / 2i
//   X_k = E_k + W^k O_k     X_(M-k) = conj(E_k - W^k O_k)     W = e^(-2 pi i / 2M).
// The halves are taken off the bands at the end, as a quarter of their powers.
#include "log_mel.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

struct Complex {
  Vec<double> re, im;

  DIFFAD_SIMD Complex operator+(Complex b) const { return {re + b.re, im + b.im}; }
  DIFFAD_SIMD Complex operator-(Complex b) const { return {re - b.re, im - b.im}; }
  DIFFAD_SIMD Complex operator*(Complex b) const {
    return {fma(re, b.re, -(im * b.im)), fma(re, b.im, im * b.re)};
  }
  DIFFAD_SIMD Complex conj() const { return {re, -im}; }
  DIFFAD_SIMD Complex times_minus_i() const { return {im, -re}; }
  DIFFAD_SIMD Vec<double> power() const { return fma(re, re, im * im); }
};

constexpr int L = kLanes<double>;

struct Fourier {
  int64_t base;     // of the plan
  double* numbers;  // number k: its real parts at numbers + 2 k L, its imaginary parts L further on

  DIFFAD_SIMD Complex get(int64_t k) const {
    return {load(numbers + 2 * k * L), load(numbers + (2 * k + 1) * L)};
  }
  DIFFAD_SIMD void set(int64_t k, Complex z) const {
    store(numbers + 2 * k * L, z.re);
    store(numbers + (2 * k + 1) * L, z.im);
  }
  static DIFFAD_SIMD Complex root(const double* p) { return {splat(p[0]), splat(p[1])}; }

  // The transform of four numbers.
  static DIFFAD_SIMD void four(Complex& a, Complex& b, Complex& c, Complex& d) {
    const Complex even = a + c, odd = b + d, left = a - c, right = (b - d).times_minus_i();
    a = even + odd, b = left + right, c = even - odd, d = left - right;
  }

  void transform_four(int64_t at) const {
    Complex z[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) z[i] = get(at + i);
    four(z[0], z[1], z[2], z[3]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) set(at + i, z[i]);
  }

  void transform_eight(int64_t at) const {
    Complex z[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) z[i] = get(at + i);
    four(z[0], z[2], z[4], z[6]);
    four(z[1], z[3], z[5], z[7]);
    // Number k of the odd ones times e^(-2 pi i k / 8).
    const Vec<double> half = splat(0.70710678118654752440);
    const Complex b = z[3], d = z[7];
    z[3] = {half * (b.re + b.im), half * (b.im - b.re)};
    z[5] = z[5].times_minus_i();
    z[7] = {half * (d.im - d.re), -half * (d.re + d.im)};
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      set(at + k, z[2 * k] + z[2 * k + 1]);
      set(at + k + 4, z[2 * k] - z[2 * k + 1]);
    }
  }

  // Of `size` numbers from `at` on. `roots` are those after the last pass.
  void transform(int64_t at, int64_t size, const double* roots) const {
    if (size == base) return size == 4 ? transform_four(at) : transform_eight(at);
    const int64_t q = size / 4;
    roots -= 6 * q;
    for (int64_t r = 0; r < 4; ++r) transform(at + r * q, q, roots);
    for (int64_t j = at; j < at + q; ++j, roots += 6) {
      Complex a = get(j), b = get(j + q) * root(roots), c = get(j + 2 * q) * root(roots + 2),
              d = get(j + 3 * q) * root(roots + 4);
      four(a, b, c, d);
      set(j, a), set(j + q, b), set(j + 2 * q, c), set(j + 3 * q, d);
    }
  }

  // Four times the power of bin k replaces the real parts of number k, for k = 0 ... m.
  void powers(int64_t m, const double* roots) const {
    const Complex first = get(0);
    const Vec<double> sum = first.re + first.im, difference = first.re - first.im;
    store(numbers, 4 * (sum * sum));
    store(numbers + 2 * m * L, 4 * (difference * difference));
    for (int64_t k = 1; k <= m / 2; ++k) {
      const Complex z = get(k), mirror = get(m - k).conj();
      const Complex even = z + mirror, odd = (z - mirror).times_minus_i() * root(roots + 2 * k);
      store(numbers + 2 * k * L, (even + odd).power());
      store(numbers + 2 * (m - k) * L, (even - odd).power());
    }
  }

  // The power of a band: bins [begin, end) by the filter's weights.
  DIFFAD_SIMD Vec<double> band(const double* filter, int64_t begin, int64_t end) const {
    Vec<double> sum = {};
    for (int64_t k = begin; k < end; ++k) {
      sum = fma(splat(filter[k]), load(numbers + 2 * k * L), sum);
    }
    return 0.25 * sum;
  }
};

// 10 log10, at least -100, below which nothing is told apart. NaN stays.
template <class A>
DIFFAD_SIMD Vec<A> decibels(Vec<A> power) {
  const Vec<A> found = static_cast<A>(4.3429448190325182765) * log(power);
  return power <= static_cast<A>(1e-10) ? splat(static_cast<A>(-100)) : found;
}

template <class T>
void run(const LogMelArgs& a, double* scratch, int64_t item) {
  using A = compute_t<T>;
  // Frames are read as many at a time as A has lanes, and transformed in so many groups.
  constexpr int kFrames = kLanes<A>, kGroups = kFrames / L;
  const int64_t m = a.n_fft / 2, all = a.clips * a.frames;
  const double* const roots = a.plan.roots + 2 * (m - a.plan.base);
  Fourier groups[kGroups];
  for (int i = 0; i < kGroups; ++i) groups[i] = {a.plan.base, scratch + i * (a.n_fft + 2) * L};
  for (int64_t first = item * kFramesOfItem, i = 0; i < kFramesOfItem && first < all;
       i += kFrames, first += kFrames) {
    const int64_t count = all - first < kFrames ? all - first : kFrames;
    const T* from[kFrames];
    for (int64_t lane = 0; lane < kFrames; ++lane) {
      // Lanes without a frame of their own take the last one.
      const int64_t frame = first + (lane < count ? lane : count - 1);
      from[lane] = static_cast<const T*>(a.waves) + frame / a.frames * a.stride +
                   frame % a.frames * a.hop;
    }
    for (int64_t t = 0; t < a.n_fft; t += kFrames) {
      Vec<A> v[kFrames];
#pragma GCC unroll 16
      for (int lane = 0; lane < kFrames; ++lane) v[lane] = load(from[lane] + t);
      transpose(v);
#pragma GCC unroll 16
      for (int j = 0; j < kFrames; ++j) {
        const int64_t place = (2 * a.plan.order[(t + j) / 2] + j % 2) * L;
        const Vec<double> share = splat(a.window[t + j]);
        if constexpr (kGroups == 2) {
          store(groups[0].numbers + place, widen<0>(v[j]) * share);
          store(groups[1].numbers + place, widen<1>(v[j]) * share);
        } else {
          store(groups[0].numbers + place, v[j] * share);
        }
      }
    }
    for (const Fourier& group : groups) {
      group.transform(0, m, roots);
      group.powers(m, roots);
    }
    // Frames of one clip lie next to each other.
    const int64_t clip = first / a.frames, frame = first % a.frames;
    const bool together = count == kFrames && frame + kFrames <= a.frames;
    A* out = static_cast<A*>(a.out);
    for (int64_t band = 0; band < a.bands; ++band) {
      const double* filter = a.filters + band * (m + 1);
      const int64_t begin = a.ends[2 * band], end = a.ends[2 * band + 1];
      Vec<A> power;
      if constexpr (kGroups == 2) {
        power = narrow(groups[0].band(filter, begin, end), groups[1].band(filter, begin, end));
      } else {
        power = groups[0].band(filter, begin, end);
      }
      if (together) {
        store(out + (clip * a.bands + band) * a.frames + frame, decibels<A>(power));
        continue;
      }
      A numbers[kFrames];
      store(numbers, decibels<A>(power));
      for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t g = first + lane;
        out[(g / a.frames * a.bands + band) * a.frames + g % a.frames] = numbers[lane];
      }
    }
  }
}

}  // namespace

void log_mel(const LogMelArgs& args, double* scratch, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    for (int64_t item = begin; item < end; ++item) run<decltype(zero)>(args, scratch, item);
  });
}

}  // namespace diffad::DIFFAD_ISA
