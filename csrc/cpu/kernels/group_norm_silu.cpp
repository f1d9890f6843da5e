// y = silu(z), z = gamma xhat + beta, xhat = (x - mean) r, r = 1 / sqrt(variance + eps),
// with gamma = weight (1 + scale) and beta = bias (1 + scale) + shift for each sample and channel.
//
// Forward. Each tile yields the mean and the sum of squared deviations from it (M2) of every
// channel, in two passes over what then lies in the first-level cache. norm_fold merges them,
//   mean = sum n_i mean_i / n,   M2 = sum (M2_i + n_i (mean_i - mean)^2)      (Chan et al. 1979),
// first over the tiles of a channel, then over the channels of a group, and leaves z = a x + b for
// norm_apply. E[x^2] - E[x]^2 is never formed.
//
// Backward. With dz = dy silu'(z) and, over the pixels, S1 = sum dz, S2 = sum dz xhat:
//   dshift = S1                        dscale = weight S2 + bias S1
//   dbias = sum_n (1 + scale) S1       dweight = sum_n (1 + scale) S2
//   dx = r (gamma dz - mean_D(gamma dz) - xhat mean_D(gamma dz xhat))     D: the D values of a group
//      = a dz + q x + p,  q = -r^2 B / D,  p = -r A / D - q mean,  A = sum_c gamma S1, B likewise.
// silu'(z) is computed again in the second pass: that is cheaper than a round trip to memory.
//
// Tiles and the order of every sum depend on shapes alone.
#include "group_norm_silu.h"

#include "simd.h"

#define INLINE __attribute__((always_inline))  // for lambdas

namespace diffad::DIFFAD_ISA {
namespace {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<vectors>, first channel, channels of the last vector) for blocks of channels
// that cover all of them. The last block reaches back into the one before rather than being
// partial, so some channels are computed twice, with the same result.
template <int kVectors, class Acc, class F>
DIFFAD_SIMD void for_blocks(int64_t channels, F&& f) {
  constexpr int64_t lanes = kLanes<Acc>;
  int64_t c = 0;
  if constexpr (kVectors >= 4) {
    for (; c + 4 * lanes <= channels; c += 4 * lanes) f(Constant<4>{}, c, lanes);
  }
  if constexpr (kVectors >= 2) {
    for (; c + 2 * lanes <= channels; c += 2 * lanes) f(Constant<2>{}, c, lanes);
  }
  for (; c + lanes <= channels; c += lanes) f(Constant<1>{}, c, lanes);
  if (c == channels) return;
  if (channels >= lanes) {
    f(Constant<1>{}, channels - lanes, lanes);
  } else {
    f(Constant<1>{}, int64_t{0}, channels);
  }
}

template <class T>
DIFFAD_SIMD Vec<compute_t<T>> load_some(const T* p, int64_t n) {
  return n == kLanes<compute_t<T>> ? load(p) : load_partial(p, n);
}
template <class T>
DIFFAD_SIMD void store_some(T* p, Vec<compute_t<T>> v, int64_t n) {
  if (n == kLanes<compute_t<T>>) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

// The lanes from n on set to 0.
template <class V>
DIFFAD_SIMD V first_lanes(V v, int64_t n) {
  for (int64_t i = n; i < static_cast<int64_t>(sizeof(V) / sizeof(v[0])); ++i) v[i] = 0;
  return v;
}

struct Item {
  int64_t sample, channel, first, count, tile;
};

// Calls f(item) for the items [begin, end); `channel` is 0 where channels_last.
template <class F>
DIFFAD_SIMD void for_items(const NormArgs& a, int64_t begin, int64_t end, F&& f) {
  const int64_t items = a.items();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t tile = i % items % a.tiles, first = tile * a.tile;
    f(Item{i / items, i % items / a.tiles, first, min(a.tile, a.pixels - first), tile});
  }
}

template <class T>
DIFFAD_SIMD T* at(const NormTensor& x, const Item& item) {
  return static_cast<T*>(x.data) + item.sample * x.sample + item.channel * x.channel +
         item.first * x.pixel;
}

template <class Acc>
DIFFAD_SIMD Acc* partial_of(const NormArgs& a, const Item& item, int64_t which) {
  const int64_t row = (item.sample * a.tiles + item.tile) * 2 + which;
  return static_cast<Acc*>(a.partial) + row * a.channels + item.channel;
}

template <class Acc, int kRows>
DIFFAD_SIMD Acc* coefficients_of(const NormArgs& a, int64_t sample) {
  return static_cast<Acc*>(a.coefficients) + sample * kRows * a.channels;
}

// ------------------------------------------------------------------- forward

// Mean and M2 of V vectors of channels over the pixels of a tile.
template <int V, class T, class Acc>
DIFFAD_SIMD void channel_moments(const T* x, int64_t pitch, int64_t pixels, int64_t n, Acc* mean,
                                 Acc* m2) {
  constexpr int64_t lanes = kLanes<Acc>;
  constexpr int kUnroll = 8 / V;  // enough independent sums to hide the latency of an addition
  Vec<Acc> sum[kUnroll][V] = {}, squares[kUnroll][V] = {}, center[V];
  int64_t p = 0;
  for (; p + kUnroll <= pixels; p += kUnroll) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[u][v] += load_some(x + (p + u) * pitch + v * lanes, n);
    }
  }
  for (; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[0][v] += load_some(x + p * pitch + v * lanes, n);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int u = 1; u < kUnroll; ++u) sum[0][v] += sum[u][v];
    center[v] = sum[0][v] * (Acc(1) / static_cast<Acc>(pixels));
  }
  for (p = 0; p + kUnroll <= pixels; p += kUnroll) {
#pragma GCC unroll 8
    for (int u = 0; u < kUnroll; ++u) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<Acc> d = load_some(x + (p + u) * pitch + v * lanes, n) - center[v];
        squares[u][v] = fma(d, d, squares[u][v]);
      }
    }
  }
  for (; p < pixels; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<Acc> d = load_some(x + p * pitch + v * lanes, n) - center[v];
      squares[0][v] = fma(d, d, squares[0][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int u = 1; u < kUnroll; ++u) squares[0][v] += squares[u][v];
    store_some(mean + v * lanes, center[v], n);
    store_some(m2 + v * lanes, squares[0][v], n);
  }
}

// Sum of f(vector, elements in it) over a row of `count` elements.
template <class Acc, class T, class F>
DIFFAD_SIMD Acc sum_over_row(const T* x, int64_t count, F&& f) {
  constexpr int64_t lanes = kLanes<Acc>;
  Vec<Acc> sum[8] = {};
  int64_t i = 0;
  for (; i + 8 * lanes <= count; i += 8 * lanes) {
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) sum[u] += f(load(x + i + u * lanes));
  }
  for (; i + lanes <= count; i += lanes) sum[0] += f(load(x + i));
  if (i < count) sum[1] += first_lanes(f(load_partial(x + i, count - i)), count - i);
#pragma GCC unroll 8
  for (int u = 1; u < 8; ++u) sum[0] += sum[u];
  return sum_of_lanes(sum[0]);
}

template <class Acc, bool kActivation>
DIFFAD_SIMD Vec<Acc> activate(Vec<Acc> z) {
  return kActivation ? silu(z) : z;
}

// Calls f(T{}, Constant<activation>) for the dtype and the activation of `a`.
template <class F>
DIFFAD_SIMD void for_variant(const NormArgs& a, F&& f) {
  for_dtype(a.dtype, [&](auto zero) INLINE {
    if (a.activation) {
      f(zero, Constant<1>{});
    } else {
      f(zero, Constant<0>{});
    }
  });
}

// f(channel, value) for every channel of the parameter; nothing where it is absent.
template <class F>
DIFFAD_SIMD void for_parameter(const NormParameter& p, int64_t sample, int64_t channels, F&& f) {
  if (!p.data) return;
  for_dtype(p.dtype, [&](auto zero) INLINE {
    using T = decltype(zero);
    const T* row = static_cast<const T*>(p.data) + sample * p.sample;
    for (int64_t c = 0; c < channels; ++c) f(c, load_one(row + c * p.channel));
  });
}

// gamma and beta of a sample.
template <class Acc>
DIFFAD_SIMD void affine(const NormArgs& a, int64_t sample, Acc* gamma, Acc* beta) {
  for (int64_t c = 0; c < a.channels; ++c) gamma[c] = 1, beta[c] = 0;
  for_parameter(a.weight, 0, a.channels, [&](int64_t c, auto w) INLINE { gamma[c] = static_cast<Acc>(w); });
  for_parameter(a.bias, 0, a.channels, [&](int64_t c, auto b) INLINE { beta[c] = static_cast<Acc>(b); });
  for_parameter(a.scale, sample, a.channels, [&](int64_t c, auto s) INLINE {
    gamma[c] *= 1 + static_cast<Acc>(s);
    beta[c] *= 1 + static_cast<Acc>(s);
  });
  for_parameter(a.shift, sample, a.channels,
                [&](int64_t c, auto s) INLINE { beta[c] += static_cast<Acc>(s); });
}

template <class Acc>
DIFFAD_SIMD void fold(const NormArgs& a, int64_t sample) {
  const int64_t channels = a.channels, size = channels / a.groups;
  Acc* first = coefficients_of<Acc, 2>(a, sample);
  Acc* second = first + channels;
  const Acc* partial = partial_of<Acc>(a, Item{sample, 0, 0, 0, 0}, 0);
  const auto count = [&](int64_t t) INLINE { return min(a.tile, a.pixels - t * a.tile); };
  // Mean and M2 of the channels, in the place of the coefficients to come. Means are summed as
  // differences to the first tile's, which are small where that matters.
  for (int64_t c = 0; c < channels; ++c) first[c] = second[c] = 0;
  for (int64_t t = 1; t < a.tiles; ++t) {
    const Acc share = static_cast<Acc>(count(t)) / static_cast<Acc>(a.pixels);
    const Acc* mean = partial + 2 * t * channels;
    for (int64_t c = 0; c < channels; ++c) first[c] += share * (mean[c] - partial[c]);
  }
  for (int64_t c = 0; c < channels; ++c) first[c] += partial[c];
  for (int64_t t = 0; t < a.tiles; ++t) {
    const Acc n = static_cast<Acc>(count(t));
    const Acc* mean = partial + 2 * t * channels;
    const Acc* m2 = mean + channels;
    for (int64_t c = 0; c < channels; ++c) {
      const Acc d = mean[c] - first[c];
      second[c] += m2[c] + n * d * d;
    }
  }
  Acc* stats = static_cast<Acc*>(a.stats) + sample * a.groups * 2;
  for (int64_t g = 0; g < a.groups; ++g) {
    const Acc* mean = first + g * size;
    const Acc* m2 = second + g * size;
    double total = 0;
    for (int64_t c = 0; c < size; ++c) total += mean[c];
    total /= static_cast<double>(size);
    double squares = 0;
    for (int64_t c = 0; c < size; ++c) {
      const double d = mean[c] - total;
      squares += m2[c] + static_cast<double>(a.pixels) * d * d;
    }
    const double variance = squares / (static_cast<double>(size) * static_cast<double>(a.pixels));
    stats[2 * g] = static_cast<Acc>(total);
    stats[2 * g + 1] = static_cast<Acc>(1 / __builtin_sqrt(variance + a.eps));
  }
  affine(a, sample, first, second);
  for (int64_t c = 0; c < channels; ++c) {
    const Acc* group = stats + c / size * 2;
    first[c] *= group[1];
    second[c] = fma(-group[0], first[c], second[c]);
  }
}

// ------------------------------------------------------------------ backward

// dy silu'(z), silu'(z) = s (1 + z (1 - s)) with s = sigmoid(z).
template <class Acc, bool kActivation>
DIFFAD_SIMD Vec<Acc> gradient_of_z(Vec<Acc> dy, Vec<Acc> z) {
  if (!kActivation) return dy;
  const Vec<Acc> limited = max(Vec<Acc>{} - 87, z);  // as in silu
  const Vec<Acc> s = sigmoid(z);
  return dy * s * fma(limited, 1 - s, splat(Acc(1)));
}

// Rows of the backward coefficients of a sample.
enum Row { kA, kB, kMean, kQ, kP, kRows };

template <class Acc>
DIFFAD_SIMD void prepare_gradient(const NormArgs& a, int64_t sample) {
  const int64_t channels = a.channels, size = channels / a.groups;
  Acc* rows = coefficients_of<Acc, kRows>(a, sample);
  const Acc* stats = static_cast<const Acc*>(a.stats) + sample * a.groups * 2;
  affine(a, sample, rows + kA * channels, rows + kB * channels);
  for (int64_t c = 0; c < channels; ++c) {
    const Acc* group = stats + c / size * 2;
    Acc& gamma = rows[kA * channels + c];
    gamma *= group[1];
    rows[kB * channels + c] = fma(-group[0], gamma, rows[kB * channels + c]);
    rows[kMean * channels + c] = group[0];
  }
}

template <class Acc>
DIFFAD_SIMD void fold_gradient(const NormArgs& a, int64_t sample) {
  const int64_t channels = a.channels, size = channels / a.groups;
  Acc* rows = coefficients_of<Acc, kRows>(a, sample);
  const Acc* stats = static_cast<const Acc*>(a.stats) + sample * a.groups * 2;
  // S1 and S2 of the channels gather in the first tile's partial sums, where
  // parameter_gradients finds them.
  Acc* s1 = partial_of<Acc>(a, Item{sample, 0, 0, 0, 0}, 0);
  Acc* s2 = s1 + channels;
  for (int64_t t = 1; t < a.tiles; ++t) {
    const Acc* tile = s1 + 2 * t * channels;
    for (int64_t c = 0; c < 2 * channels; ++c) s1[c] += tile[c];
  }
  const double inverse = 1 / (static_cast<double>(size) * static_cast<double>(a.pixels));
  for (int64_t g = 0; g < a.groups; ++g) {
    const Acc mean = stats[2 * g], r = stats[2 * g + 1];
    double sum1 = 0, sum2 = 0;  // of a dz = r gamma dz, alone and times xhat
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      s2[c] *= r;
      sum1 += static_cast<double>(rows[kA * channels + c]) * s1[c];
      sum2 += static_cast<double>(rows[kA * channels + c]) * s2[c];
    }
    const double q = -r * sum2 * inverse;
    const double p = -sum1 * inverse - q * mean;
    for (int64_t c = g * size; c < (g + 1) * size; ++c) {
      rows[kQ * channels + c] = static_cast<Acc>(q);
      rows[kP * channels + c] = static_cast<Acc>(p);
    }
  }
}

// Sums over samples, in their order.
template <class Acc>
DIFFAD_SIMD void parameter_gradients(const NormArgs& a, int64_t batch) {
  const int64_t channels = a.channels;
  // dweight and dbias gather in rows that nobody needs any more; 1 + scale goes beside them.
  Acc* rows = coefficients_of<Acc, kRows>(a, 0);
  Acc* dweight = rows + kA * channels;
  Acc* dbias = rows + kB * channels;
  Acc* weight = rows + kMean * channels;
  Acc* bias = rows + kQ * channels;
  Acc* scale = rows + kP * channels;
  for (int64_t c = 0; c < channels; ++c) dweight[c] = dbias[c] = bias[c] = 0, weight[c] = 1;
  for_parameter(a.weight, 0, channels, [&](int64_t c, auto w) INLINE { weight[c] = static_cast<Acc>(w); });
  for_parameter(a.bias, 0, channels, [&](int64_t c, auto b) INLINE { bias[c] = static_cast<Acc>(b); });
  const auto write = [&](const NormParameter& to, int64_t sample, auto&& value) INLINE {
    if (!to.data) return;
    for_dtype(to.dtype, [&](auto zero) INLINE {
      using T = decltype(zero);
      T* row = static_cast<T*>(to.data) + sample * to.sample;
      for (int64_t c = 0; c < channels; ++c) {
        store_one(row + c, static_cast<compute_t<T>>(value(c)));
      }
    });
  };
  for (int64_t n = 0; n < batch; ++n) {
    const Acc* s1 = partial_of<Acc>(a, Item{n, 0, 0, 0, 0}, 0);
    const Acc* s2 = s1 + channels;
    for (int64_t c = 0; c < channels; ++c) scale[c] = 1;
    for_parameter(a.scale, n, channels, [&](int64_t c, auto s) INLINE { scale[c] += static_cast<Acc>(s); });
    for (int64_t c = 0; c < channels; ++c) {
      dweight[c] = fma(scale[c], s2[c], dweight[c]);
      dbias[c] = fma(scale[c], s1[c], dbias[c]);
    }
    write(a.dscale, n, [&](int64_t c) INLINE { return fma(weight[c], s2[c], bias[c] * s1[c]); });
    write(a.dshift, n, [&](int64_t c) INLINE { return s1[c]; });
  }
  write(a.dweight, 0, [&](int64_t c) INLINE { return dweight[c]; });
  write(a.dbias, 0, [&](int64_t c) INLINE { return dbias[c]; });
}

template <class F>
DIFFAD_SIMD void for_compute(DType dtype, F&& f) {
  if (dtype == DType::kDouble) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace

void norm_moments(const NormArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) INLINE {
    using T = decltype(zero);
    using Acc = compute_t<T>;
    for_items(a, begin, end, [&](const Item& item) INLINE {
      const T* x = at<const T>(a.x, item);
      Acc* mean = partial_of<Acc>(a, item, 0);
      Acc* m2 = partial_of<Acc>(a, item, 1);
      if (a.channels_last) {
        for_blocks<4, Acc>(a.channels, [&](auto vectors, int64_t c, int64_t n) INLINE {
          channel_moments<decltype(vectors)::value>(x + c, a.x.pixel, item.count, n, mean + c,
                                                    m2 + c);
        });
      } else {
        const auto same = [](Vec<Acc> v) INLINE { return v; };
        *mean = sum_over_row<Acc>(x, item.count, same) / static_cast<Acc>(item.count);
        *m2 = sum_over_row<Acc>(x, item.count, [&](Vec<Acc> v) INLINE {
          const Vec<Acc> d = v - *mean;
          return d * d;
        });
      }
    });
  });
}

void norm_fold(const NormArgs& a, int64_t begin, int64_t end) {
  for_compute(a.dtype, [&](auto zero) INLINE {
    for (int64_t n = begin; n < end; ++n) fold<decltype(zero)>(a, n);
  });
}

void norm_apply(const NormArgs& a, int64_t begin, int64_t end) {
  for_variant(a, [&](auto zero, auto activation) INLINE {
    using T = decltype(zero);
    using Acc = compute_t<T>;
    constexpr bool kActivation = decltype(activation)::value;
    constexpr int64_t lanes = kLanes<Acc>;
    for_items(a, begin, end, [&](const Item& item) INLINE {
      const T* x = at<const T>(a.x, item);
      T* y = at<T>(a.y, item);
      const Acc* scale = coefficients_of<Acc, 2>(a, item.sample) + item.channel;
      const Acc* shift = scale + a.channels;
      if (a.channels_last) {
        for (int64_t p = 0; p < item.count; ++p, x += a.x.pixel, y += a.y.pixel) {
          for_blocks<1, Acc>(a.channels, [&](auto, int64_t c, int64_t n) INLINE {
            const Vec<Acc> z = fma(load_some(scale + c, n), load_some(x + c, n),
                                   load_some(shift + c, n));
            store_some(y + c, activate<Acc, kActivation>(z), n);
          });
        }
      } else {
        for (int64_t i = 0; i < item.count; i += lanes) {
          const int64_t n = min(lanes, item.count - i);
          const Vec<Acc> z = fma(splat(*scale), load_some(x + i, n), splat(*shift));
          store_some(y + i, activate<Acc, kActivation>(z), n);
        }
      }
    });
  });
}

void norm_prepare_gradient(const NormArgs& a, int64_t begin, int64_t end) {
  for_compute(a.dtype, [&](auto zero) INLINE {
    for (int64_t n = begin; n < end; ++n) prepare_gradient<decltype(zero)>(a, n);
  });
}

void norm_gradient_sums(const NormArgs& a, int64_t begin, int64_t end) {
  for_variant(a, [&](auto zero, auto activation) INLINE {
    using T = decltype(zero);
    using Acc = compute_t<T>;
    constexpr bool kActivation = decltype(activation)::value;
    constexpr int64_t lanes = kLanes<Acc>;
    for_items(a, begin, end, [&](const Item& item) INLINE {
      const T* x = at<const T>(a.x, item);
      const T* dy = at<const T>(a.dy, item);
      const Acc* rows = coefficients_of<Acc, kRows>(a, item.sample) + item.channel;
      Acc* s1 = partial_of<Acc>(a, item, 0);
      Acc* s2 = partial_of<Acc>(a, item, 1);
      if (a.channels_last) {
        for_blocks<4, Acc>(a.channels, [&](auto vectors, int64_t c, int64_t n) INLINE {
          constexpr int V = decltype(vectors)::value;
          Vec<Acc> scale[V], shift[V], mean[V], sum1[V] = {}, sum2[V] = {};
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            scale[v] = load_some(rows + kA * a.channels + c + v * lanes, n);
            shift[v] = load_some(rows + kB * a.channels + c + v * lanes, n);
            mean[v] = load_some(rows + kMean * a.channels + c + v * lanes, n);
          }
          for (int64_t p = 0; p < item.count; ++p) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
              const Vec<Acc> value = load_some(x + p * a.x.pixel + c + v * lanes, n);
              const Vec<Acc> grad = load_some(dy + p * a.dy.pixel + c + v * lanes, n);
              const Vec<Acc> dz =
                  gradient_of_z<Acc, kActivation>(grad, fma(scale[v], value, shift[v]));
              sum1[v] += dz;
              sum2[v] = fma(dz, value - mean[v], sum2[v]);
            }
          }
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            store_some(s1 + c + v * lanes, sum1[v], n);
            store_some(s2 + c + v * lanes, sum2[v], n);
          }
        });
      } else {
        Vec<Acc> sum1 = {}, sum2 = {};
        for (int64_t i = 0; i < item.count; i += lanes) {
          const int64_t n = min(lanes, item.count - i);
          const Vec<Acc> value = load_some(x + i, n);
          const Vec<Acc> z = fma(splat(rows[kA * a.channels]), value, splat(rows[kB * a.channels]));
          // Past the end dy is 0, and with it dz.
          const Vec<Acc> dz = gradient_of_z<Acc, kActivation>(load_some(dy + i, n), z);
          sum1 += dz;
          sum2 = fma(dz, value - rows[kMean * a.channels], sum2);
        }
        *s1 = sum_of_lanes(sum1);
        *s2 = sum_of_lanes(sum2);
      }
    });
  });
}

void norm_fold_gradient(const NormArgs& a, int64_t begin, int64_t end) {
  for_compute(a.dtype, [&](auto zero) INLINE {
    for (int64_t n = begin; n < end; ++n) fold_gradient<decltype(zero)>(a, n);
  });
}

void norm_apply_gradient(const NormArgs& a, int64_t begin, int64_t end) {
  for_variant(a, [&](auto zero, auto activation) INLINE {
    using T = decltype(zero);
    using Acc = compute_t<T>;
    constexpr bool kActivation = decltype(activation)::value;
    constexpr int64_t lanes = kLanes<Acc>;
    for_items(a, begin, end, [&](const Item& item) INLINE {
      const T* x = at<const T>(a.x, item);
      const T* dy = at<const T>(a.dy, item);
      T* dx = at<T>(a.dx, item);
      const Acc* rows = coefficients_of<Acc, kRows>(a, item.sample) + item.channel;
      const auto gradient = [&](Vec<Acc> value, Vec<Acc> grad, auto&& row) INLINE {
        const Vec<Acc> z = fma(row(kA), value, row(kB));
        const Vec<Acc> dz = gradient_of_z<Acc, kActivation>(grad, z);
        return fma(row(kA), dz, fma(row(kQ), value, row(kP)));
      };
      if (a.channels_last) {
        for (int64_t p = 0; p < item.count; ++p) {
          for_blocks<1, Acc>(a.channels, [&](auto, int64_t c, int64_t n) INLINE {
            const Vec<Acc> result =
                gradient(load_some(x + p * a.x.pixel + c, n), load_some(dy + p * a.dy.pixel + c, n),
                         [&](Row row) INLINE { return load_some(rows + row * a.channels + c, n); });
            store_some(dx + p * a.dx.pixel + c, result, n);
          });
        }
      } else {
        for (int64_t i = 0; i < item.count; i += lanes) {
          const int64_t n = min(lanes, item.count - i);
          const Vec<Acc> result = gradient(load_some(x + i, n), load_some(dy + i, n),
                                           [&](Row row) INLINE { return splat(rows[row * a.channels]); });
          store_some(dx + i, result, n);
        }
      }
    });
  });
}

void norm_parameter_gradients(const NormArgs& a, int64_t batch) {
  for_compute(a.dtype, [&](auto zero) INLINE {
    parameter_gradients<decltype(zero)>(a, batch);
  });
}

}  // namespace diffad::DIFFAD_ISA
