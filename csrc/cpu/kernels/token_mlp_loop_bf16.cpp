// token_mlp_loop for bfloat16 weights, by the processor's dot products of pairs: pairs of
// neighbouring inputs are multiplied and added to a sum in float32.
//
//   avx512_bf16  each output is one chain of dot products over the pairs in their order, see
//                `products` in token_mlp_tile.h.
//   amx          D (16 outputs x 16 tokens) += A (16 outputs x 16 pairs) B (16 pairs x 16 tokens)
//                is one instruction. Weights, A, lie (outputs, inputs) row by row, where two
//                neighbouring inputs of an output are a pair already. An operand, B, has the pairs
//                of features (2 k, 2 k + 1), k by k: in a panel each as a vector whose lanes are
//                tokens, of a single token, which is a B of one column and has the sums of a panel,
//                as its features side by side. Rows of weights and operands are filled with zeros
//                to whole groups of kInputs, matrices to whole blocks of kOutputs (padded in the
//                operator).
#include "token_mlp_tile.h"

#if !defined(__AVX512BF16__)
#error "compiled for instruction sets with bfloat16 alone, see isa.h"
#endif

namespace diffad::DIFFAD_ISA {

#if defined(__AMX_BF16__)

namespace {

using Pair = uint32_t;  // the even feature in the low half

constexpr int L = kLanes<float>;
constexpr int64_t kInputs = kAmxInputs;
constexpr int64_t kOutputs = kAmxOutputs;
static_assert(L == 16 && kInputs == 2 * L && kOutputs == L);

// Pairs of a token with so many features.
constexpr int64_t pairs_of(int64_t features) {
  return (features + kInputs - 1) / kInputs * kInputs / 2;
}

// Lane by lane the pair (even, odd).
DIFFAD_SIMD void store_pairs(Pair* p, Vec<float> even, Vec<float> odd) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, even);  // those of even come first
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, halves));
}

// -------------------------------------------------------------------- products

// Tiles of 16 rows; those of the operand and of the sums have so many columns.
struct Session {
  explicit Session(int columns) {
    // Layout of LDTILECFG's operand: palette, start row, bytes of a row and rows of each tile.
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = 16;
      const bool weights = tile >= 4 && tile < 7;
      config.row_bytes[tile] = static_cast<uint16_t>(weights ? 64 : 4 * columns);
    }
    _tile_loadconfig(&config);
  }
  ~Session() { _tile_release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// The compiler does not see what tiles read.
DIFFAD_SIMD void settle_memory() { asm volatile("" ::: "memory"); }

// R blocks of outputs of V vectors of tokens: sums[output][V * L].
template <int R, int V>
DIFFAD_SIMD void products(const bf16* w, int64_t row, const Pair* in, float* sums) {
  const int64_t row_bytes = row * 2;
  constexpr int kVectors = V * L * 4;  // bytes
  settle_memory();
  _tile_zero(0);
  if constexpr (V == 2) _tile_zero(1);
  if constexpr (R == 2) _tile_zero(2);
  if constexpr (R == 2 && V == 2) _tile_zero(3);
  for (int64_t k = 0; k < row; k += kInputs) {
    const Pair* from = in + k / 2 * V * L;
    _tile_loadd(4, w + k, row_bytes);
    _tile_loadd(7, from, kVectors);
    _tile_dpbf16ps(0, 4, 7);
    if constexpr (R == 2) {
      _tile_loadd(5, w + kOutputs * row + k, row_bytes);
      _tile_dpbf16ps(2, 5, 7);
    }
    if constexpr (V == 2) {
      _tile_loadd(7, from + L, kVectors);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kVectors);
  if constexpr (V == 2) _tile_stored(1, sums + L, kVectors);
  if constexpr (R == 2) _tile_stored(2, sums + kOutputs * V * L, kVectors);
  if constexpr (R == 2 && V == 2) _tile_stored(3, sums + kOutputs * V * L + L, kVectors);
}

// R blocks of outputs of a single token.
template <int R>
DIFFAD_SIMD void products_of_one(const bf16* w, int64_t row, const bf16* in, float* sums) {
  const int64_t row_bytes = row * 2;
  settle_memory();
  _tile_zero(0);
  if constexpr (R > 1) _tile_zero(1);
  if constexpr (R > 2) _tile_zero(2);
  if constexpr (R > 3) _tile_zero(3);
  for (int64_t k = 0; k < row; k += kInputs) {
    _tile_loadd(7, in + k, 4);
    _tile_loadd(4, w + k, row_bytes);
    _tile_dpbf16ps(0, 4, 7);
    if constexpr (R > 1) {
      _tile_loadd(5, w + kOutputs * row + k, row_bytes);
      _tile_dpbf16ps(1, 5, 7);
    }
    if constexpr (R > 2) {
      _tile_loadd(6, w + 2 * kOutputs * row + k, row_bytes);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (R > 3) {
      _tile_loadd(4, w + 3 * kOutputs * row + k, row_bytes);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, 4);
  if constexpr (R > 1) _tile_stored(1, sums + kOutputs, 4);
  if constexpr (R > 2) _tile_stored(2, sums + 2 * kOutputs, 4);
  if constexpr (R > 3) _tile_stored(3, sums + 3 * kOutputs, 4);
}

// ---------------------------------------------------------------------- panels

struct PairPanels : Panels<float> {
  using Weight = bf16;
  using Operand = Pair;
  using Panels<float>::Panels;

  static int64_t begin_of_pairs(int64_t panel, int64_t features) {
    return panel * 2 * L * pairs_of(features);
  }

  void round(DType, Pair*, int64_t) const {}  // packing has done it

  // Calls f(first output, how many, their sums, panel, V) for all outputs of all panels.
  template <class F>
  DIFFAD_SIMD void for_products(const bf16* w, int64_t out_features, int64_t row, const Pair* in,
                                F&& f) const {
    alignas(64) float sums[2 * kOutputs * 2 * L];
    for (int64_t o = 0; o < out_features; o += 2 * kOutputs) {
      const int64_t outputs = out_features - o < 2 * kOutputs ? out_features - o : 2 * kOutputs;
      const bf16* weights = w + o * row;
      for (int64_t p = 0; p < panels; ++p) {
        const Pair* panel = in + p * L * row;
        if (vectors(p) == 2) {
          outputs > kOutputs ? products<2, 2>(weights, row, panel, sums)
                             : products<1, 2>(weights, row, panel, sums);
          f(o, outputs, sums, p, std::integral_constant<int, 2>());
        } else {
          outputs > kOutputs ? products<2, 1>(weights, row, panel, sums)
                             : products<1, 1>(weights, row, panel, sums);
          f(o, outputs, sums, p, std::integral_constant<int, 1>());
        }
      }
    }
  }

  void linear(const bf16* w, int64_t out_features, int64_t row, const Pair* in, const float* bias,
              bool add, float* out) const {
    for_products(w, out_features, row, in, [&](int64_t o, int64_t n, const float* sums, int64_t p,
                                               auto v_count) {
      constexpr int V = v_count;
      float* to = out + begin(p, out_features) + o * V * L;
      for (int64_t r = 0; r < n; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const int64_t i = (r * V + v) * L;
          Vec<float> y = load(sums + i) + splat(bias[o + r]);
          if (add) y += load(to + i);
          store(to + i, y);
        }
      }
    });
  }

  void linear_silu(const bf16* w, int64_t out_features, int64_t row, const Pair* in,
                   const Biases<float>& bias, Pair* out) const {
    for_products(w, out_features, row, in, [&](int64_t o, int64_t n, const float* sums, int64_t p,
                                               auto v_count) {
      constexpr int V = v_count;
      const Biases<float> biases = of_panel(bias, p, out_features);
      Pair* to = out + begin_of_pairs(p, out_features) + o / 2 * V * L;
      for (int64_t r = 0; r < n; r += 2) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const float* sum = sums + (r * V + v) * L;
          const Vec<float> even = silu(load(sum) + biases.at(o + r, v * L, V * L));
          Vec<float> odd = {};
          if (r + 1 < n) odd = silu(load(sum + V * L) + biases.at(o + r + 1, v * L, V * L));
          store_pairs(to + (r / 2 * V + v) * L, even, odd);
        }
      }
    });
    fill(out_features, out);
  }

  // Zeros in the pairs past the last feature.
  void fill(int64_t features, Pair* out) const {
    for_pair_vectors(features, [&](int64_t, int64_t, Pair* to, int64_t next) {
      for (int64_t k = (features + 1) / 2; k < pairs_of(features); ++k) {
        _mm512_storeu_si512(to + k * next, _mm512_setzero_si512());
      }
    }, out);
  }

  // Calls f(its first token, offset of the state's feature 0, pair 0, distance of features and of
  // pairs) for every vector of tokens.
  template <class F>
  DIFFAD_SIMD void for_pair_vectors(int64_t features, F&& f, Pair* out) const {
    for (int64_t p = 0; p < panels; ++p) {
      for (int v = 0; v < vectors(p); ++v) {
        f(first + (2 * p + v) * L, begin(p, features) + v * L,
          out + begin_of_pairs(p, features) + v * L, vectors(p) * L);
      }
    }
  }

  // Pairs of what `value` makes of the vectors of features.
  template <class F>
  static DIFFAD_SIMD void pack(int64_t features, const float* from, Pair* to, int64_t next,
                               F&& value) {
    int64_t f = 0;
    for (; f + 1 < features; f += 2) {
      store_pairs(to + f / 2 * next, value(load(from + f * next)),
                  value(load(from + (f + 1) * next)));
    }
    if (f < features) store_pairs(to + f / 2 * next, value(load(from + f * next)), Vec<float>{});
  }

  void scale(int64_t step, const float* x, int64_t features, Pair* out) const {
    for_pair_vectors(features, [&](int64_t token, int64_t offset, Pair* to, int64_t next) {
      const Vec<float> factor = row_of<float>(a, step, token, true).c_in;
      pack(features, x + offset, to, next, [&](Vec<float> y) { return factor * y; });
    }, out);
    fill(features, out);
  }

  void layer_norm(const float* h, int64_t features, bool with_silu, Pair* out) const {
    for_pair_vectors(features, [&](int64_t, int64_t offset, Pair* to, int64_t next) {
      const auto [mean, scale] = moments(h + offset, features, next);
      const auto normalised = [&](Vec<float> y) { return (y - mean) * scale; };
      if (with_silu) {
        pack(features, h + offset, to, next,
             [&](Vec<float> y) { return silu(normalised(y)); });
      } else {
        pack(features, h + offset, to, next, normalised);
      }
    }, out);
    fill(features, out);
  }
};

// ---------------------------------------------------------------------- single

// Of one token: its features side by side are pairs.
struct PairSingle : Tokens<float, bf16> {
  // Calls f(first output, how many are left, the sums of a vector).
  template <class F>
  DIFFAD_SIMD void for_products(const bf16* w, int64_t out_features, int64_t row, const bf16* in,
                                F&& f) const {
    constexpr int kBlocks = 4;
    alignas(64) float sums[kBlocks * kOutputs];
    for (int64_t o = 0; o < out_features; o += kBlocks * kOutputs) {
      const int64_t left = out_features - o;
      const int64_t n = left < kBlocks * kOutputs ? left : kBlocks * kOutputs;
      with_rows<kBlocks>((n + kOutputs - 1) / kOutputs, [&](auto blocks) {
        products_of_one<blocks>(w + o * row, row, in, sums);
      });
      for (int64_t i = 0; i < n; i += L) f(o + i, n - i, load(sums + i));
    }
  }

  static DIFFAD_SIMD Vec<float> bias_of(const float* bias, int64_t left) {
    return left < L ? load_partial(bias, left) : load(bias);
  }

  void linear(const bf16* w, int64_t out_features, int64_t row, const bf16* in, const float* bias,
              bool add, float* out) const {
    for_products(w, out_features, row, in, [&](int64_t o, int64_t left, Vec<float> sum) {
      Vec<float> y = sum + bias_of(bias + o, left);
      if (add) y += load(out + o);
      store(out + o, y);
    });
  }

  void linear_silu(const bf16* w, int64_t out_features, int64_t row, const bf16* in,
                   const Rows& biases, bf16* out) const {
    const float* bias = biases.of(0);
    for_products(w, out_features, row, in, [&](int64_t o, int64_t left, Vec<float> sum) {
      store_operand(out + o, silu(sum + bias_of(bias + o, left)));
    });
    fill(out_features, out);
  }

  // Zeros past the last feature: lanes without one hold anything.
  void fill(int64_t features, bf16* out) const {
    std::memset(out + features, 0, (2 * pairs_of(features) - features) * sizeof(bf16));
  }

  void scale(int64_t step, const float* x, int64_t features, bf16* out) const {
    Tokens::scale(step, x, features, out);
    fill(features, out);
  }
  void layer_norm(const float* h, int64_t features, bool with_silu, bf16* out) const {
    Tokens::layer_norm(h, features, with_silu, out);
    fill(features, out);
  }
};

}  // namespace

void token_mlp_loop_bf16(const TokenMlpArgs& args, void* scratch, int64_t begin, int64_t end) {
  for_tiles(args, begin, end, [&](int64_t first, int64_t tokens) {
    if (tokens > 1) {
      const Session session(L);
      run(PairPanels(args, first, tokens), scratch);
    } else {
      const Session session(1);
      run(PairSingle{{args, first, 1}}, scratch);
    }
  });
}

#else

void token_mlp_loop_bf16(const TokenMlpArgs& args, void* scratch, int64_t begin, int64_t end) {
  for_tiles(args, begin, end, [&](int64_t first, int64_t tokens) {
    run(Tokens<float, bf16>{args, first, tokens}, scratch);
  });
}

#endif

}  // namespace diffad::DIFFAD_ISA
