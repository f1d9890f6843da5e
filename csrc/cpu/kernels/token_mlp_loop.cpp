// token_mlp_loop: a tile of tokens goes through all layers of all steps without leaving the cache.
//
// The lanes of a vector are tokens. A tile is held as panels of 2 kLanes tokens, feature after
// feature: element (feature, token) of a panel is panel[feature * 2 kLanes + token]. A product
// out = W in reads the weights where they lie, (outputs, inputs) row by row, a number at a time
// that is broadcast, and the panel's features as vectors: nothing is packed. LayerNorm and the
// statistics are sums over features, hence without sums across lanes. Each output is one chain of
// fma over the inputs in their order, whatever block of outputs or group of tokens it is computed
// in: a token's result depends neither on its place in x nor on the other tokens.
//
// The block of outputs is chosen by the registers: R outputs times V vectors of tokens need R V
// accumulators, V vectors of inputs and one broadcast weight. 12 accumulators are enough to keep
// two multiply-add units of latency 4 busy.
#include "token_mlp_loop.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

constexpr double kEps = 1e-5;  // of LayerNorm

#if defined(__AVX512F__)
constexpr int kPairRows = 12;  // 24 of 32 registers
#else
constexpr int kPairRows = 6;  // 12 of 16
#endif
constexpr int kSingleRows = 8;

// What happens to an output after its bias was added.
enum class After { kNothing, kSilu, kAddToOutput };

template <class C>
DIFFAD_SIMD Vec<C> silu(Vec<C> x) {
  return x / (splat(C(1)) + exp(-x));
}

// Rounds n numbers, whole vectors, to the dtype of the weights.
template <class C>
void round_to(DType dtype, C* p, int64_t n) {
  if constexpr (sizeof(C) == 4) {
    for_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (sizeof(T) == 2) {
        for (int64_t i = 0; i < n; i += kLanes<C>) {
          T narrow[kLanes<C>];
          store(narrow, load(p + i));
          store(p + i, load(narrow));
        }
      }
    });
  } else {
    for_dtype(dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t i = 0; sizeof(T) < sizeof(C) && i < n; ++i) {
        T narrow;
        store_one(&narrow, static_cast<compute_t<T>>(p[i]));
        p[i] = load_one(&narrow);
      }
    });
  }
}

// R outputs of V vectors of tokens: out[r] = sum over k of w[r][k] in[k] + bias[r].
template <class C, int R, int V>
void outputs(const C* w, int64_t inputs, const C* in, const C* bias, After after, C* out) {
  constexpr int L = kLanes<C>;
  Vec<C> sum[R][V] = {};
  for (int64_t k = 0; k < inputs; ++k) {
    Vec<C> x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) x[v] = load(in + (k * V + v) * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<C> weight = splat(w[r * inputs + k]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = fma(weight, x[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      C* o = out + (r * V + v) * L;
      Vec<C> y = sum[r][v] + splat(bias[r]);
      if (after == After::kAddToOutput) y += load(o);
      store(o, y);
    }
  }
  if (after == After::kSilu) {
    for (int i = 0; i < R * V * L; i += L) store(out + i, silu<C>(load(out + i)));
  }
}

// `rows` <= R outputs.
template <class C, int R, int V>
DIFFAD_SIMD void up_to(int rows, const C* w, int64_t inputs, const C* in, const C* bias,
                       After after, C* out) {
  if constexpr (R > 1) {
    if (rows < R) return up_to<C, R - 1, V>(rows, w, inputs, in, bias, after, out);
  }
  outputs<C, R, V>(w, inputs, in, bias, after, out);
}

// A group of tokens in memory: panels of two vectors, the last one of one vector where that is
// enough. The panels of an array of `features` follow each other.
template <class C>
struct Tile {
  static constexpr int L = kLanes<C>;
  int64_t tokens;
  int64_t panels;
  int last;  // vectors of the last panel

  explicit Tile(int64_t count) : tokens(count), panels((count + 2 * L - 1) / (2 * L)) {
    last = count - (panels - 1) * 2 * L <= L ? 1 : 2;
  }
  int vectors(int64_t panel) const { return panel + 1 < panels ? 2 : last; }
  // All numbers of an array.
  int64_t numbers(int64_t features) const { return (2 * (panels - 1) + last) * L * features; }

  // out = after(w in + bias), w (outputs, inputs).
  void linear(const C* w, int64_t out_features, int64_t in_features, const C* in, const C* bias,
              After after, C* out) const {
    const int64_t most = panels == 1 && last == 1 ? kSingleRows : kPairRows;
    // Blocks of equal size, give or take one: a short last one would leave units without work.
    const int64_t blocks = (out_features + most - 1) / most;
    int64_t begin = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t end = (block + 1) * out_features / blocks;
      const int rows = static_cast<int>(end - begin);
      for (int64_t p = 0; p < panels; ++p) {
        const C* panel = in + p * 2 * L * in_features;
        C* result = out + p * 2 * L * out_features + begin * vectors(p) * L;
        if (vectors(p) == 2) {
          up_to<C, kPairRows, 2>(rows, w + begin * in_features, in_features, panel, bias + begin,
                                 after, result);
        } else {
          up_to<C, kSingleRows, 1>(rows, w + begin * in_features, in_features, panel, bias + begin,
                                   after, result);
        }
      }
      begin = end;
    }
  }

  // out = (h - mean) / sqrt(variance + eps) over the features of each token, then SiLU if asked.
  void layer_norm(const C* h, int64_t features, bool with_silu, C* out) const {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t stride = vectors(p) * L;
      for (int v = 0; v < vectors(p); ++v) {
        const int64_t offset = p * 2 * L * features + v * L;
        const C* column = h + offset;
        const C count = static_cast<C>(features);
        const Vec<C> mean = sum_over(features, [&](int64_t f) { return load(column + f * stride); })
                            / count;
        const Vec<C> squares = sum_over(features, [&](int64_t f) {
          const Vec<C> centred = load(column + f * stride) - mean;
          return centred * centred;
        });
        const Vec<C> scale = splat(C(1)) / sqrt(squares / count + splat(C(kEps)));
        for (int64_t f = 0; f < features; ++f) {
          const Vec<C> y = (load(column + f * stride) - mean) * scale;
          store(out + offset + f * stride, with_silu ? silu<C>(y) : y);
        }
      }
    }
  }

  // Four chains, so that additions need not wait for each other.
  template <class F>
  static DIFFAD_SIMD Vec<C> sum_over(int64_t features, F&& term) {
    Vec<C> sum[4] = {};
    int64_t f = 0;
    for (; f + 4 <= features; f += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] += term(f + i);
    }
    for (; f < features; ++f) sum[0] += term(f);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // The place of feature 0 of a token in an array, and the distance to its next feature.
  int64_t place(int64_t token, int64_t features) const {
    return token / (2 * L) * (2 * L) * features + token % (2 * L);
  }
  int64_t stride(int64_t token) const { return vectors(token / (2 * L)) * L; }

  // Tokens to panels and back. Lanes without a token are 0.
  template <class T>
  void read(const T* x, int64_t x_stride, int64_t features, C* panel) const {
    std::memset(panel, 0, numbers(features) * sizeof(C));
    for (int64_t t = 0; t < tokens; ++t) {
      C* column = panel + place(t, features);
      for (int64_t f = 0; f < features; f += L) {
        C values[L];
        const int64_t n = features - f < L ? features - f : L;
        const T* from = x + t * x_stride + f;
        store(values, n == L ? load(from) : load_partial(from, n));
        for (int64_t i = 0; i < n; ++i) column[(f + i) * stride(t)] = values[i];
      }
    }
  }
  template <class T>
  void write(const C* panel, int64_t features, T* x) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const C* column = panel + place(t, features);
      for (int64_t f = 0; f < features; f += L) {
        C values[L] = {};
        const int64_t n = features - f < L ? features - f : L;
        for (int64_t i = 0; i < n; ++i) values[i] = column[(f + i) * stride(t)];
        T* to = x + t * features + f;
        n == L ? store(to, load(values)) : store_partial(to, load(values), n);
      }
    }
  }
};

template <class C>
void run_tile(const TokenMlpArgs& a, int64_t first, C* scratch) {
  constexpr int L = kLanes<C>;
  const int64_t left = a.tokens - first;
  const Tile<C> tile(left < kTokenTile ? left : kTokenTile);
  const int64_t size = a.size, width = a.width;
  const int64_t widest = size > width ? size : width;
  C* x = scratch;
  C* h = x + tile.numbers(size);
  C* in = h + tile.numbers(width);    // what goes into a product
  C* out = in + tile.numbers(widest);  // what comes out of it, where that is not h

  const auto of = [](const void* p) { return static_cast<const C*>(p); };
  const auto to_weights = [&](C* p, int64_t features) {
    round_to(a.weight_dtype, p, tile.numbers(features));
  };
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(compute_t<T>) == sizeof(C)) {
      tile.read(static_cast<const T*>(a.x) + first * a.x_stride, a.x_stride, size, x);
    }
  });
  for (int64_t step = 0; step < a.steps; ++step) {
    const C* row = of(a.table) + step * 5;
    const Vec<C> c_in = splat(row[0]);
    for (int64_t i = 0; i < tile.numbers(size); i += L) store(in + i, c_in * load(x + i));
    to_weights(in, size);
    tile.linear(of(a.w_in), width, size, in, of(a.b_in), After::kNothing, h);
    for (int64_t block = 0; block < a.blocks; ++block) {
      const C* bias = of(a.step_bias) + (step * a.blocks + block) * width;
      const int64_t matrix = block * width * width;
      tile.layer_norm(h, width, false, in);
      to_weights(in, width);
      tile.linear(of(a.w1) + matrix, width, width, in, bias, After::kSilu, out);
      to_weights(out, width);
      tile.linear(of(a.w2) + matrix, width, width, out, of(a.b2) + block * width,
                  After::kAddToOutput, h);
    }
    tile.layer_norm(h, width, true, in);
    to_weights(in, width);
    tile.linear(of(a.w_out), size, width, in, of(a.b_out), After::kNothing, out);

    const Vec<C> a_x = splat(row[1]), a_m = splat(row[2]), p = splat(row[3]), q = splat(row[4]);
    for (int64_t panel = 0; panel < tile.panels; ++panel) {
      for (int v = 0; v < tile.vectors(panel); ++v) {
        const int64_t offset = panel * 2 * L * size + v * L, stride = tile.vectors(panel) * L;
        const Vec<C> squares = Tile<C>::sum_over(size, [&](int64_t f) {
          C* state = x + offset + f * stride;
          const Vec<C> now = load(state), m = load(out + offset + f * stride);
          store(state, a_x * now + a_m * m);
          const Vec<C> residual = p * now + q * m;
          return residual * residual;
        });
        const Vec<C> mean = squares / static_cast<C>(size);
        const int64_t token = (2 * panel + v) * L;
        for (int64_t i = 0; i < L && token + i < tile.tokens; ++i) {
          static_cast<C*>(a.stats)[(first + token + i) * a.steps + step] = mean[i];
        }
      }
    }
  }
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(compute_t<T>) == sizeof(C)) {
      tile.write(x, size, static_cast<T*>(a.x_end) + first * size);
    }
  });
}

}  // namespace

void token_mlp_loop(const TokenMlpArgs& args, void* scratch, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    if (args.dtype == DType::kDouble) {
      run_tile(args, tile * kTokenTile, static_cast<double*>(scratch));
    } else {
      run_tile(args, tile * kTokenTile, static_cast<float*>(scratch));
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
