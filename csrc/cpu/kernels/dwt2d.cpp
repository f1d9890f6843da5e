// A row of results at a time: first down the columns, from the rows that its taps name into a
// scratch row that stays in the cache, then along x.
//
// Every pass is a sum of a few shifted sequences times constants, with vectors over neighbours
// whatever the layout. Down the columns these are the rows. Along x an image row is kept as its
// even and its odd pixels, as sequences of pixels of `lanes` channels: coefficient o takes the
// sample 2 o + shift - j from one of them at the distance floor((shift - j) / 2) from o.
#include "dwt2d.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

template <class T, int kOut, int kTaps, int kVectors>
DIFFAD_SIMD void sum_vectors(const T* const* p, const compute_t<T> (*w)[2], int taps, int64_t at,
                             Vec<compute_t<T>> (&sum)[kOut][kVectors]) {
  using C = compute_t<T>;
  DIFFAD_UNROLL
  for (int b = 0; b < kOut; ++b) {
    DIFFAD_UNROLL
    for (int u = 0; u < kVectors; ++u) sum[b][u] = Vec<C>{};
  }
  const int count = kTaps ? kTaps : taps;
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    DIFFAD_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      const Vec<C> x = load(p[j] + at + u * kLanes<C>);
      DIFFAD_UNROLL
      for (int b = 0; b < kOut; ++b) sum[b][u] = fma(x, splat(w[j][b]), sum[b][u]);
    }
  }
}

// out[b][i] = sum over j of w[j][b] p[j][i] for i in [0, n), in the order of j. The last vector of
// a sequence that does not divide overlaps the one before it: the same sums once more.
template <int kOut, int kTaps, class T, class Out>
DIFFAD_SIMD void sum_taps(const T* const* p, const compute_t<T> (*w)[2], int taps,
                          Out* const (&out)[kOut], int64_t n) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  constexpr int vectors = 4;
  int64_t i = 0;
  for (; i + vectors * lanes <= n; i += vectors * lanes) {
    Vec<C> sum[kOut][vectors];
    sum_vectors<T, kOut, kTaps>(p, w, taps, i, sum);
    DIFFAD_UNROLL
    for (int b = 0; b < kOut; ++b) {
      DIFFAD_UNROLL
      for (int u = 0; u < vectors; ++u) store(out[b] + i + u * lanes, sum[b][u]);
    }
  }
  if (n >= lanes) {
    for (; i < n; i += lanes) {
      const int64_t at = i + lanes <= n ? i : n - lanes;
      Vec<C> sum[kOut][1];
      sum_vectors<T, kOut, kTaps>(p, w, taps, at, sum);
      DIFFAD_UNROLL
      for (int b = 0; b < kOut; ++b) store(out[b] + at, sum[b][0]);
    }
    return;
  }
  const int count = kTaps ? kTaps : taps;
  for (; i < n; ++i) {
    C sum[kOut] = {};
    for (int j = 0; j < count; ++j) {
      const C x = load_one(p[j] + i);
      DIFFAD_UNROLL
      for (int b = 0; b < kOut; ++b) sum[b] = fma(x, w[j][b], sum[b]);
    }
    DIFFAD_UNROLL
    for (int b = 0; b < kOut; ++b) store_one(out[b] + i, sum[b]);
  }
}

// The same at a border, whose taps take `low` times an element of a and `high` times one of d: into
// one sum, or for kOut = 2 into one each. Sources lie a stride apart.
template <int kOut, class T, class Out>
DIFFAD_SIMD void sum_border(const T* a, int64_t a_stride, const T* d, int64_t d_stride,
                            const DwtTap* tap, const DwtTap* end, Out* const (&out)[kOut],
                            int64_t n) {
  using C = compute_t<T>;
  int64_t i = 0;
  for (; i + kLanes<C> <= n; i += kLanes<C>) {
    Vec<C> sum[kOut] = {};
    for (const DwtTap* t = tap; t < end; ++t) {
      const Vec<C> low = load(a + t->source * a_stride + i);
      const Vec<C> high = load(d + t->source * d_stride + i);
      sum[0] = fma(low, splat(static_cast<C>(t->low)), sum[0]);
      sum[kOut - 1] = fma(high, splat(static_cast<C>(t->high)), sum[kOut - 1]);
    }
    for (int b = 0; b < kOut; ++b) store(out[b] + i, sum[b]);
  }
  for (; i < n; ++i) {
    C sum[kOut] = {};
    for (const DwtTap* t = tap; t < end; ++t) {
      const C low = load_one(a + t->source * a_stride + i);
      const C high = load_one(d + t->source * d_stride + i);
      sum[0] = fma(low, static_cast<C>(t->low), sum[0]);
      sum[kOut - 1] = fma(high, static_cast<C>(t->high), sum[kOut - 1]);
    }
    for (int b = 0; b < kOut; ++b) store_one(out[b] + i, sum[b]);
  }
}

// Even and odd pixels of a row; may touch a vector past the end of each.
template <class C>
DIFFAD_SIMD void part(const C* row, int64_t pixels, int64_t lanes, C* even, C* odd) {
  if (lanes == 1) {
    for (int64_t i = 0; i < pixels; i += 2 * kLanes<C>) {
      Vec<C> a, b;
      deinterleave(load(row + i), load(row + i + kLanes<C>), a, b);
      store(even + i / 2, a);
      store(odd + i / 2, b);
    }
    return;
  }
  for (int64_t i = 0; i < pixels; ++i) {
    C* const to = (i % 2 ? odd : even) + i / 2 * lanes;
    for (int64_t c = 0; c < lanes; ++c) to[c] = row[i * lanes + c];
  }
}

// And back, for an even number of pixels.
template <class C, class T>
DIFFAD_SIMD void join(const C* even, const C* odd, int64_t pixels, int64_t lanes, T* row) {
  if (lanes == 1) {
    int64_t i = 0;
    for (; i + 2 * kLanes<C> <= pixels; i += 2 * kLanes<C>) {
      Vec<C> a, b;
      interleave(load(even + i / 2), load(odd + i / 2), a, b);
      store(row + i, a);
      store(row + i + kLanes<C>, b);
    }
    for (; i < pixels; i += 2) {
      store_one(row + i, even[i / 2]);
      store_one(row + i + 1, odd[i / 2]);
    }
    return;
  }
  for (int64_t i = 0; i < pixels; ++i) {
    const C* const from = (i % 2 ? odd : even) + i / 2 * lanes;
    int64_t c = 0;
    for (; c + kLanes<C> <= lanes; c += kLanes<C>) store(row + i * lanes + c, load(from + c));
    for (; c < lanes; ++c) store_one(row + i * lanes + c, from[c]);
  }
}

// The taps of result `i` if it is at a border.
DIFFAD_SIMD bool at_border(const DwtAxis& axis, int64_t i, const DwtTap*& tap, const DwtTap*& end) {
  if (axis.inner_begin <= i && i < axis.inner_end) return false;
  const int64_t row = i < axis.inner_begin ? i : i - (axis.inner_end - axis.inner_begin);
  tap = axis.taps + axis.starts[row];
  end = axis.taps + axis.starts[row + 1];
  return true;
}

// Calls f(i, taps, their end) for every result at a border.
template <class F>
DIFFAD_SIMD void for_borders(const DwtAxis& axis, int64_t count, F f) {
  const DwtTap *tap, *end;
  for (int64_t i = 0; i < count; ++i) {
    if (i == axis.inner_begin) i = axis.inner_end;
    if (i < count && at_border(axis, i, tap, end)) f(i, tap, end);
  }
}

template <class T>
DIFFAD_SIMD T* row_of(const DwtPlane& plane, int64_t n, int64_t c, int64_t y) {
  return static_cast<T*>(plane.data) + n * plane.n + c * plane.c + y * plane.y;
}

template <class T, int kTaps>
void analysis(const DwtArgs& a, compute_t<T>* scratch, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t lanes = a.lanes, width = a.width * lanes;
  C* const rows[2] = {scratch, scratch + width + 64};
  C* const even = rows[1] + width + 64;
  C* const odd = even + (a.width + 1) / 2 * lanes + 64;
  const int taps = a.length;
  const auto w = static_cast<C(*)[2]>(__builtin_alloca(taps * sizeof(C[2])));
  const auto p = static_cast<const T**>(__builtin_alloca(taps * sizeof(T*)));
  const auto q = static_cast<const C**>(__builtin_alloca(taps * sizeof(C*)));
  const int64_t inner = a.x.inner_begin * lanes;
  for (int j = 0; j < taps; ++j) {
    w[j][0] = static_cast<C>(a.low[j]);
    w[j][1] = static_cast<C>(a.high[j]);
    const int64_t distance = a.shift - j;
    q[j] = (distance & 1 ? odd : even) + (distance >> 1) * lanes + inner;
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t o = r % a.rows, c = r / a.rows % a.channels, n = r / a.rows / a.channels;
    const T* const image = row_of<T>(a.image, n, c, 0);
    const DwtTap *tap, *last;
    if (at_border(a.y, o, tap, last)) {
      sum_border<2>(image, a.image.y, image, a.image.y, tap, last, rows, width);
    } else {
      for (int j = 0; j < taps; ++j) p[j] = image + (2 * o + a.shift - j) * a.image.y;
      sum_taps<2, kTaps>(p, w, taps, rows, width);
    }
    for (int high = 0; high < 2; ++high) {  // along y
      T* const low_x = row_of<T>(a.bands[high], n, c, o);
      T* const high_x = row_of<T>(a.bands[2 + high], n, c, o);
      const C* const row = rows[high];
      part(row, a.width, lanes, even, odd);
      T* const out[2] = {low_x + inner, high_x + inner};
      sum_taps<2, kTaps>(q, w, taps, out, (a.x.inner_end - a.x.inner_begin) * lanes);
      for_borders(a.x, a.cols, [&](int64_t x, const DwtTap* tap, const DwtTap* last) {
        T* const out[2] = {low_x + x * lanes, high_x + x * lanes};
        sum_border<2>(row, lanes, row, lanes, tap, last, out, lanes);
      });
    }
  }
}

// Sample i takes from coefficient o the tap 2 o + shift - i: every second tap, from its own parity
// on, of both bands.
template <class T, int kTaps>
void synthesis(const DwtArgs& a, compute_t<T>* scratch, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t lanes = a.lanes, width = a.cols * lanes;
  C* const low_x = scratch;
  C* const high_x = low_x + width + 64;
  C* const phase[2] = {high_x + width + 64, high_x + width + 64 + (a.width + 1) / 2 * lanes + 64};
  const int most = a.length + 1;
  C(*w[2])[2];
  const C** q[2];
  int taps[2];  // by the parity of the first tap
  const int64_t inner = a.x.inner_begin;  // even
  for (int first = 0; first < 2; ++first) {
    w[first] = static_cast<C(*)[2]>(__builtin_alloca(most * sizeof(C[2])));
    q[first] = static_cast<const C**>(__builtin_alloca(most * sizeof(C*)));
    int k = 0;
    for (int j = first; j < a.length; j += 2, k += 2) {
      w[first][k][0] = static_cast<C>(a.low[j]);
      w[first][k + 1][0] = static_cast<C>(a.high[j]);
      // Of the even or the odd pixels, whichever begins with this tap.
      const int64_t pixel = (a.shift - first) & 1;
      const int64_t at = ((pixel - a.shift + j) / 2 + inner / 2) * lanes;
      q[first][k] = low_x + at;
      q[first][k + 1] = high_x + at;
    }
    taps[first] = k;
  }
  const auto p = static_cast<const T**>(__builtin_alloca(most * sizeof(T*)));
  for (int64_t r = begin; r < end; ++r) {
    const int64_t i = r % a.height, c = r / a.height % a.channels, n = r / a.height / a.channels;
    T* const image = row_of<T>(a.image, n, c, i);
    for (int high = 0; high < 2; ++high) {  // along x
      const DwtPlane &ap = a.bands[2 * high], &dp = a.bands[2 * high + 1];
      C* const out[1] = {high ? high_x : low_x};
      const DwtTap *tap, *last;
      if (at_border(a.y, i, tap, last)) {
        sum_border<1>(row_of<T>(ap, n, c, 0), ap.y, row_of<T>(dp, n, c, 0), dp.y, tap, last, out,
                      width);
      } else {
        const int first = (a.shift - i) & 1;
        const int64_t o = (i - a.shift + first) / 2;
        for (int k = 0; k < taps[first]; k += 2) {
          p[k] = row_of<T>(ap, n, c, o + k / 2);
          p[k + 1] = row_of<T>(dp, n, c, o + k / 2);
        }
        sum_taps<1, kTaps>(p, w[first], taps[first], out, width);
      }
    }
    const int64_t pixels = a.x.inner_end - inner;
    for (int pixel = 0; pixel < 2; ++pixel) {
      const int first = (a.shift - pixel) & 1;
      C* const out[1] = {phase[pixel]};
      sum_taps<1, kTaps>(q[first], w[first], taps[first], out, pixels / 2 * lanes);
    }
    join(phase[0], phase[1], pixels, lanes, image + inner * lanes);
    for_borders(a.x, a.width, [&](int64_t x, const DwtTap* tap, const DwtTap* last) {
      T* const out[1] = {image + x * lanes};
      sum_border<1>(low_x, lanes, high_x, lanes, tap, last, out, lanes);
    });
  }
}

// Calls f with the number of taps as a constant, 0 for all that are not unrolled.
template <class F>
DIFFAD_SIMD void for_length(int length, F f) {
  switch (length) {
    case 2: return f(std::integral_constant<int, 2>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 8: return f(std::integral_constant<int, 8>{});
    default: return f(std::integral_constant<int, 0>{});
  }
}

}  // namespace

void dwt_analysis(const DwtArgs& args, void* scratch, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_length(args.length, [&](auto taps) {
      analysis<T, taps.value>(args, static_cast<compute_t<T>*>(scratch), begin, end);
    });
  });
}

void dwt_synthesis(const DwtArgs& args, void* scratch, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_length(args.length, [&](auto taps) {
      synthesis<T, taps.value>(args, static_cast<compute_t<T>*>(scratch), begin, end);
    });
  });
}

}  // namespace diffad::DIFFAD_ISA
