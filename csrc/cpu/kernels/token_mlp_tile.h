// The loop of token_mlp_loop over a tile of tokens, and the two layouts of a tile that serve it; a
// token has the same bits in both:
//   Panels  the lanes of a vector are tokens, and weights are broadcast, a number at a time.
//   Tokens  the lanes are features, and weights are read as vectors of outputs: for fewer tokens
//           than a panel has, and in bfloat16, where two inputs go into a product at once.
// Both read matrices (inputs, outputs), where the outputs of an input lie side by side; both know
// the arguments of the call and their first token.
// Each output of a product is one chain over the inputs in their order, and each sum over features
// runs in kLanes chains (feature f in chain f mod kLanes) that are then folded in half until one is
// left. So a token's result depends neither on its place in x nor on other tokens.
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

// The row of the table, of a token or of several.
template <class C>
struct Row {
  Vec<C> c_in, a, b, p, q;
};

// That of `table` for token `first`, or, lane by lane, for it and the next ones.
template <class C>
DIFFAD_SIMD Row<C> row_of(const TokenMlpArgs& a, int64_t step, int64_t first, bool by_lane) {
  constexpr int L = kLanes<C>;
  const C* table = static_cast<const C*>(a.table);
  const auto number = [&](int column) {
    if (a.levels == 1) return splat(table[step * 5 + column]);
    C lanes[L];
    for (int i = 0; i < L; ++i) {
      lanes[i] = table[(first + (by_lane ? i : 0)) % a.levels * 5 + column];
    }
    return load(lanes);
  };
  return {number(0), number(1), number(2), number(3), number(4)};
}

// x <- a x + b m in `x`; returns (p x + q m)^2.
template <class C>
DIFFAD_SIMD Vec<C> update(const Row<C>& row, C* x, const C* m) {
  const Vec<C> now = load(x), y = load(m);
  store(x, row.a * now + row.b * y);
  const Vec<C> residual = row.p * now + row.q * y;
  return residual * residual;
}

// Biases of outputs: of all tokens the same, or each token's own, laid out like the outputs.
template <class C>
struct Biases {
  const C* numbers;
  bool own;
  DIFFAD_SIMD Vec<C> at(int64_t output, int64_t lane, int64_t lanes) const {
    return own ? load(numbers + output * lanes + lane) : splat(numbers[output]);
  }
};

// ---------------------------------------------------------------------- panels

// R outputs of two vectors of tokens, from output `o` on: out[r] = sum over k < inputs of
// w[k * row + r] in[k], plus its bias.
template <class C, int R>
void outputs(const C* w, int64_t row, int64_t inputs, const C* in, const Biases<C>& bias, int64_t o,
             After after, C* out) {
  constexpr int L = kLanes<C>, V = 2;
  Vec<C> sum[R][V] = {};
  multiply_add<C, R, V>(w, 1, row, in, L, V * L, inputs, sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      C* to = out + (r * V + v) * L;
      Vec<C> y = sum[r][v] + bias.at(o + r, v * L, V * L);
      if (after == After::kAddToOutput) y += load(to);
      store(to, y);
    }
  }
  if (after == After::kSilu) {
    for (int i = 0; i < R * V * L; i += L) store(out + i, silu(load(out + i)));
  }
}

// Tokens in panels of two vectors; in AMX's products the last one has one where that is enough. In
// a panel, element (feature, token) is panel[feature * tokens of the panel + token]; the panels of
// an array follow each other.
template <class C>
struct Panels {
  static constexpr int L = kLanes<C>;
  using Number = C;   // of the state
  using Weight = C;   // of matrices
  using Operand = C;  // of what goes into products
  const TokenMlpArgs& a;
  int64_t first;
  int64_t tokens;
  int64_t panels;
  int last;  // vectors of the last panel

  Panels(const TokenMlpArgs& args, int64_t first_token, int64_t count)
      : a(args), first(first_token), tokens(count), panels((count + 2 * L - 1) / (2 * L)) {
    last = count - (panels - 1) * 2 * L <= L ? 1 : 2;
  }
  int vectors(int64_t panel) const { return panel + 1 < panels ? 2 : last; }
  // All numbers of an array of so many features.
  int64_t numbers(int64_t features) const { return (2 * (panels - 1) + last) * L * features; }
  // Where an array's panel begins.
  static int64_t begin(int64_t panel, int64_t features) { return panel * 2 * L * features; }

  // The biases of a step in a block, in `buffer` where each token has its own.
  Biases<C> step_biases(int64_t step, int64_t block, C* buffer) const {
    const C* numbers = static_cast<const C*>(a.step_bias) + block * a.width;
    const int64_t next = a.blocks * a.width;
    if (a.levels == 1) return {numbers + step * next, false};
    read([&](int64_t t) { return numbers + (first + t) % a.levels * next; }, a.width, buffer);
    return {buffer, true};
  }

  // out = after(w^T in + bias), w (inputs, outputs), in panels of two vectors all.
  void product(const C* w, int64_t out_features, int64_t in_features, const C* in,
               const Biases<C>& bias, After after, C* out) const {
    for_even_blocks(out_features, kPairRows, [&](int64_t o, int64_t rows) {
      for (int64_t p = 0; p < panels; ++p) {
        const C* panel = in + begin(p, in_features);
        const Biases<C> biases = of_panel(bias, p, out_features);
        C* result = out + begin(p, out_features) + o * 2 * L;
        with_rows<kPairRows>(rows, [&](auto r) {
          outputs<C, r>(w + o, out_features, in_features, panel, biases, o, after, result);
        });
      }
    });
  }

  static Biases<C> of_panel(const Biases<C>& bias, int64_t panel, int64_t features) {
    return {bias.own ? bias.numbers + begin(panel, features) : bias.numbers, bias.own};
  }

  void linear(const C* w, int64_t out_features, int64_t in_features, const C* in, const C* bias,
              bool add, C* out) const {
    product(w, out_features, in_features, in, {bias, false},
            add ? After::kAddToOutput : After::kNothing, out);
  }
  void linear_silu(const C* w, int64_t out_features, int64_t in_features, const C* in,
                   const Biases<C>& bias, C* out) const {
    product(w, out_features, in_features, in, bias, After::kSilu, out);
  }
  void scale(int64_t step, const C* x, int64_t features, C* out) const {
    for_vectors(features, [&](int64_t token, int64_t offset, int64_t next) {
      const Vec<C> factor = row_of<C>(a, step, token, true).c_in;
      for (int64_t f = 0; f < features; ++f) {
        store(out + offset + f * next, factor * load(x + offset + f * next));
      }
    });
  }
  void round(DType dtype, C* array, int64_t features) const {
    round_to(dtype, array, numbers(features));
  }

  // Calls f(its first token, offset of feature 0, distance of features) for every vector of tokens.
  template <class F>
  DIFFAD_SIMD void for_vectors(int64_t features, F&& f) const {
    for (int64_t p = 0; p < panels; ++p) {
      for (int v = 0; v < vectors(p); ++v) {
        f(first + (2 * p + v) * L, begin(p, features) + v * L, vectors(p) * L);
      }
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
    for_vectors(features, [&](int64_t, int64_t offset, int64_t next) {
      const C* from = h + offset;
      const auto [mean, scale] = moments(from, features, next);
      for (int64_t f = 0; f < features; ++f) {
        const Vec<C> y = (load(from + f * next) - mean) * scale;
        store(out + offset + f * next, with_silu ? silu(y) : y);
      }
    });
  }

  // The step's update of x, and its statistics.
  void update_all(int64_t step, C* x, const C* m, int64_t features) const {
    for_vectors(features, [&](int64_t token, int64_t offset, int64_t next) {
      const Row<C> row = row_of<C>(a, step, token, true);
      const Vec<C> sum = sum_over(features, [&](int64_t f) {
        return update(row, x + offset + f * next, m + offset + f * next);
      });
      const Vec<C> mean = sum / static_cast<C>(features);
      C* stats = static_cast<C*>(a.stats) + token * a.steps + step;
      for (int i = 0; i < L && token + i < first + tokens; ++i) stats[i * a.steps] = mean[i];
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

  // row(t), the features of token t, to panels. Lanes without a token are 0.
  template <class F>
  void read(F&& row, int64_t features, C* array) const {
    std::memset(array, 0, numbers(features) * sizeof(C));
    for_tokens(array, features, [&](int64_t t, C* column, int64_t next) {
      for (int64_t f = 0; f < features; f += L) {
        const int64_t n = features - f < L ? features - f : L;
        const auto* from = row(t) + f;
        const Vec<C> values = n == L ? load(from) : load_partial(from, n);
        for (int64_t i = 0; i < n; ++i) column[(f + i) * next] = values[i];
      }
    });
  }
  // And back: the first level of each row of x.
  template <class T>
  void write(C* array, int64_t features, T* x) const {
    for_tokens(array, features, [&](int64_t t, const C* column, int64_t next) {
      if ((first + t) % a.levels != 0) return;
      for (int64_t f = 0; f < features; f += L) {
        const int64_t n = features - f < L ? features - f : L;
        C values[L] = {};
        for (int64_t i = 0; i < n; ++i) values[i] = column[(f + i) * next];
        T* to = x + (first + t) / a.levels * features + f;
        n == L ? store(to, load(values)) : store_partial(to, load(values), n);
      }
    });
  }
};

// ---------------------------------------------------------------------- tokens

// Of `inputs` rows of `row` outputs, how many leave something behind them when `lanes` are read of
// the last outputs, of which there are `rest`, or more than lanes. What is read past the outputs of
// an input are those of the next one, for lanes that nobody reads.
DIFFAD_SIMD int64_t read_whole(int64_t inputs, int64_t row, int64_t rest, int64_t lanes) {
  const int64_t missing = rest < lanes ? (lanes - rest + row - 1) / row : 0;
  return inputs > missing ? inputs - missing : 0;
}

// sum[n][t] = sum over k < inputs of vector n of w[k * row] times in[t * length + k]: one chain of
// fma over k in its order. There are `rest` outputs in these vectors and behind them.
template <int N, int T, class C>
DIFFAD_SIMD void products(const C* w, int64_t row, int64_t rest, int64_t inputs, const C* in,
                          int64_t length, Vec<compute_t<C>> (&sum)[N][T]) {
  constexpr int L = kLanes<C>;
  const auto add = [&](int64_t k, auto&& last) {
    Vec<C> weights[N];
    const C* from = w + k * row;
#pragma GCC unroll 16
    for (int n = 0; n + 1 < N; ++n) weights[n] = load(from + n * L);
    weights[N - 1] = last(from + (N - 1) * L);
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const Vec<C> number = splat(in[t * length + k]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) sum[n][t] = fma(weights[n], number, sum[n][t]);
    }
  };
  rest -= (N - 1) * L;
  const int64_t whole = read_whole(inputs, row, rest, L);
  for (int64_t k = 0; k < whole; ++k) add(k, [](const C* from) { return load(from); });
  for (int64_t k = whole; k < inputs; ++k) {
    add(k, [&](const C* from) { return load_partial(from, rest); });
  }
}

DIFFAD_SIMD void store_operand(float* p, Vec<float> v) { store(p, v); }
DIFFAD_SIMD void store_operand(double* p, Vec<double> v) { store(p, v); }

#if defined(__AVX512BF16__)
// Rounds as `store`, only that numbers below the normal ones become zero, which the products take
// them for.
DIFFAD_SIMD void store_operand(bf16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
}

// The pair of inputs at p, or the one and zero, in every lane.
DIFFAD_SIMD __m512bh splat_pair(const bf16* p, bool both) {
  int pair = p->x;
  if (both) std::memcpy(&pair, p, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}

// The same by dot products: one chain over the pairs of inputs (2 k, 2 k + 1) in their order. Two
// inputs of two vectors of outputs are interleaved within 128 bits: the sums of outputs 0 to 3, 8
// to 11, .. 24 to 27 come into the first vector, the others into the second.
template <int N, int T>
DIFFAD_SIMD void products(const bf16* w, int64_t row, int64_t rest, int64_t inputs, const bf16* in,
                          int64_t length, Vec<float> (&sum)[N][T]) {
  static_assert(N % 2 == 0);
  constexpr int L = 2 * kLanes<float>, kUnits = N / 2;
  rest -= (kUnits - 1) * L;  // of the last two vectors
  const __mmask32 last = rest < L ? (1u << rest) - 1 : ~0u;
  // The inputs k of every third token: an address reaches the next two by a scaled index, while a
  // pointer to each, which compilers like, would not fit the registers.
  constexpr int kThirds = (T + 2) / 3;
  const bf16* tokens[kThirds];
#pragma GCC unroll 4
  for (int i = 0; i < kThirds; ++i) tokens[i] = in + 3 * i * length;
  const auto add = [&](int64_t k, __mmask32 lanes, bool both) __attribute__((always_inline)) {
    __m512bh first[kUnits], second[kUnits];
#pragma GCC unroll 8
    for (int n = 0; n < kUnits; ++n) {
      const bf16* from = w + k * row + n * L;
      const __mmask32 there = n + 1 < kUnits ? ~0u : lanes;
      const __m512i even = _mm512_maskz_loadu_epi16(there, from);
      const __m512i odd = _mm512_maskz_loadu_epi16(both ? there : 0, from + row);
      first[n] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
      second[n] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    }
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512bh pair = splat_pair(tokens[t / 3] + t % 3 * length, both);
#pragma GCC unroll 8
      for (int n = 0; n < kUnits; ++n) {
        sum[2 * n][t] = _mm512_dpbf16_ps(sum[2 * n][t], first[n], pair);
        sum[2 * n + 1][t] = _mm512_dpbf16_ps(sum[2 * n + 1][t], second[n], pair);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kThirds; ++i) {
      tokens[i] += 2;
      asm("" : "+r"(tokens[i]));  // computes none of them from another one
    }
  };
  const int64_t whole = read_whole(inputs, row, rest, L);
  int64_t k = 0;
  for (; k + 1 < whole; k += 2) add(k, ~0u, true);
  for (; k + 1 < inputs; k += 2) add(k, last, true);
  if (k < inputs) add(k, last, false);
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
#pragma GCC unroll 8
  for (int n = 0; n < N; n += 2) {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const __m512 a = sum[n][t], b = sum[n + 1][t];
      sum[n][t] = _mm512_permutex2var_ps(a, low, b);
      sum[n + 1][t] = _mm512_permutex2var_ps(a, high, b);
    }
  }
}
#endif

// Some tokens: an array is their features one token after another, each filled up to whole vectors.
// Weights, and what is multiplied by them, are of W.
template <class C, class W = C>
struct Tokens {
  static_assert(kTokenTile % kLanes<C> == 0);
  using Number = C;
  using Weight = W;
  using Operand = W;
  static constexpr int L = kLanes<C>;
  // Tokens of a product: with two vectors of outputs of each, their sums fill the registers.
  static constexpr int kMost = kPairRows;
  // Vectors of outputs that are read at once.
  static constexpr int kUnit = sizeof(W) == 2 ? 2 : 1;
  const TokenMlpArgs& a;
  int64_t first;
  int64_t tokens;

  static int64_t length(int64_t features) { return (features + L - 1) / L * L; }
  int64_t numbers(int64_t features) const { return tokens * length(features); }

  // Where the biases of each token are: of all the same, or of its level.
  struct Rows {
    const C* numbers;
    int64_t first, levels, next;
    const C* of(int64_t token) const {
      return levels == 1 ? numbers : numbers + (first + token) % levels * next;
    }
    Rows from(int64_t token) const { return {numbers, first + token, levels, next}; }
  };
  // The biases of a step in a block.
  Rows step_biases(int64_t step, int64_t block, C*) const {
    const int64_t next = a.blocks * a.width;
    const C* numbers = static_cast<const C*>(a.step_bias) + block * a.width;
    return {numbers + (a.levels == 1 ? step * next : 0), first, a.levels, next};
  }

  // N vectors of outputs of T tokens from `o` on. The last of kUnit vectors may be short, or miss.
  template <int N, int T, class To>
  static void block(const W* w, int64_t o, int64_t out_features, int64_t inputs, const W* in,
                    const Rows& biases, After after, To* out) {
    const int64_t out_length = length(out_features);
    Vec<C> sum[N][T] = {};
    products(w + o, out_features, out_features - o, inputs, in, length(inputs), sum);
    alignas(64) C sums[N][T][L];  // asked for one of them, the compiler would keep `sum` here
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) store(sums[n][t], sum[n][t]);
    }
    for (int n = 0; n < N; ++n) {
      const int64_t at = o + n * L, rest = out_features - at;
      if (rest <= 0) break;
      for (int t = 0; t < T; ++t) {
        const C* bias = biases.of(t) + at;
        To* to = out + t * out_length + at;
        Vec<C> y = load(sums[n][t]) + (rest < L ? load_partial(bias, rest) : load(bias));
        if constexpr (std::is_same_v<To, C>) {
          if (after == After::kAddToOutput) y += load(to);
        }
        store_operand(to, after == After::kSilu ? silu(y) : y);
      }
    }
  }

  // As many blocks of N vectors from `o` on as there are, then smaller ones.
  template <int N, int T, class To>
  static void blocks(const W* w, int64_t o, int64_t out_features, int64_t inputs, const W* in,
                     const Rows& biases, After after, To* out) {
    for (; o + (N - kUnit) * L < out_features; o += N * L) {
      block<N, T>(w, o, out_features, inputs, in, biases, after, out);
    }
    if constexpr (N > kUnit) blocks<N / 2, T>(w, o, out_features, inputs, in, biases, after, out);
  }

  // The largest up to n.
  static constexpr int power_of_two(int n) { return n > 1 ? 2 * power_of_two(n / 2) : 1; }

  template <class To>
  void product(const W* w, int64_t out_features, int64_t in_features, const W* in,
               const Rows& biases, After after, To* out) const {
    for_even_blocks(tokens, kMost, [&](int64_t begin, int64_t count) {
      with_rows<kMost>(count, [&](auto some) {
        // All sums stay in registers.
        constexpr int N = power_of_two(2 * kPairRows / some);
        blocks<N, some>(w, 0, out_features, in_features, in + begin * length(in_features),
                        biases.from(begin), after, out + begin * length(out_features));
      });
    });
  }

  void linear(const W* w, int64_t out_features, int64_t in_features, const W* in, const C* bias,
              bool add, C* out) const {
    product(w, out_features, in_features, in, {bias, 0, 1, 0},
            add ? After::kAddToOutput : After::kNothing, out);
  }
  void linear_silu(const W* w, int64_t out_features, int64_t in_features, const W* in,
                   const Rows& biases, W* out) const {
    product(w, out_features, in_features, in, biases, After::kSilu, out);
  }
  void scale(int64_t step, const C* x, int64_t features, W* out) const {
    for_tokens(features, [&](int64_t t, int64_t begin) {
      const Vec<C> factor = row_of<C>(a, step, first + t, false).c_in;
      for (int64_t f = begin; f < begin + features; f += L) {
        store_operand(out + f, factor * load(x + f));
      }
    });
  }
  void round(DType dtype, W* array, int64_t features) const {
    if constexpr (std::is_same_v<W, C>) round_to(dtype, array, numbers(features));
  }

  // Calls f(token, where its features begin).
  template <class F>
  DIFFAD_SIMD void for_tokens(int64_t features, F&& f) const {
    for (int64_t t = 0; t < tokens; ++t) f(t, t * length(features));
  }

  // sum[i] = sum of term(i, f) over the features, for G tokens.
  template <int G, class F>
  static DIFFAD_SIMD void sum_over(int64_t features, F&& term, C* sum) {
    Vec<C> sums[G] = {};
    int64_t f = 0;
    for (; f + L <= features; f += L) {
#pragma GCC unroll 4
      for (int i = 0; i < G; ++i) sums[i] += term(i, f);
    }
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) {
      if (f < features) {
        const Vec<C> rest = term(i, f);
        C lanes[L] = {};
        for (int j = 0; f + j < features; ++j) lanes[j] = rest[j];
        sums[i] += load(lanes);
      }
      sum[i] = sum_of_lanes(sums[i]);
    }
  }

  // sum[t] = sum of term(t, f) for all tokens, some at a time, which need not wait for each other.
  template <class F>
  DIFFAD_SIMD void sums_over(int64_t features, F&& term, C* sum) const {
    constexpr int G = 4;
    int64_t t = 0;
    for (; t + G <= tokens; t += G) {
      sum_over<G>(features, [&](int i, int64_t f) { return term(t + i, f); }, sum + t);
    }
    for (; t < tokens; ++t) {
      sum_over<1>(features, [&](int, int64_t f) { return term(t, f); }, sum + t);
    }
  }

  void layer_norm(const C* h, int64_t features, bool with_silu, W* out) const {
    const C count = static_cast<C>(features);
    C mean[kTokenTile] = {}, scale[kTokenTile] = {};
    sums_over(features, [&](int64_t t, int64_t f) { return load(h + t * length(features) + f); },
              mean);
    for (int64_t t = 0; t < tokens; t += L) store(mean + t, load(mean + t) / count);
    sums_over(features, [&](int64_t t, int64_t f) {
      const Vec<C> centred = load(h + t * length(features) + f) - mean[t];
      return centred * centred;
    }, scale);
    for (int64_t t = 0; t < tokens; t += L) {
      store(scale + t, 1 / sqrt(load(scale + t) / count + splat(C(kEps))));
    }
    for_tokens(features, [&](int64_t t, int64_t begin) {
      for (int64_t f = begin; f < begin + features; f += L) {
        const Vec<C> y = (load(h + f) - mean[t]) * scale[t];
        store_operand(out + f, with_silu ? silu(y) : y);
      }
    });
  }

  void update_all(int64_t step, C* x, const C* m, int64_t features) const {
    for_tokens(features, [&](int64_t t, int64_t begin) {
      const Row<C> row = row_of<C>(a, step, first + t, false);
      C sum;
      sum_over<1>(features, [&](int, int64_t f) {
        return update(row, x + begin + f, m + begin + f);
      }, &sum);
      static_cast<C*>(a.stats)[(first + t) * a.steps + step] = sum / static_cast<C>(features);
    });
  }

  template <class F>
  void read(F&& row, int64_t features, C* array) const {
    for_tokens(features, [&](int64_t t, int64_t begin) {
      for (int64_t f = 0; f < features; f += L) {
        const int64_t n = features - f < L ? features - f : L;
        store(array + begin + f, load_partial(row(t) + f, n));
      }
    });
  }
  template <class T>
  void write(const C* array, int64_t features, T* x) const {
    for_tokens(features, [&](int64_t t, int64_t begin) {
      if ((first + t) % a.levels != 0) return;
      for (int64_t f = 0; f < features; f += L) {
        const int64_t n = features - f < L ? features - f : L;
        store_partial(x + (first + t) / a.levels * features + f, load(array + begin + f), n);
      }
    });
  }
};

// ------------------------------------------------------------------------ loop

// All steps of the tokens of `tile`.
template <class Tile>
void run(const Tile& tile, void* scratch) {
  using C = typename Tile::Number;
  using Operand = typename Tile::Operand;
  const TokenMlpArgs& a = tile.a;
  const int64_t size = a.size, width = a.width;
  C* x = static_cast<C*>(scratch);
  C* h = x + tile.numbers(size);
  C* biases = h + tile.numbers(width);  // with several levels
  C* next = biases + (a.levels > 1 ? tile.numbers(width) : 0);
  C* out = next + tile.numbers(a.row_in > a.row ? a.row_in : a.row);
  Operand* in = reinterpret_cast<Operand*>(next);    // what goes into a product
  Operand* inner = reinterpret_cast<Operand*>(out);  // between the two of a block

  const auto of = [](const void* p) { return static_cast<const C*>(p); };
  const auto matrix = [](const void* p) { return static_cast<const typename Tile::Weight*>(p); };
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(compute_t<T>) == sizeof(C)) {
      const T* rows = static_cast<const T*>(a.x);
      const auto row = [&](int64_t t) { return rows + (tile.first + t) / a.levels * a.x_stride; };
      tile.read(row, size, x);
    }
  });
  for (int64_t step = 0; step < a.steps; ++step) {
    tile.scale(step, x, size, in);
    tile.round(a.weight_dtype, in, size);
    tile.linear(matrix(a.w_in), width, a.row_in, in, of(a.b_in), false, h);
    for (int64_t block = 0; block < a.blocks; ++block) {
      const auto* w1 = matrix(a.w1) + block * a.matrix;
      const auto* w2 = matrix(a.w2) + block * a.matrix;
      tile.layer_norm(h, width, false, in);
      tile.round(a.weight_dtype, in, width);
      tile.linear_silu(w1, width, a.row, in, tile.step_biases(step, block, biases), inner);
      tile.round(a.weight_dtype, inner, width);
      tile.linear(w2, width, a.row, inner, of(a.b2) + block * width, true, h);
    }
    tile.layer_norm(h, width, true, in);
    tile.round(a.weight_dtype, in, width);
    tile.linear(matrix(a.w_out), size, a.row, in, of(a.b_out), false, out);
    tile.update_all(step, x, out, size);
  }
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(compute_t<T>) == sizeof(C)) {
      tile.write(x, size, static_cast<T*>(a.x_end));
    }
  });
}

}  // namespace
}  // namespace diffad::DIFFAD_ISA
