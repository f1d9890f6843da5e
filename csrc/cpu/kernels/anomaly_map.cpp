#include "anomaly_map.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

template <class T>
const T* at(const Samples& s, int64_t n, int64_t c, int64_t y) {
  return static_cast<const T*>(s.data) + n * s.stride[0] + c * s.stride[1] + y * s.stride[2];
}

// ------------------------------------------------------------------- features

// 1 - cosine from <f, g>, <f, f> and <g, g>, lengths limited from below as PyTorch does.
template <class V>
DIFFAD_SIMD V cosine_distance(V fg, V ff, V gg) {
  const V eps = V{} + static_cast<lane_t<V>>(1e-8);
  return 1 - fg / (max(sqrt(ff), eps) * max(sqrt(gg), eps));
}

// The distances of `B` vectors of pixels next to each other, or of n pixels in one vector.
template <int B, bool kPartial, class T>
DIFFAD_SIMD void distances_of_columns(const FeatureScale& s, const T* f, const T* g,
                                      compute_t<T>* out, int64_t n) {
  using A = compute_t<T>;
  Vec<A> fg[B] = {}, ff[B] = {}, gg[B] = {};
  for (int64_t c = 0; c < s.channels; ++c) {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const T* p = f + c * s.f.stride[1] + b * kLanes<A>;
      const T* q = g + c * s.f_hat.stride[1] + b * kLanes<A>;
      const Vec<A> u = kPartial ? load_partial(p, n) : load(p);
      const Vec<A> v = kPartial ? load_partial(q, n) : load(q);
      fg[b] = fma(u, v, fg[b]);
      ff[b] = fma(u, u, ff[b]);
      gg[b] = fma(v, v, gg[b]);
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) {
    const Vec<A> result = cosine_distance(fg[b], ff[b], gg[b]);
    if constexpr (kPartial) {
      store_partial(out + b * kLanes<A>, result, n);
    } else {
      store(out + b * kLanes<A>, result);
    }
  }
}

// One pixel whose channels lie next to each other.
template <class T>
DIFFAD_SIMD compute_t<T> distance_of_channels(const T* f, const T* g, int64_t channels) {
  using A = compute_t<T>;
  Vec<A> fg[2] = {}, ff[2] = {}, gg[2] = {};
  const auto add = [&](int b, Vec<A> u, Vec<A> v) {
    fg[b] = fma(u, v, fg[b]);
    ff[b] = fma(u, u, ff[b]);
    gg[b] = fma(v, v, gg[b]);
  };
  int64_t c = 0;
  for (; c + 2 * kLanes<A> <= channels; c += 2 * kLanes<A>) {
    add(0, load(f + c), load(g + c));
    add(1, load(f + c + kLanes<A>), load(g + c + kLanes<A>));
  }
  for (; c < channels; c += kLanes<A>) {
    const int64_t n = channels - c;
    if (n >= kLanes<A>) {
      add(0, load(f + c), load(g + c));
    } else {
      add(0, load_partial(f + c, n), load_partial(g + c, n));
    }
  }
  return cosine_distance(splat(sum_of_lanes(fg[0] + fg[1])), splat(sum_of_lanes(ff[0] + ff[1])),
                         splat(sum_of_lanes(gg[0] + gg[1])))[0];
}

// Distances of `n` pixels whose columns, or rows too, follow each other evenly.
template <class T>
void distances(const FeatureScale& s, const T* f, const T* g, compute_t<T>* out, int64_t n) {
  constexpr int64_t lanes = kLanes<compute_t<T>>;
  if (s.f.stride[3] == 1 && s.f_hat.stride[3] == 1) {
    int64_t i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      distances_of_columns<4, false>(s, f + i, g + i, out + i, 0);
    }
    for (; i + lanes <= n; i += lanes) {
      distances_of_columns<1, false>(s, f + i, g + i, out + i, 0);
    }
    if (i < n) distances_of_columns<1, true>(s, f + i, g + i, out + i, n - i);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = distance_of_channels(f + i * s.f.stride[3], g + i * s.f_hat.stride[3], s.channels);
    }
  }
}

template <class T>
void feature_rows_of(const FeatureScale& s, compute_t<T>* scratch, int64_t begin, int64_t end) {
  using A = compute_t<T>;
  const int64_t blocks = (s.height + s.block - 1) / s.block;
  const auto* share = static_cast<const A*>(s.share);
  const bool flat = s.f.stride[2] == s.width * s.f.stride[3] &&
                    s.f_hat.stride[2] == s.width * s.f_hat.stride[3];
  A* row = scratch + s.block * s.width;  // one pixel more: the last has itself on its right
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / blocks, y = i % blocks * s.block;
    const int64_t rows = s.height - y < s.block ? s.height - y : s.block;
    const T* f = at<T>(s.f, s.first + n, 0, y);
    const T* g = at<T>(s.f_hat, s.first + n, 0, y);
    if (flat) {
      distances(s, f, g, scratch, rows * s.width);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        distances(s, f + r * s.f.stride[2], g + r * s.f_hat.stride[2], scratch + r * s.width,
                  s.width);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t x = 0; x < s.width; ++x) row[x] = scratch[r * s.width + x];
      row[s.width] = row[s.width - 1];
      A* out = static_cast<A*>(s.rows) + (n * s.height + y + r) * s.pitch;
      for (int64_t x = 0; x < s.map_width; ++x) {
        const A left = row[s.left[x]], right = row[s.left[x] + 1];
        out[x] = fma(share[x], right - left, left);
      }
      for (int64_t x = s.map_width; x < s.pitch; ++x) out[x] = 0;
    }
  }
}

// ------------------------------------------------------------ rows of the map

// a - b of `width` pixels.
template <class T>
void difference_row(const T* a, int64_t step_a, const T* b, int64_t step_b, compute_t<T>* out,
                    int64_t width) {
  using A = compute_t<T>;
  if (step_a == 1 && step_b == 1) {
    int64_t x = 0;
    for (; x + kLanes<A> <= width; x += kLanes<A>) store(out + x, load(a + x) - load(b + x));
    if (x < width) store(out + x, load_partial(a + x, width - x) - load_partial(b + x, width - x));
  } else {
    for (int64_t x = 0; x < width; ++x) {
      out[x] = load_one(a + x * step_a) - load_one(b + x * step_b);
    }
  }
}

// One level of the Haar transform of two rows: the low band, and the sum of the others' sizes.
template <class A>
void haar_row(const A* __restrict top, const A* __restrict bottom, A* __restrict low,
              A* __restrict magnitude, int64_t width) {
  const auto size = [](A v) { return v < 0 ? -v : v; };
  for (int64_t i = 0; i < width; ++i) {
    const A a = top[2 * i], b = top[2 * i + 1], c = bottom[2 * i], d = bottom[2 * i + 1];
    const A sum_left = a + c, sum_right = b + d, left = a - c, right = b - d;
    low[i] = (sum_left + sum_right) * A(0.5);
    magnitude[i] += (size(left + right) + size(sum_left - sum_right) + size(left - right)) * A(0.5);
  }
}

// total += weight (map - mean) / deviation
template <class A>
void add_map(const AnomalyMapArgs& a, int which, int64_t y, const A* map, A factor, A* total) {
  const Statistics& s = a.stats[which];
  const Vec<A> weight = splat(static_cast<A>(a.weight[which]));
  if (!s.data[0]) {
    for (int64_t x = 0; x < a.width; x += kLanes<A>) {
      store(total + x, fma(weight, load(map + x) * factor, load(total + x)));
    }
    return;
  }
  const A* mean = static_cast<const A*>(s.data[0]) + y * s.stride_y[0];
  const A* deviation = static_cast<const A*>(s.data[1]) + y * s.stride_y[1];
  for (int64_t x = 0; x < a.width; x += kLanes<A>) {
    const auto part = [&](const A* p, int64_t stride) {
      if (!stride) return splat(*p);
      return x + kLanes<A> <= a.width ? load(p + x) : load_partial(p + x, a.width - x);
    };
    const Vec<A> z = (load(map + x) * factor - part(mean, s.stride_x[0])) /
                     part(deviation, s.stride_x[1]);
    store(total + x, fma(weight, z, load(total + x)));
  }
}

// Pixels beyond a border, reflected as often as the radius asks.
inline int64_t reflected(int64_t i, int64_t n) {
  i %= 2 * n;
  if (i < 0) i += 2 * n;
  return i < n ? i : 2 * n - 1 - i;
}

// B vectors of the sum over j of kernel[|j|] line(j), line(j) the vector at distance j: pairs at
// equal distance are added first.
template <int B, class A, class Line>
DIFFAD_SIMD void blurred(const A* kernel, int64_t radius, const Line& line, Vec<A> (&sum)[B]) {
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) sum[b] = load(line(0) + b * kLanes<A>) * kernel[0];
  for (int64_t j = 1; j <= radius; ++j) {
    const A *before = line(-j), *after = line(j);
    const Vec<A> weight = splat(kernel[j]);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const Vec<A> pair = load(before + b * kLanes<A>) + load(after + b * kLanes<A>);
      sum[b] = fma(weight, pair, sum[b]);
    }
  }
}

template <class T>
struct Strip {
  using A = compute_t<T>;
  const AnomalyMapArgs& a;
  int64_t rows = int64_t{1} << a.levels;
  A* scratch;
  A* difference = scratch;                // 2 rows
  A* pixel = difference + 2 * a.pitch;    // `rows` rows
  A* pyramid = pixel + rows * a.pitch;    // each level's low band, then its magnitudes
  A* wide = pyramid + 2 * rows * a.pitch; // one row
  A* padded = wide + a.pitch;             // `radius` more on both sides

  // The pitch is kept on every level: 2 (rows / 2 + rows / 4 + ...) rows are below 2 rows.
  A* low(int level) const { return pyramid + (2 * rows - 4 * (rows >> level)) * a.pitch; }
  A* magnitude(int level) const { return low(level) + (rows >> level) * a.pitch; }

  void run(int64_t n, int64_t y0) const {
    sum_residuals(n, y0);
    for (int64_t r = 0; r < rows; ++r) finish_row(n, y0 + r, r);
  }

  // The pixel and the sub-band map to `p` and `b`, from row y0 on.
  void residuals(int64_t n, int64_t y0, A* p, A* b) const {
    sum_residuals(n, y0);
    const A per_channel = A(1) / static_cast<A>(a.channels);
    for (int64_t r = 0; r < rows; ++r) {
      const A* sum = pixel + r * a.pitch;
      for (int64_t x = 0; x < a.width; ++x) p[r * a.width + x] = sum[x] * per_channel;
      if (a.levels) {
        double_row<false>(magnitude(1) + r / 2 * a.pitch, wide, a.width / 2);
      } else {
        for (int64_t x = 0; x < a.width; ++x) wide[x] = 0;
      }
      for (int64_t x = 0; x < a.width; ++x) b[r * a.width + x] = wide[x] * per_channel;
    }
  }

  // Magnitudes, summed over channels: of pixels in `pixel`, of all levels of sub-bands in
  // magnitude(1).
  void sum_residuals(int64_t n, int64_t y0) const {
    const bool with_pixel = a.weight[0] != 0, with_bands = a.levels > 0;
    if (with_pixel) clear(pixel, rows);
    for (int level = 1; level <= a.levels; ++level) clear(magnitude(level), rows >> level);
    for (int64_t c = 0; (with_pixel || with_bands) && c < a.channels; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        A* d = difference + (r & 1) * a.pitch;
        difference_row(at<T>(a.x, n, c, y0 + r), a.x.stride[3], at<T>(a.x_hat, n, c, y0 + r),
                       a.x_hat.stride[3], d, a.width);
        if (with_pixel) add_size(d, pixel + r * a.pitch, a.width);
        if (with_bands && (r & 1)) {
          haar_row(difference, d, low(1) + r / 2 * a.pitch, magnitude(1) + r / 2 * a.pitch,
                   a.width / 2);
        }
      }
      for (int level = 2; level <= a.levels; ++level) {
        for (int64_t r = 0; r < rows >> level; ++r) {
          const A* in = low(level - 1) + 2 * r * a.pitch;
          haar_row(in, in + a.pitch, low(level) + r * a.pitch, magnitude(level) + r * a.pitch,
                   a.width >> level);
        }
      }
      if (with_bands) add_size(low(a.levels), magnitude(a.levels), a.width >> a.levels);
    }
    // From coarse to fine, each level is added to the finer one under it.
    for (int level = a.levels; level > 1; --level) {
      for (int64_t r = 0; r < rows >> (level - 1); ++r) {
        double_row<true>(magnitude(level) + r / 2 * a.pitch, magnitude(level - 1) + r * a.pitch,
                         a.width >> level);
      }
    }
  }

  void clear(A* p, int64_t count) const {
    for (int64_t i = 0; i < count * a.pitch; ++i) p[i] = 0;
  }

  // out += |in|
  static void add_size(const A* __restrict in, A* __restrict out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] += in[i] < 0 ? -in[i] : in[i];
  }

  // Each pixel twice, to `out` or added to it.
  template <bool kAdd>
  static void double_row(const A* __restrict in, A* __restrict out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      out[2 * i] = (kAdd ? out[2 * i] : 0) + in[i];
      out[2 * i + 1] = (kAdd ? out[2 * i + 1] : 0) + in[i];
    }
  }

  void finish_row(int64_t n, int64_t y, int64_t r) const {
    A* total = padded + a.radius;
    const A per_channel = A(1) / static_cast<A>(a.channels);
    const A* base = a.base ? static_cast<const A*>(a.base) + (n * a.height + y) * a.width : nullptr;
    for (int64_t x = 0; x < a.pitch; ++x) total[x] = base && x < a.width ? base[x] : 0;
    if (a.weight[0] != 0) add_map(a, 0, y, pixel + r * a.pitch, per_channel, total);
    if (a.feature_count) {
      for (int64_t x = 0; x < a.pitch; ++x) wide[x] = 0;
      for (int64_t i = 0; i < a.feature_count; ++i) add_feature(a.features[i], n, y);
      add_map(a, 1, y, wide, A(1), total);
    }
    if (a.levels) {
      double_row<false>(magnitude(1) + r / 2 * a.pitch, wide, a.width / 2);
      add_map(a, 2, y, wide, per_channel, total);
    }
    for (int64_t i = 1; i <= a.radius; ++i) {
      total[-i] = total[reflected(-i, a.width)];
    }
    for (int64_t i = 0; i < a.radius; ++i) {
      total[a.width + i] = total[reflected(a.width + i, a.width)];
    }
    A* out = static_cast<A*>(a.rows) + ((n - a.first) * a.height + y) * a.pitch;
    const auto* kernel = static_cast<const A*>(a.kernel);
    int64_t x = 0;
    const auto line = [&](int64_t j) { return total + x + j; };
    for (; x + 4 * kLanes<A> <= a.width; x += 4 * kLanes<A>) {
      Vec<A> sum[4];
      blurred(kernel, a.radius, line, sum);
      for (int b = 0; b < 4; ++b) store(out + x + b * kLanes<A>, sum[b]);
    }
    for (; x < a.width; x += kLanes<A>) {
      Vec<A> sum[1];
      blurred(kernel, a.radius, line, sum);
      store(out + x, sum[0]);
    }
  }

  // The features' rows above and below, mixed.
  void add_feature(const FeatureScale& s, int64_t n, int64_t y) const {
    const int64_t row = s.above[y], next = row + 1 < s.height ? row + 1 : row;
    const A* base = static_cast<const A*>(s.rows) + (n - a.first) * s.height * s.pitch;
    const Vec<A> share = splat(static_cast<const A*>(s.share_y)[y]);
    for (int64_t x = 0; x < a.width; x += kLanes<A>) {
      const Vec<A> top = load(base + row * s.pitch + x), bottom = load(base + next * s.pitch + x);
      store(wide + x, load(wide + x) + fma(share, bottom - top, top));
    }
  }
};

template <class A>
void columns_of(const AnomalyMapArgs& a, int64_t begin, int64_t end) {
  const auto* kernel = static_cast<const A*>(a.kernel);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / a.height, y = i % a.height;
    const A* rows = static_cast<const A*>(a.rows) + n * a.height * a.pitch;
    A* out = static_cast<A*>(a.map) + ((a.first + n) * a.height + y) * a.width;
    int64_t x = 0;
    const auto line = [&](int64_t j) {
      const int64_t row = y + j;
      return rows + (row < 0 || row >= a.height ? reflected(row, a.height) : row) * a.pitch + x;
    };
    for (; x + 4 * kLanes<A> <= a.width; x += 4 * kLanes<A>) {
      Vec<A> sum[4];
      blurred(kernel, a.radius, line, sum);
      for (int b = 0; b < 4; ++b) store(out + x + b * kLanes<A>, sum[b]);
    }
    for (; x < a.width; x += kLanes<A>) {
      Vec<A> sum[1];
      blurred(kernel, a.radius, line, sum);
      if (x + kLanes<A> <= a.width) {
        store(out + x, sum[0]);
      } else {
        store_partial(out + x, sum[0], a.width - x);
      }
    }
  }
}

// ---------------------------------------------------------------------- score

// Bits that have the order of the numbers: those of negative ones inverted, of others the sign
// turned. NaN is above all, as in torch.topk.
template <class A, class K>
DIFFAD_SIMD K key_of(A x) {
  constexpr K sign = K{1} << (8 * sizeof(K) - 1);
  const K raw = bits<K>(x);
  const K key = raw ^ (-(raw >> (8 * sizeof(K) - 1)) | sign);
  return x == x ? key : ~K{0};
}

// Mean of the `top` largest values. Histograms narrow the range of the smallest of them, 11 bits of
// it at a time, down to one value; what is above it is added in the order of the pixels.
template <class A, class K>
A mean_of_largest(const A* x, int64_t n, int64_t top) {
  constexpr int kBits = 11;
  K low = ~K{0}, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    const K key = key_of<A, K>(x[i]);
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  int64_t wanted = top;  // within [low, high]
  while (low < high) {
    int shift = 0;
    while ((high - low) >> shift >> kBits) ++shift;
    uint32_t histogram[1 << kBits] = {};
    for (int64_t i = 0; i < n; ++i) {
      const K offset = key_of<A, K>(x[i]) - low;
      if (offset <= high - low) ++histogram[offset >> shift];
    }
    K bin = (high - low) >> shift;
    while (histogram[bin] < wanted) wanted -= histogram[bin--];
    low += bin << shift;
    const K last = low + ((K{1} << shift) - 1);
    high = last < high ? last : high;
  }
  double sum = 0, smallest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const K key = key_of<A, K>(x[i]);
    if (key > low) sum += static_cast<double>(x[i]);
    if (key == low) smallest = static_cast<double>(x[i]);
  }
  return static_cast<A>((sum + static_cast<double>(wanted) * smallest) / static_cast<double>(top));
}

}  // namespace

void feature_rows(const FeatureScale& scale, void* scratch, int64_t begin, int64_t end) {
  for_dtype(scale.dtype, [&](auto zero) {
    using T = decltype(zero);
    feature_rows_of<T>(scale, static_cast<compute_t<T>*>(scratch), begin, end);
  });
}

void anomaly_rows(const AnomalyMapArgs& a, void* scratch, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Strip<T> strip{a, int64_t{1} << a.levels, static_cast<compute_t<T>*>(scratch)};
    const int64_t strips = a.height / strip.rows;
    for (int64_t i = begin; i < end; ++i) {
      strip.run(a.first + i / strips, i % strips * strip.rows);
    }
  });
}

void residual_rows(const AnomalyMapArgs& a, void* pixel, void* sub_band, void* scratch,
                   int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = compute_t<T>;
    const Strip<T> strip{a, int64_t{1} << a.levels, static_cast<A*>(scratch)};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t strips = a.height / strip.rows;
      const int64_t n = i / strips, y = i % strips * strip.rows;
      const int64_t at = (n * a.height + y) * a.width;
      strip.residuals(n, y, static_cast<A*>(pixel) + at, static_cast<A*>(sub_band) + at);
    }
  });
}

void anomaly_columns(const AnomalyMapArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::kDouble) {
    columns_of<double>(a, begin, end);
  } else {
    columns_of<float>(a, begin, end);
  }
}

void anomaly_scores(const AnomalyMapArgs& a, int64_t begin, int64_t end) {
  const int64_t pixels = a.height * a.width;
  for (int64_t n = begin; n < end; ++n) {
    if (a.dtype == DType::kDouble) {
      static_cast<double*>(a.score)[n] = mean_of_largest<double, uint64_t>(
          static_cast<const double*>(a.map) + n * pixels, pixels, a.top);
    } else {
      static_cast<float*>(a.score)[n] = mean_of_largest<float, uint32_t>(
          static_cast<const float*>(a.map) + n * pixels, pixels, a.top);
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
