// A row of results at a time: first down the columns, from the rows that its taps name into a
// scratch row that stays in the cache, then along x.
//
// Every pass is a sum of a few shifted sequences times constants, with vectors over neighbours
// whatever the layout. Down the columns these are the rows. Along x an image row is kept as its
// even and its odd pixels, as sequences of pixels of `lanes` channels: coefficient o takes the
// sample 2 o + shift - j from one of them at the distance floor((shift - j) / 2) from o.
//
// Along x there are no borders: analysis extends its row before the filters, synthesis runs the
// filters over the extended row, with zeros around the coefficients, and folds its ends back.
#include "dwt2d.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

// The sums of kVectors vectors, which follow each other from `at` on but for the last, at `last`.
template <int kOut, int kTaps, int kVectors, class T, class Out>
DIFFAD_SIMD void sum_vectors(const T* const* p, const compute_t<T> (*w)[2], int taps,
                             Out* const (&out)[kOut], int64_t at, int64_t last) {
  using C = compute_t<T>;
  const auto place = [&](int u) { return u + 1 < kVectors ? at + u * kLanes<C> : last; };
  Vec<C> sum[kOut][kVectors] = {};
  const int count = kTaps ? kTaps : taps;
#pragma GCC unroll 8
  for (int j = 0; j < count; ++j) {
    DIFFAD_UNROLL
    for (int u = 0; u < kVectors; ++u) {
      const Vec<C> x = load(p[j] + place(u));
      DIFFAD_UNROLL
      for (int b = 0; b < kOut; ++b) sum[b][u] = fma(x, splat(w[j][b]), sum[b][u]);
    }
  }
  DIFFAD_UNROLL
  for (int b = 0; b < kOut; ++b) {
    DIFFAD_UNROLL
    for (int u = 0; u < kVectors; ++u) store(out[b] + place(u), sum[b][u]);
  }
}

// out[b][i] = sum over j of w[j][b] p[j][i] for i in [0, n), in the order of j. The last vector of
// a sequence that does not divide overlaps the one before it: the same sums once more.
template <int kOut, int kTaps, class T, class Out>
DIFFAD_SIMD void sum_taps(const T* const* p, const compute_t<T> (*w)[2], int taps,
                          Out* const (&out)[kOut], int64_t n) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  if (n >= lanes) {
    int64_t i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      sum_vectors<kOut, kTaps, 4>(p, w, taps, out, i, i + 3 * lanes);
    }
    const int64_t left = n - i;
    if (left > 3 * lanes) {
      sum_vectors<kOut, kTaps, 4>(p, w, taps, out, i, n - lanes);
    } else if (left > 2 * lanes) {
      sum_vectors<kOut, kTaps, 3>(p, w, taps, out, i, n - lanes);
    } else if (left > lanes) {
      sum_vectors<kOut, kTaps, 2>(p, w, taps, out, i, n - lanes);
    } else if (left > 0) {
      sum_vectors<kOut, kTaps, 1>(p, w, taps, out, i, n - lanes);
    }
    return;
  }
  if (n == 0) return;
  Vec<C> sum[kOut] = {};
  const int count = kTaps ? kTaps : taps;
  for (int j = 0; j < count; ++j) {
    const Vec<C> x = load_partial(p[j], n);
    DIFFAD_UNROLL
    for (int b = 0; b < kOut; ++b) sum[b] = fma(x, splat(w[j][b]), sum[b]);
  }
  DIFFAD_UNROLL
  for (int b = 0; b < kOut; ++b) store_partial(out[b], sum[b], n);
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

// And back.
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
    for (; i < pixels; ++i) {
      const C* const from = i % 2 ? odd : even;
      store_one(row + i, from[i / 2]);
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

template <class T>
DIFFAD_SIMD T* row_of(const DwtPlane& plane, int64_t n, int64_t c, int64_t y) {
  return static_cast<T*>(plane.data) + n * plane.n + c * plane.c + y * plane.y;
}

// Where a row of pixels has its pixel 0 when at least `before` pixels precede it: their number is
// even, and rows of one channel keep whole vectors before it, so that what is written by vectors
// is read by the same ones.
template <class C>
DIFFAD_SIMD int64_t room(int64_t before, int64_t lanes) {
  const int64_t step = lanes == 1 ? 2 * kLanes<C> : 2;
  return (before + step - 1) / step * step;
}

// Lines of scratch, of pixels of `lanes` channels, with the space of two vectors after each.
template <class C>
struct Lines {
  C* next;
  int64_t lanes;
  DIFFAD_SIMD C* take(int64_t pixels) {
    C* const line = next;
    const int64_t step = kLanes<C>;
    next += (pixels * lanes + 3 * step - 1) / step * step;
    return line;
  }
};

// row[e] = sum of weight row[i] over the images (e, i, weight) of e, which follow each other.
template <class C>
DIFFAD_SIMD void extend(const DwtArgs& a, C* row) {
  int64_t e = 0;  // which is no place of an image
  for (const DwtImage* image = a.images; image < a.images + a.image_count; ++image) {
    const bool first = image->extended != e;
    e = image->extended;
    const C weight = static_cast<C>(image->weight);
    if (a.lanes == 1) {
      row[e] = fma(weight, row[image->sample], first ? C{} : row[e]);
      continue;
    }
    const C* const from = row + image->sample * a.lanes;
    C* const to = row + e * a.lanes;
    for (int64_t c = 0; c < a.lanes; ++c) to[c] = fma(weight, from[c], first ? C{} : to[c]);
  }
}

// The transpose, row[i] += weight row[e], for even and odd pixels that are kept from `first` on.
template <class C>
DIFFAD_SIMD void fold(const DwtArgs& a, C* const (&phase)[2], int64_t first) {
  const auto pixel = [&](int64_t i) {
    return phase[(i - first) & 1] + ((i - first) >> 1) * a.lanes;
  };
  for (const DwtImage* image = a.images; image < a.images + a.image_count; ++image) {
    const C weight = static_cast<C>(image->weight);
    const C* const from = pixel(image->extended);
    C* const to = pixel(image->sample);
    for (int64_t c = 0; c < a.lanes; ++c) to[c] = fma(weight, from[c], to[c]);
  }
}

template <class T, int kTaps>
void analysis(const DwtArgs& a, compute_t<T>* scratch, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t lanes = a.lanes, width = a.width * lanes;
  const int64_t before = room<C>(a.length - 1 - a.shift, lanes);
  const int64_t pixels = before + a.extended_width;
  Lines<C> lines{scratch, lanes};
  C *rows[2], *even[2], *odd[2];
  for (int high = 0; high < 2; ++high) {
    // What the extension leaves out is zero, and stays so.
    C* const line = lines.take(pixels);
    for (int64_t i = 0; i < pixels * lanes; ++i) line[i] = 0;
    rows[high] = line + before * lanes;
    even[high] = lines.take(pixels / 2 + 1);
    odd[high] = lines.take(pixels / 2 + 1);
  }
  const int taps = a.length, most = taps > a.longest ? taps : a.longest;
  const auto w = static_cast<C(*)[2]>(__builtin_alloca(taps * sizeof(C[2])));
  const auto v = static_cast<C(*)[2]>(__builtin_alloca(most * sizeof(C[2])));
  const auto p = static_cast<const T**>(__builtin_alloca(most * sizeof(T*)));
  const C** q[2];  // of the two rows
  for (int high = 0; high < 2; ++high) {
    q[high] = static_cast<const C**>(__builtin_alloca(taps * sizeof(C*)));
    for (int j = 0; j < taps; ++j) {
      const int64_t distance = before + a.shift - j;
      q[high][j] = (distance & 1 ? odd[high] : even[high]) + (distance >> 1) * lanes;
    }
  }
  for (int j = 0; j < taps; ++j) {
    w[j][0] = static_cast<C>(a.low[j]);
    w[j][1] = static_cast<C>(a.high[j]);
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t o = r % a.rows, c = r / a.rows % a.channels, n = r / a.rows / a.channels;
    const T* const image = row_of<T>(a.image, n, c, 0);
    const DwtTap *tap, *last;
    if (at_border(a.y, o, tap, last)) {
      const int count = static_cast<int>(last - tap);
      for (int k = 0; k < count; ++k) {
        p[k] = image + tap[k].source * a.image.y;
        v[k][0] = static_cast<C>(tap[k].low);
        v[k][1] = static_cast<C>(tap[k].high);
      }
      sum_taps<2, 0>(p, v, count, rows, width);
    } else {
      for (int j = 0; j < taps; ++j) p[j] = image + (2 * o + a.shift - j) * a.image.y;
      sum_taps<2, kTaps>(p, w, taps, rows, width);
    }
    // Both rows go through each pass before the next one reads what it wrote.
    for (C* row : rows) extend(a, row);
    for (int high = 0; high < 2; ++high) {
      part(rows[high] - before * lanes, pixels, lanes, even[high], odd[high]);
    }
    for (int high = 0; high < 2; ++high) {  // along y
      T* const out[2] = {row_of<T>(a.bands[high], n, c, o), row_of<T>(a.bands[2 + high], n, c, o)};
      sum_taps<2, kTaps>(q[high], w, taps, out, a.cols * lanes);
    }
  }
}

// Sample i takes from coefficient o the tap 2 o + shift - i: every second tap, from its own parity
// on, of both bands. Two neighbours that begin with i = shift - 1 (mod 2) take from the same
// coefficients, the taps 2 k + 1 and 2 k of o = (i - shift + 1) / 2 + k.
template <class T, int kTaps>
void synthesis(const DwtArgs& a, compute_t<T>* scratch, int64_t begin, int64_t end) {
  using C = compute_t<T>;
  const int64_t lanes = a.lanes, width = a.cols * lanes;
  // Pixels before the row that are wanted, for its images; a pair begins with the first of them.
  const int64_t before = dwt_before_pairs(a) + room<C>(a.image_count ? a.length - 1 : 0, lanes);
  const int64_t pixels = before + (a.image_count ? a.extended_width : a.width);
  const int64_t pairs = (pixels + 1) / 2;
  const int64_t around = room<C>((before + a.length) / 2 + 2, lanes);
  Lines<C> lines{scratch, lanes};
  C *coefficients[2][2], *phase[2];  // by band and row of a pair
  for (int i = 0; i < 2; ++i) {
    for (int high = 0; high < 2; ++high) {
      const int64_t all = around + a.cols + around;
      C* const line = lines.take(all);
      for (int64_t k = 0; k < all * lanes; ++k) line[k] = 0;
      coefficients[high][i] = line + around * lanes;
    }
    phase[i] = lines.take(pairs);
  }
  const int taps = (a.length + 1) / 2 * 2;
  const int most = taps > 2 * a.longest ? taps : 2 * a.longest;
  const auto w = static_cast<C(*)[2]>(__builtin_alloca(taps * sizeof(C[2])));
  const auto v = static_cast<C(*)[2]>(__builtin_alloca(most * sizeof(C[2])));
  const auto p = static_cast<const T**>(__builtin_alloca(most * sizeof(T*)));
  const C** q[2];  // of the rows of a pair
  for (int i = 0; i < 2; ++i) {
    q[i] = static_cast<const C**>(__builtin_alloca(taps * sizeof(C*)));
    for (int k = 0; k < taps; k += 2) {
      const int64_t at = ((1 - before - a.shift) / 2 + k / 2) * lanes;
      q[i][k] = coefficients[0][i] + at;
      q[i][k + 1] = coefficients[1][i] + at;
    }
  }
  for (int k = 0; k < taps; k += 2) {
    const bool both = k + 1 < a.length;
    w[k][0] = both ? static_cast<C>(a.low[k + 1]) : C{};
    w[k][1] = static_cast<C>(a.low[k]);
    w[k + 1][0] = both ? static_cast<C>(a.high[k + 1]) : C{};
    w[k + 1][1] = static_cast<C>(a.high[k]);
  }
  const int64_t down = dwt_row_pairs(a);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t y = r % down * 2 - dwt_before_pairs(a);
    const int64_t c = r / down % a.channels, n = r / down / a.channels;
    for (int high = 0; high < 2; ++high) {  // along x
      const DwtPlane &ap = a.bands[2 * high], &dp = a.bands[2 * high + 1];
      const DwtTap *tap, *last;
      if (a.y.inner_begin <= y && y < a.y.inner_end) {
        const int64_t o = (y - a.shift + 1) / 2;
        for (int k = 0; k < taps; k += 2) {
          p[k] = row_of<T>(ap, n, c, o + k / 2);
          p[k + 1] = row_of<T>(dp, n, c, o + k / 2);
        }
        sum_taps<2, kTaps>(p, w, taps, coefficients[high], width);
        continue;
      }
      for (int i = 0; i < 2; ++i) {
        if (y + i < 0 || y + i >= a.height) continue;
        at_border(a.y, y + i, tap, last);
        int count = 0;
        for (; tap < last; ++tap, count += 2) {
          p[count] = row_of<T>(ap, n, c, tap->source);
          p[count + 1] = row_of<T>(dp, n, c, tap->source);
          v[count][0] = static_cast<C>(tap->low);
          v[count + 1][0] = static_cast<C>(tap->high);
        }
        C* const out[1] = {coefficients[high][i]};
        sum_taps<1, 0>(p, v, count, out, width);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (y + i < 0 || y + i >= a.height) continue;
      sum_taps<2, kTaps>(q[i], w, taps, phase, pairs * lanes);
      fold(a, phase, -before);
      const auto from = [&](int64_t x) {
        return phase[(x + before) & 1] + ((x + before) >> 1) * lanes;
      };
      join(from(0), from(1), a.width, lanes, row_of<T>(a.image, n, c, y + i));
    }
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
