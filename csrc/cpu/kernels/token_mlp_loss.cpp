// token_mlp_loss: forward and backward pass of some tokens, and the products over all tokens that
// make the gradients of the weights.
//
// Operands of every product are read as they lie, but for the weights of the forward pass, which are
// transposed: vectors are of a layer's outputs there, and of its inputs in the backward pass.
//
// With s = 1 / (1 + e^-a) and y = a s kept from the forward pass, the derivative of SiLU needs no
// exponential: SiLU'(a) = s + a s (1 - s) = s + y (1 - s).
// LayerNorm without affine part, n = (h - mean) r with r = 1 / sqrt(variance + eps), has
//   dh = r (dn - mean(dn) - n mean(dn n)),    means over the features.
#include "token_mlp_loss.h"

#include "gemm.h"

namespace diffad::DIFFAD_ISA {
namespace {

constexpr float kEps = 1e-5f;  // of LayerNorm
constexpr int L = kLanes<float>;
// Tokens whose outer products are added up at once: what they read of both sides stays in the
// cache.
constexpr int64_t kOuterTokens = 256;

DIFFAD_SIMD void zero(float* p, int64_t n) { std::memset(p, 0, n * sizeof(float)); }

// -------------------------------------------------------------------- products

// out[r * out_row + n] = sum over k of a[r * row + k * row_step] b[k * b_row + n], plus bias[n], and
// with `add` plus what was there. Columns n in whole vectors.
struct Product {
  const float* a;
  int64_t row, row_step;
  const float* b;
  int64_t b_row;
  const float* bias;  // or null
  bool add;
  float* out;
  int64_t out_row;
};

template <int R, int V>
void product_block(const Product& p, int64_t first, int64_t column, int64_t count) {
  Vec<float> sum[R][V] = {};
  multiply_add<float, R, V>(p.a + first * p.row, p.row, p.row_step, p.b + column, L, p.b_row, count,
                            sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = p.out + (first + r) * p.out_row + column + v * L;
      Vec<float> y = sum[r][v];
      if (p.bias != nullptr) y += load(p.bias + column + v * L);
      if (p.add) y += load(to);
      store(to, y);
    }
  }
}

void product(const Product& p, int64_t rows, int64_t columns, int64_t count) {
  for (int64_t column = 0; column < columns; column += 2 * L) {
    const bool pair = column + 2 * L <= columns;
    for_even_blocks(rows, kPairRows, [&](int64_t first, int64_t some) {
      with_rows<kPairRows>(some, [&](auto r) {
        pair ? product_block<r, 2>(p, first, column, count)
             : product_block<r, 1>(p, first, column, count);
      });
    });
  }
}

// -------------------------------------------------- between products, token by token

// n = LN(h), scale = 1 / sqrt(variance + eps), and with `sigmoids` those of n and SiLU(n).
void norm_forward(const float* h, int64_t count, int64_t width, float* n, float* scales,
                  float* sigmoids, float* activated) {
  for (int64_t t = 0; t < count; ++t, h += width, n += width) {
    Vec<float> sum{};
    for (int64_t i = 0; i < width; i += L) sum += load(h + i);
    const Vec<float> mean = splat(sum_of_lanes(sum) / static_cast<float>(width));
    Vec<float> squares{};
    for (int64_t i = 0; i < width; i += L) {
      const Vec<float> centred = load(h + i) - mean;
      squares = fma(centred, centred, squares);
    }
    const float variance = sum_of_lanes(squares) / static_cast<float>(width);
    scales[t] = 1.0f / __builtin_sqrtf(variance + kEps);
    const Vec<float> r = splat(scales[t]);
    if (sigmoids == nullptr) {
      for (int64_t i = 0; i < width; i += L) store(n + i, (load(h + i) - mean) * r);
      continue;
    }
    for (int64_t i = 0; i < width; i += L) {
      const Vec<float> v = (load(h + i) - mean) * r, s = sigmoid(v);
      store(n + i, v);
      store(sigmoids + t * width + i, s);
      store(activated + t * width + i, v * s);
    }
  }
}

// Of a = inner + e: its sigmoid in place of inner, and SiLU(a).
void activation_forward(float* inner, int64_t count, int64_t width, const float* e,
                        float* activated) {
  for (int64_t t = 0; t < count; ++t, inner += width, activated += width) {
    for (int64_t i = 0; i < width; i += L) {
      const Vec<float> a = load(inner + i) + load(e + i), s = sigmoid(a);
      store(inner + i, s);
      store(activated + i, a * s);
    }
  }
}

DIFFAD_SIMD Vec<float> silu_slope(Vec<float> sigmoid, Vec<float> activated) {
  return sigmoid + activated * (1 - sigmoid);
}

// The gradient in front of SiLU, from `gradient` behind it, in place of the sigmoids; and its sums
// over tokens.
void activation_backward(const float* gradient, int64_t count, int64_t width, float* sigmoids,
                         const float* activated, float* sums) {
  zero(sums, width);
  for (int64_t t = 0; t < count * width; t += width) {
    for (int64_t i = 0; i < width; i += L) {
      const Vec<float> s = load(sigmoids + t + i);
      const Vec<float> g = load(gradient + t + i) * silu_slope(s, load(activated + t + i));
      store(sigmoids + t + i, g);
      store(sums + i, load(sums + i) + g);
    }
  }
}

// total = later + the gradient of LN's input, from `gradient` of its output, which is first
// multiplied by SiLU' where `sigmoids` are given; `later` may be null. Sums over tokens of total.
void norm_backward(float* gradient, int64_t count, int64_t width, const float* n,
                   const float* scales, const float* sigmoids, const float* activated,
                   const float* later, float* total, float* sums) {
  zero(sums, width);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t at = t * width;
    float* g = gradient + at;
    Vec<float> sum{}, along{};
    for (int64_t i = 0; i < width; i += L) {
      Vec<float> dn = load(g + i);
      if (sigmoids != nullptr) {
        dn *= silu_slope(load(sigmoids + at + i), load(activated + at + i));
        store(g + i, dn);
      }
      sum += dn;
      along = fma(dn, load(n + at + i), along);
    }
    const float features = static_cast<float>(width);
    const Vec<float> mean = splat(sum_of_lanes(sum) / features);
    const Vec<float> slope = splat(sum_of_lanes(along) / features), r = splat(scales[t]);
    for (int64_t i = 0; i < width; i += L) {
      Vec<float> dh = r * (load(g + i) - mean - load(n + at + i) * slope);
      if (later != nullptr) dh += load(later + at + i);
      store(total + at + i, dh);
      store(sums + i, load(sums + i) + dh);
    }
  }
}

// The loss of a token, weight times the square of output + bias - target; in place of the output its
// gradient times `factor`, which is added to `sums`, too.
double residual(float* output, int64_t size, const float* bias, const float* target, float weight,
                float factor, float* sums) {
  Vec<float> squares{};
  int64_t i = 0;
  for (; i + L <= size; i += L) {
    const Vec<float> d = load(output + i) + load(bias + i) - load(target + i);
    const Vec<float> gradient = splat(weight * factor) * d;
    squares = fma(d, d, squares);
    store(output + i, gradient);
    store(sums + i, load(sums + i) + gradient);
  }
  float square = sum_of_lanes(squares);
  for (; i < size; ++i) {
    const float d = output[i] + bias[i] - target[i];
    square += d * d;
    output[i] = weight * factor * d;
    sums[i] += weight * factor * d;
  }
  return static_cast<double>(weight) * square;
}

// ---------------------------------------------------------------------- passes

// The tokens of a group, on their way.
struct Group {
  const TokenLossArgs& a;
  int64_t number, run, runs, token, count;
  float *h, *moving, *scales;

  float* of(float* array, int64_t layer) const {
    return array + layer * a.layer + (token - a.first) * a.width;
  }
  float* output() const { return a.output + (token - a.first) * a.filled; }

  // Calls f(run, its first token in the group, how many).
  template <class F>
  DIFFAD_SIMD void for_runs(F&& f) const {
    for (int64_t r = run; r < run + runs; ++r) {
      f(r, a.runs.begin(r) - token, a.runs.begin(r + 1) - a.runs.begin(r));
    }
  }

  // out = in w, plus the bias if there is one, plus what was there if asked; w (inputs, columns).
  void times(const float* w, int64_t inputs, int64_t columns, const float* in, int64_t in_row,
             float* out, const float* bias = nullptr, bool add = false) const {
    product({in, in_row, 1, w, columns, bias, add, out, columns}, count, columns, inputs);
  }

  void forward() const {
    const int64_t w = a.width;
    times(a.w_in_t, a.size, w, a.x + token * a.size, a.size, h, a.b_in);
    for (int64_t l = 0; l < a.blocks; ++l) {
      float *n = of(a.normalised, l), *s = of(a.sigmoid, l), *y = of(a.activated, l);
      norm_forward(h, count, w, n, scales + l * kGroupTokens, nullptr, nullptr);
      times(a.w1_t + l * w * w, w, w, n, w, s);
      for_runs([&](int64_t r, int64_t first, int64_t some) {
        const float* e = a.step_bias + (r / a.runs.parts * a.blocks + l) * w;
        activation_forward(s + first * w, some, w, e, y + first * w);
      });
      times(a.w2_t + l * w * w, w, w, y, w, h, a.b2 + l * w, true);
    }
    float* y = of(a.activated, a.blocks);
    norm_forward(h, count, w, of(a.normalised, a.blocks), scales + a.blocks * kGroupTokens,
                 of(a.sigmoid, a.blocks), y);
    times(a.w_out_t, w, a.filled, y, w, output());
  }

  void residuals() const {
    float* sums = a.grad_out + number * a.filled;
    zero(sums, a.filled);
    double loss = 0;
    for (int64_t t = 0; t < count; ++t) {
      loss += residual(output() + t * a.filled, a.size, a.b_out, a.target + (token + t) * a.size,
                       a.weight[token + t], a.factor, sums);
    }
    a.loss[number] = loss;
  }

  void backward() const {
    const int64_t w = a.width;
    float* sums = a.grad_bias + number * (a.blocks + 1) * w;
    times(a.w_out, a.size, w, output(), a.filled, moving);
    norm_backward(moving, count, w, of(a.normalised, a.blocks), scales + a.blocks * kGroupTokens,
                  of(a.sigmoid, a.blocks), of(a.activated, a.blocks), nullptr,
                  of(a.gradient, a.blocks), sums + a.blocks * w);
    for (int64_t l = a.blocks - 1; l >= 0; --l) {
      const float* later = of(a.gradient, l + 1);
      float* s = of(a.sigmoid, l);
      times(a.w2 + l * w * w, w, w, later, w, moving);
      for_runs([&](int64_t r, int64_t first, int64_t some) {
        activation_backward(moving + first * w, some, w, s + first * w,
                            of(a.activated, l) + first * w,
                            a.grad_embedding + (r * a.blocks + l) * w);
      });
      times(a.w1 + l * w * w, w, w, s, w, moving);
      norm_backward(moving, count, w, of(a.normalised, l), scales + l * kGroupTokens, nullptr,
                    nullptr, later, of(a.gradient, l), sums + l * w);
    }
  }
};

}  // namespace

void token_mlp_loss(const TokenLossArgs& a, void* scratch, int64_t begin, int64_t end) {
  float* h = static_cast<float*>(scratch);
  float* moving = h + kGroupTokens * a.width;
  float* scales = moving + kGroupTokens * a.width;
  for (int64_t number = begin; number < end; ++number) {
    const int64_t run = number * a.runs.of_group, left = a.runs.count - run;
    const int64_t runs = left < a.runs.of_group ? left : a.runs.of_group;
    const int64_t token = a.runs.begin(run), count = a.runs.begin(run + runs) - token;
    const Group group{a, number, run, runs, token, count, h, moving, scales};
    group.forward();
    group.residuals();
    if (a.gradients) group.backward();
  }
}

void token_outer_products(const OuterProduct* products, int64_t tokens, bool add, int64_t begin,
                          int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const OuterProduct& p = products[i];
    for (int64_t t = 0; t < tokens; t += kOuterTokens) {
      const int64_t count = tokens - t < kOuterTokens ? tokens - t : kOuterTokens;
      product({p.a + t * p.a_row, 1, p.a_row, p.b + t * p.columns, p.columns, nullptr,
               add || t > 0, p.out, p.columns}, p.rows, p.columns, count);
    }
  }
}

void token_transposed(const Transposed* matrices, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const Transposed& t = matrices[m];
    for (int64_t c = 0; c < t.columns; ++c) zero(t.out + c * t.filled + t.rows, t.filled - t.rows);
    for (int64_t r = 0; r < t.rows; r += L) {
      for (int64_t c = 0; c < t.columns; c += L) {
        const int64_t rows = t.rows - r < L ? t.rows - r : L;
        const int64_t columns = t.columns - c < L ? t.columns - c : L;
        const float* from = t.in + r * t.columns + c;
        float* to = t.out + c * t.filled + r;
        Vec<float> square[L] = {};
        if (rows == L && columns == L) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) square[i] = load(from + i * t.columns);
          transpose(square);
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) store(to + i * t.filled, square[i]);
          continue;
        }
        for (int64_t i = 0; i < rows; ++i) square[i] = load_partial(from + i * t.columns, columns);
        transpose(square);
        for (int64_t i = 0; i < columns; ++i) store_partial(to + i * t.filled, square[i], rows);
      }
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
