// The loop of token_mlp_loop over a tile of tokens, and the two layouts of a tile that serve it; a
// token has the same bits in both:
//   Panels  the lanes of a vector are tokens. Weights are read where they lie, (outputs, inputs)
//           row by row, a number at a time that is broadcast: nothing is packed.
//   Single  one token, the lanes are its features. Square blocks of weights are transposed in
//           registers on their way.
// Each output of a product is one chain of fma over the inputs in their order, and each sum over
// features runs in kLanes chains (feature f in chain f mod kLanes) that are then folded in half
// until one is left. So a token's result depends neither on its place in x nor on other tokens.
#pragma once

#include "gemm.h"
#include "token_mlp_loop.h"

namespace diffad::DIFFAD_ISA {
namespace {

constexpr double kEps = 1e-5;  // of LayerNorm

// What happens to an output after its bias was added.
enum class After { kNothing, kSilu, kAddToOutput };

// Rounds n numbers, whole vectors, to the dtype of the weights.
template <class C>
void round_to(DType dtype, C* p, int64_t n) {
  for_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) == 2 && sizeof(C) == 4) {
      for (int64_t i = 0; i < n; i += kLanes<C>) {
        T narrow[kLanes<C>];
        store(narrow, load(p + i));
        store(p + i, load(narrow));
      }
    } else if constexpr (sizeof(T) < sizeof(C)) {
      for (int64_t i = 0; i < n; ++i) {
        T narrow;
        store_one(&narrow, static_cast<compute_t<T>>(p[i]));
        p[i] = load_one(&narrow);
      }
    }
  });
}

// Of the features of a token: their mean, and 1 / sqrt(variance + eps).
template <class C>
struct Moments {
  Vec<C> mean, scale;
};

// The numbers of a step's row of the table.
template <class C>
struct Row {
  C c_in, a, b, p, q;
};

// x <- a x + b m in `x`; returns (p x + q m)^2.
template <class C>
DIFFAD_SIMD Vec<C> update(const Row<C>& row, C* x, const C* m) {
  const Vec<C> now = load(x), y = load(m);
  store(x, splat(row.a) * now + splat(row.b) * y);
  const Vec<C> residual = splat(row.p) * now + splat(row.q) * y;
  return residual * residual;
}

// ---------------------------------------------------------------------- panels

static_assert(kSingleRows >= kPairRows);  // the last panel of several has the blocks of the others

// R outputs of V vectors of tokens: out[r] = sum over k of w[r][k] in[k] + bias[r].
template <class C, int R, int V>
void outputs(const C* w, int64_t inputs, const C* in, const C* bias, After after, C* out) {
  constexpr int L = kLanes<C>;
  Vec<C> sum[R][V] = {};
  multiply_add<C, R, V>(w, inputs, 1, in, L, V * L, inputs, sum);
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
    for (int i = 0; i < R * V * L; i += L) store(out + i, silu(load(out + i)));
  }
}

// Tokens in panels of two vectors, the last one of one vector where that is enough. In a panel,
// element (feature, token) is panel[feature * tokens of the panel + token]; the panels of an array
// follow each other.
template <class C>
struct Panels {
  static constexpr int L = kLanes<C>;
  using Number = C;   // of the state
  using Weight = C;   // of matrices
  using Operand = C;  // of what goes into products
  int64_t tokens;
  int64_t panels;
  int last;  // vectors of the last panel

  explicit Panels(int64_t count) : tokens(count), panels((count + 2 * L - 1) / (2 * L)) {
    last = count - (panels - 1) * 2 * L <= L ? 1 : 2;
  }
  int vectors(int64_t panel) const { return panel + 1 < panels ? 2 : last; }
  // All numbers of an array of so many features.
  int64_t numbers(int64_t features) const { return (2 * (panels - 1) + last) * L * features; }
  // Where an array's panel begins.
  static int64_t begin(int64_t panel, int64_t features) { return panel * 2 * L * features; }

  // out = after(w in + bias), w (outputs, inputs).
  void product(const C* w, int64_t out_features, int64_t in_features, const C* in, const C* bias,
               After after, C* out) const {
    const int64_t most = panels == 1 && last == 1 ? kSingleRows : kPairRows;
    for_even_blocks(out_features, most, [&](int64_t o, int64_t rows) {
      const C* weights = w + o * in_features;
      for (int64_t p = 0; p < panels; ++p) {
        const C* panel = in + begin(p, in_features);
        C* result = out + begin(p, out_features) + o * vectors(p) * L;
        if (vectors(p) == 2) {
          with_rows<kPairRows>(rows, [&](auto r) {
            outputs<C, r, 2>(weights, in_features, panel, bias + o, after, result);
          });
        } else {
          with_rows<kSingleRows>(rows, [&](auto r) {
            outputs<C, r, 1>(weights, in_features, panel, bias + o, after, result);
          });
        }
      }
    });
  }

  void linear(const C* w, int64_t out_features, int64_t in_features, const C* in, const C* bias,
              bool add, C* out, const C*) const {
    product(w, out_features, in_features, in, bias, add ? After::kAddToOutput : After::kNothing,
            out);
  }
  void linear_silu(const C* w, int64_t out_features, int64_t in_features, const C* in,
                   const C* bias, C* out, const C*) const {
    product(w, out_features, in_features, in, bias, After::kSilu, out);
  }
  void scale(C factor, const C* x, int64_t features, C* out) const {
    for (int64_t i = 0; i < numbers(features); i += L) store(out + i, splat(factor) * load(x + i));
  }
  void round(DType dtype, C* array, int64_t features) const {
    round_to(dtype, array, numbers(features));
  }

  // Calls f(offset of feature 0, distance of features) for every vector of tokens.
  template <class F>
  DIFFAD_SIMD void for_vectors(int64_t features, F&& f) const {
    for (int64_t p = 0; p < panels; ++p) {
      for (int v = 0; v < vectors(p); ++v) f(begin(p, features) + v * L, vectors(p) * L);
    }
  }

  template <class F>
  static DIFFAD_SIMD Vec<C> sum_over(int64_t features, F&& term) {
    Vec<C> sum[L] = {};
    int64_t f = 0;
    for (; f + L <= features; f += L) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) sum[i] += term(f + i);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L - 1; ++i) {
      if (f + i < features) sum[i] += term(f + i);
    }
    return folded<L / 2>(sum);
  }
  template <int kHalf>
  static DIFFAD_SIMD Vec<C> folded(Vec<C> (&sum)[L]) {
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) sum[i] += sum[i + kHalf];
    if constexpr (kHalf > 1) return folded<kHalf / 2>(sum);
    return sum[0];
  }

  static DIFFAD_SIMD Moments<C> moments(const C* h, int64_t features, int64_t next) {
    const C count = static_cast<C>(features);
    const Vec<C> mean = sum_over(features, [&](int64_t f) { return load(h + f * next); }) / count;
    const Vec<C> squares = sum_over(features, [&](int64_t f) {
      const Vec<C> centred = load(h + f * next) - mean;
      return centred * centred;
    });
    return {mean, 1 / sqrt(squares / count + splat(C(kEps)))};
  }

  // out = (h - mean) / sqrt(variance + eps) over the features of each token, then SiLU if asked.
  void layer_norm(const C* h, int64_t features, bool with_silu, C* out) const {
    for_vectors(features, [&](int64_t offset, int64_t next) {
      const C* from = h + offset;
      const auto [mean, scale] = moments(from, features, next);
      for (int64_t f = 0; f < features; ++f) {
        const Vec<C> y = (load(from + f * next) - mean) * scale;
        store(out + offset + f * next, with_silu ? silu(y) : y);
      }
    });
  }

  // The step's update of x; stats gets the means, `stride` apart.
  void step(const Row<C>& row, C* x, const C* m, int64_t features, C* stats, int64_t stride) const {
    int64_t token = 0;
    for_vectors(features, [&](int64_t offset, int64_t next) {
      const Vec<C> sum = sum_over(features, [&](int64_t f) {
        return update(row, x + offset + f * next, m + offset + f * next);
      });
      const Vec<C> mean = sum / static_cast<C>(features);
      for (int i = 0; i < L && token < tokens; ++i, ++token) stats[token * stride] = mean[i];
    });
  }

  // Calls f(token, its feature 0, distance of features).
  template <class F>
  DIFFAD_SIMD void for_tokens(C* array, int64_t features, F&& f) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t panel = t / (2 * L);
      f(t, array + begin(panel, features) + t % (2 * L), vectors(panel) * L);
    }
  }

  // Tokens to panels and back. Lanes without a token are 0.
  template <class T>
  void read(const T* x, int64_t x_stride, int64_t features, C* array) const {
    std::memset(array, 0, numbers(features) * sizeof(C));
    for_tokens(array, features, [&](int64_t t, C* column, int64_t next) {
      for (int64_t f = 0; f < features; f += L) {
        const int64_t n = features - f < L ? features - f : L;
        const T* from = x + t * x_stride + f;
        const Vec<C> values = n == L ? load(from) : load_partial(from, n);
        for (int64_t i = 0; i < n; ++i) column[(f + i) * next] = values[i];
      }
    });
  }
  template <class T>
  void write(C* array, int64_t features, T* x) const {
    for_tokens(array, features, [&](int64_t t, const C* column, int64_t next) {
      for (int64_t f = 0; f < features; f += L) {
        const int64_t n = features - f < L ? features - f : L;
        C values[L] = {};
        for (int64_t i = 0; i < n; ++i) values[i] = column[(f + i) * next];
        T* to = x + t * features + f;
        n == L ? store(to, load(values)) : store_partial(to, load(values), n);
      }
    });
  }
};

// ---------------------------------------------------------------------- single

// Transposes a square of kLanes vectors.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define DIFFAD_SHUFFLE
#endif
#endif
#if defined(DIFFAD_SHUFFLE)
// Lane l of a result of `unpack`: groups of G lanes are taken in turn from a and b, from the lower
// or the upper half of each 128 bits (B lanes); those of b count from L.
template <int L, int B, int G, bool kHigh>
constexpr int unpacked(int l) {
  const int group = l % B / G;
  return l / B * B + (kHigh ? B / 2 : 0) + group / 2 * G + l % G + (group % 2 ? L : 0);
}
template <class C, int G, bool kHigh, int... l>
DIFFAD_SIMD Vec<C> unpack(Vec<C> a, Vec<C> b, std::integer_sequence<int, l...>) {
  return __builtin_shufflevector(a, b, unpacked<kLanes<C>, 16 / sizeof(C), G, kHigh>(l)...);
}
// Exchanges blocks of D lanes off the diagonal.
template <class C, int D, int... l>
DIFFAD_SIMD void exchange(Vec<C>& a, Vec<C>& b, std::integer_sequence<int, l...>) {
  constexpr int L = kLanes<C>;
  const Vec<C> first = __builtin_shufflevector(a, b, (l & D ? L + l - D : l)...);
  b = __builtin_shufflevector(a, b, (l & D ? L + l : l + D)...);
  a = first;
}
template <class C, int D>
DIFFAD_SIMD void exchange_all(Vec<C> (&v)[kLanes<C>]) {
  if constexpr (D < kLanes<C>) {
    constexpr std::make_integer_sequence<int, kLanes<C>> lanes;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<C>; ++i) {
      if (!(i & D)) exchange<C, D>(v[i], v[i + D], lanes);
    }
    exchange_all<C, 2 * D>(v);
  }
}
template <class C>
DIFFAD_SIMD void transpose(Vec<C> (&v)[kLanes<C>]) {
  constexpr int L = kLanes<C>;
  constexpr std::make_integer_sequence<int, L> lanes;
  Vec<C> t[L];
#pragma GCC unroll 8
  for (int i = 0; i < L; i += 2) {
    t[i] = unpack<C, 1, false>(v[i], v[i + 1], lanes);
    t[i + 1] = unpack<C, 1, true>(v[i], v[i + 1], lanes);
  }
  if constexpr (sizeof(C) == 4) {
#pragma GCC unroll 4
    for (int i = 0; i < L; i += 4) {
      v[i] = unpack<C, 2, false>(t[i], t[i + 2], lanes);
      v[i + 1] = unpack<C, 2, true>(t[i], t[i + 2], lanes);
      v[i + 2] = unpack<C, 2, false>(t[i + 1], t[i + 3], lanes);
      v[i + 3] = unpack<C, 2, true>(t[i + 1], t[i + 3], lanes);
    }
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < L; ++i) v[i] = t[i];
  }
  exchange_all<C, 16 / sizeof(C)>(v);
}
#else
template <class C>
DIFFAD_SIMD void transpose(Vec<C> (&v)[kLanes<C>]) {
  C square[kLanes<C>][kLanes<C>];
  std::memcpy(square, v, sizeof(square));
  for (int i = 0; i < kLanes<C>; ++i) {
    for (int j = 0; j < kLanes<C>; ++j) v[i][j] = square[j][i];
  }
}
#endif

// One token: an array is its features, then what fills the last vector.
template <class C>
struct Single {
  using Number = C;
  using Weight = C;
  using Operand = C;
  static constexpr int L = kLanes<C>;
  int64_t numbers(int64_t features) const { return (features + L - 1) / L * L; }

  // N vectors of outputs from `o` on, of which the last `out_features` may be short. The weights from
  // `next` on, those of the block after this one, are fetched meanwhile.
  template <int N>
  static void block(const C* w, int64_t o, int64_t out_features, int64_t inputs, const C* in,
                    const C* bias, After after, C* out, const C* next) {
    constexpr int64_t kLine = 64 / sizeof(C);
    // Past the end the last row is taken again: its results go into lanes that nobody reads.
    const auto row = [&](int64_t i) {
      return w + (o + i < out_features ? o + i : out_features - 1) * inputs;
    };
    Vec<C> sum[N] = {};
    int64_t k = 0;
    for (; k + L <= inputs; k += L) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        Vec<C> square[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) square[i] = load(row(n * L + i) + k);
        if (k % kLine == 0) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) __builtin_prefetch(next + (n * L + i) * inputs + k, 0, 2);
        }
        transpose<C>(square);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) sum[n] = fma(square[i], splat(in[k + i]), sum[n]);
      }
    }
    for (; k < inputs; ++k) {
      for (int n = 0; n < N; ++n) {
        C column[L];
        for (int i = 0; i < L; ++i) column[i] = row(n * L + i)[k];
        sum[n] = fma(load(column), splat(in[k]), sum[n]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      C* to = out + o + n * L;
      const int64_t rest = out_features - o - n * L;
      Vec<C> y = sum[n] + (rest < L ? load_partial(bias + o + n * L, rest)
                                    : load(bias + o + n * L));
      if (after == After::kAddToOutput) y += load(to);
      store(to, after == After::kSilu ? silu(y) : y);
    }
  }

  // `next`: the weights of the product after this one.
  void product(const C* w, int64_t out_features, int64_t in_features, const C* in, const C* bias,
               After after, C* out, const C* next) const {
    // Chains of fma that run side by side. With more of them, so many rows are read at once that
    // their lines push each other out of the first-level cache: rows lie powers of two apart.
    constexpr int kBlocks = 2;
    const auto after_rows = [&](int64_t o) { return o < out_features ? w + o * in_features : next; };
    int64_t o = 0;
    for (; o + kBlocks * L <= out_features; o += kBlocks * L) {
      block<kBlocks>(w, o, out_features, in_features, in, bias, after, out,
                     after_rows(o + kBlocks * L));
    }
    for (; o < out_features; o += L) {
      block<1>(w, o, out_features, in_features, in, bias, after, out, after_rows(o + L));
    }
  }

  void linear(const C* w, int64_t out_features, int64_t in_features, const C* in, const C* bias,
              bool add, C* out, const C* next) const {
    product(w, out_features, in_features, in, bias, add ? After::kAddToOutput : After::kNothing,
            out, next);
  }
  void linear_silu(const C* w, int64_t out_features, int64_t in_features, const C* in,
                   const C* bias, C* out, const C* next) const {
    product(w, out_features, in_features, in, bias, After::kSilu, out, next);
  }
  void scale(C factor, const C* x, int64_t features, C* out) const {
    for (int64_t i = 0; i < numbers(features); i += L) store(out + i, splat(factor) * load(x + i));
  }
  void round(DType dtype, C* array, int64_t features) const {
    round_to(dtype, array, numbers(features));
  }

  template <class F>
  static DIFFAD_SIMD C sum_over(int64_t features, F&& term) {
    Vec<C> sum = {};
    int64_t f = 0;
    for (; f + L <= features; f += L) sum += term(f);
    if (f < features) {
      const Vec<C> rest = term(f);
      C lanes[L] = {};
      for (int i = 0; f + i < features; ++i) lanes[i] = rest[i];
      sum += load(lanes);
    }
    return sum_of_lanes(sum);
  }

  static DIFFAD_SIMD Moments<C> moments(const C* h, int64_t features) {
    const C count = static_cast<C>(features);
    const Vec<C> mean = splat(sum_over(features, [&](int64_t f) { return load(h + f); }) / count);
    const C squares = sum_over(features, [&](int64_t f) {
      const Vec<C> centred = load(h + f) - mean;
      return centred * centred;
    });
    return {mean, 1 / sqrt(splat(squares / count) + splat(C(kEps)))};
  }

  void layer_norm(const C* h, int64_t features, bool with_silu, C* out) const {
    const auto [mean, scale] = moments(h, features);
    for (int64_t f = 0; f < features; f += L) {
      const Vec<C> y = (load(h + f) - mean) * scale;
      store(out + f, with_silu ? silu(y) : y);
    }
  }

  void step(const Row<C>& row, C* x, const C* m, int64_t features, C* stats, int64_t) const {
    *stats = sum_over(features, [&](int64_t f) { return update(row, x + f, m + f); }) /
             static_cast<C>(features);
  }

  template <class T>
  void read(const T* x, int64_t, int64_t features, C* array) const {
    for (int64_t f = 0; f < features; f += L) {
      const int64_t n = features - f < L ? features - f : L;
      store(array + f, load_partial(x + f, n));
    }
  }
  template <class T>
  void write(const C* array, int64_t features, T* x) const {
    for (int64_t f = 0; f < features; f += L) {
      const int64_t n = features - f < L ? features - f : L;
      store_partial(x + f, load(array + f), n);
    }
  }
};

// ------------------------------------------------------------------------ loop

// All steps of the tokens of `tile`, which start at token `first`.
template <class Tile>
void run(const TokenMlpArgs& a, const Tile& tile, int64_t first, void* scratch) {
  using C = typename Tile::Number;
  using Operand = typename Tile::Operand;
  const int64_t size = a.size, width = a.width;
  C* x = static_cast<C*>(scratch);
  C* h = x + tile.numbers(size);
  C* next = h + tile.numbers(width);
  C* out = next + tile.numbers(a.row_in > a.row ? a.row_in : a.row);
  Operand* in = reinterpret_cast<Operand*>(next);    // what goes into a product
  Operand* inner = reinterpret_cast<Operand*>(out);  // between the two of a block

  const auto of = [](const void* p) { return static_cast<const C*>(p); };
  const auto matrix = [](const void* p) { return static_cast<const typename Tile::Weight*>(p); };
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(compute_t<T>) == sizeof(C)) {
      tile.read(static_cast<const T*>(a.x) + first * a.x_stride, a.x_stride, size, x);
    }
  });
  for (int64_t step = 0; step < a.steps; ++step) {
    Row<C> row;
    std::memcpy(&row, of(a.table) + step * 5, sizeof(row));
    tile.scale(row.c_in, x, size, in);
    tile.round(a.weight_dtype, in, size);
    tile.linear(matrix(a.w_in), width, a.row_in, in, of(a.b_in), false, h,
                matrix(a.blocks ? a.w1 : a.w_out));
    for (int64_t block = 0; block < a.blocks; ++block) {
      const auto* w1 = matrix(a.w1) + block * a.matrix;
      const auto* w2 = matrix(a.w2) + block * a.matrix;
      tile.layer_norm(h, width, false, in);
      tile.round(a.weight_dtype, in, width);
      tile.linear_silu(w1, width, a.row, in, of(a.step_bias) + (step * a.blocks + block) * width,
                       inner, w2);
      tile.round(a.weight_dtype, inner, width);
      tile.linear(w2, width, a.row, inner, of(a.b2) + block * width, true, h,
                  block + 1 < a.blocks ? w1 + a.matrix : matrix(a.w_out));
    }
    tile.layer_norm(h, width, true, in);
    tile.round(a.weight_dtype, in, width);
    tile.linear(matrix(a.w_out), size, a.row, in, of(a.b_out), false, out, matrix(a.w_in));
    tile.step(row, x, out, size, static_cast<C*>(a.stats) + first * a.steps + step, a.steps);
  }
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(compute_t<T>) == sizeof(C)) {
      tile.write(x, size, static_cast<T*>(a.x_end) + first * size);
    }
  });
}

}  // namespace
}  // namespace diffad::DIFFAD_ISA
