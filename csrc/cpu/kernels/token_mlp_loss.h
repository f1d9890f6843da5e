// token_mlp_loss on the CPU: what lies between the matrix products of the token MLP and its
// backward pass. All arrays are float32 and contiguous, `width` is a multiple of kWidthStep.
#pragma once

#include "isa.h"

namespace diffad {

// The lanes of the widest vector.
constexpr int64_t kWidthStep = 16;

// Kernels work on levels [begin, end), each of `rows` tokens that lie one after another. Sums over
// tokens are taken within a level and left in one row a level, so that no result depends on how
// levels are spread over threads.
struct LevelRows {
  int64_t rows, width;
};

// h += grown + bias, h (tokens, width); normalised = LN(h) and scale = 1 / sqrt(variance + eps).
// `grown` may be null: h += bias. Where `sigmoid` is given, sigmoid = 1 / (1 + e^-normalised) and
// activated = SiLU(normalised) follow.
struct NormForward {
  LevelRows of;
  float *h, *normalised, *scale, *sigmoid, *activated;
  const float *grown, *bias;
};
DIFFAD_KERNEL(token_norm_forward, const NormForward& args, int64_t begin, int64_t end)

// sigmoid and activated, both of inner + the level's row of `embedding`; sigmoid may be inner.
struct ActivationForward {
  LevelRows of;
  const float *inner, *embedding;
  int64_t next_level;  // elements between the rows of `embedding`
  float *sigmoid, *activated;
};
DIFFAD_KERNEL(token_activation_forward, const ActivationForward& args, int64_t begin, int64_t end)

// The loss of a level, sum over tokens of weight sum_j (output_j + bias_j - target_j)^2 (double),
// and its gradient for the output, times `factor`, in place of the output; `column_sums` (levels,
// width) of that gradient. `width` is any number here.
struct Residual {
  LevelRows of;
  float* output;
  const float *bias, *target, *weight;
  float factor;
  double* loss;
  float* column_sums;
};
DIFFAD_KERNEL(token_residual, const Residual& args, int64_t begin, int64_t end)

// gradient *= SiLU'(a) in place; column_sums, a row a level `next_level` elements apart.
struct ActivationBackward {
  LevelRows of;
  float* gradient;
  const float *sigmoid, *activated;
  float* column_sums;
  int64_t next_level;
};
DIFFAD_KERNEL(token_activation_backward, const ActivationBackward& args, int64_t begin,
              int64_t end)

// total += the gradient of LN's input from `gradient` of its output, which is first multiplied by
// SiLU' where `sigmoid` is given; `fresh`: total = instead. column_sums (levels, width) of total.
struct NormBackward {
  LevelRows of;
  float *gradient, *total;
  const float *normalised, *scale, *sigmoid, *activated;
  bool fresh;
  float* column_sums;
};
DIFFAD_KERNEL(token_norm_backward, const NormBackward& args, int64_t begin, int64_t end)

}  // namespace diffad
