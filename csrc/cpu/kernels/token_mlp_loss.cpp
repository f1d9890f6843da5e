// token_mlp_loss: the passes over (tokens, width) between matrix products, each token once.
//
// With s = 1 / (1 + e^-a) and y = a s kept from the forward pass, the derivative of SiLU needs no
// exponential: SiLU'(a) = s + a s (1 - s) = s + y (1 - s).
// LayerNorm without affine part, n = (h - mean) r with r = 1 / sqrt(variance + eps), has
//   dh = r (dn - mean(dn) - n mean(dn n)),    means over the features.
#include "token_mlp_loss.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

constexpr float kEps = 1e-5f;  // of LayerNorm
constexpr int L = kLanes<float>;

// Calls f(level, token) for every token of levels [begin, end).
template <class F>
DIFFAD_SIMD void for_tokens(const LevelRows& of, int64_t begin, int64_t end, F&& f) {
  for (int64_t level = begin; level < end; ++level) {
    for (int64_t token = level * of.rows; token < (level + 1) * of.rows; ++token) f(level, token);
  }
}


DIFFAD_SIMD void zero(float* p, int64_t n) { std::memset(p, 0, n * sizeof(float)); }

DIFFAD_SIMD Vec<float> silu_slope(Vec<float> sigmoid, Vec<float> activated) {
  return sigmoid + activated * (1 - sigmoid);
}

}  // namespace

void token_norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  const int64_t width = a.of.width;
  for_tokens(a.of, begin, end, [&](int64_t, int64_t token) {
    float* h = a.h + token * width;
    float* n = a.normalised + token * width;
    Vec<float> sum{};
    if (a.grown != nullptr) {
      const float* grown = a.grown + token * width;
      for (int64_t i = 0; i < width; i += L) {
        const Vec<float> v = load(h + i) + (load(grown + i) + load(a.bias + i));
        store(h + i, v);
        sum += v;
      }
    } else {
      for (int64_t i = 0; i < width; i += L) {
        const Vec<float> v = load(h + i) + load(a.bias + i);
        store(h + i, v);
        sum += v;
      }
    }
    const Vec<float> mean = splat(sum_of_lanes(sum) / static_cast<float>(width));
    Vec<float> squares{};
    for (int64_t i = 0; i < width; i += L) {
      const Vec<float> centred = load(h + i) - mean;
      squares = fma(centred, centred, squares);
    }
    const float variance = sum_of_lanes(squares) / static_cast<float>(width);
    const float scale = 1.0f / __builtin_sqrtf(variance + kEps);
    a.scale[token] = scale;
    const Vec<float> r = splat(scale);
    if (a.sigmoid == nullptr) {
      for (int64_t i = 0; i < width; i += L) store(n + i, (load(h + i) - mean) * r);
      return;
    }
    float* sigmoids = a.sigmoid + token * width;
    float* activated = a.activated + token * width;
    for (int64_t i = 0; i < width; i += L) {
      const Vec<float> v = (load(h + i) - mean) * r, s = sigmoid(v);
      store(n + i, v);
      store(sigmoids + i, s);
      store(activated + i, v * s);
    }
  });
}

void token_activation_forward(const ActivationForward& a, int64_t begin, int64_t end) {
  const int64_t width = a.of.width;
  for_tokens(a.of, begin, end, [&](int64_t level, int64_t token) {
    const float* e = a.embedding + level * a.next_level;
    const float* inner = a.inner + token * width;
    float* sigmoids = a.sigmoid + token * width;
    float* activated = a.activated + token * width;
    for (int64_t i = 0; i < width; i += L) {
      const Vec<float> v = load(inner + i) + load(e + i), s = sigmoid(v);
      store(sigmoids + i, s);
      store(activated + i, v * s);
    }
  });
}

void token_residual(const Residual& a, int64_t begin, int64_t end) {
  const int64_t width = a.of.width;
  for (int64_t level = begin; level < end; ++level) {
    float* sums = a.column_sums + level * width;
    zero(sums, width);
    double loss = 0;
    for (int64_t token = level * a.of.rows; token < (level + 1) * a.of.rows; ++token) {
      float* out = a.output + token * width;
      const float* target = a.target + token * width;
      const float weight = a.weight[token], factor = weight * a.factor;
      Vec<float> squares{};
      int64_t i = 0;
      for (; i + L <= width; i += L) {
        const Vec<float> d = load(out + i) + load(a.bias + i) - load(target + i);
        const Vec<float> gradient = splat(factor) * d;
        squares = fma(d, d, squares);
        store(out + i, gradient);
        store(sums + i, load(sums + i) + gradient);
      }
      float square = sum_of_lanes(squares);
      for (; i < width; ++i) {
        const float d = out[i] + a.bias[i] - target[i];
        square += d * d;
        out[i] = factor * d;
        sums[i] += factor * d;
      }
      loss += static_cast<double>(weight) * square;
    }
    a.loss[level] = loss;
  }
}

void token_activation_backward(const ActivationBackward& a, int64_t begin, int64_t end) {
  const int64_t width = a.of.width;
  for (int64_t level = begin; level < end; ++level) {
    float* sums = a.column_sums + level * a.next_level;
    zero(sums, width);
    for (int64_t token = level * a.of.rows; token < (level + 1) * a.of.rows; ++token) {
      float* gradient = a.gradient + token * width;
      const float* sigmoids = a.sigmoid + token * width;
      const float* activated = a.activated + token * width;
      for (int64_t i = 0; i < width; i += L) {
        const Vec<float> g =
            load(gradient + i) * silu_slope(load(sigmoids + i), load(activated + i));
        store(gradient + i, g);
        store(sums + i, load(sums + i) + g);
      }
    }
  }
}

void token_norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  const int64_t width = a.of.width;
  const float count = static_cast<float>(width);
  for (int64_t level = begin; level < end; ++level) {
    float* sums = a.column_sums + level * width;
    zero(sums, width);
    for (int64_t token = level * a.of.rows; token < (level + 1) * a.of.rows; ++token) {
      float* gradient = a.gradient + token * width;
      const float* n = a.normalised + token * width;
      Vec<float> sum{}, product{};
      if (a.sigmoid != nullptr) {
        const float* sigmoids = a.sigmoid + token * width;
        const float* activated = a.activated + token * width;
        for (int64_t i = 0; i < width; i += L) {
          const Vec<float> g =
              load(gradient + i) * silu_slope(load(sigmoids + i), load(activated + i));
          store(gradient + i, g);
          sum += g;
          product = fma(g, load(n + i), product);
        }
      } else {
        for (int64_t i = 0; i < width; i += L) {
          const Vec<float> g = load(gradient + i);
          sum += g;
          product = fma(g, load(n + i), product);
        }
      }
      const Vec<float> mean = splat(sum_of_lanes(sum) / count);
      const Vec<float> along = splat(sum_of_lanes(product) / count);
      const Vec<float> r = splat(a.scale[token]);
      float* total = a.total + token * width;
      for (int64_t i = 0; i < width; i += L) {
        Vec<float> g = r * (load(gradient + i) - mean - load(n + i) * along);
        if (!a.fresh) g += load(total + i);
        store(total + i, g);
        store(sums + i, load(sums + i) + g);
      }
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
