// token_mlp_loss on the CPU: what the operator hands to its kernels. All arrays are float32 and
// contiguous.
//
// A level's tokens, which lie one after another, are cut into `parts` runs of at most kGroupTokens,
// evenly. A group is what a thread works on at once: a run, or several whole levels that are short.
// Groups depend on the sizes alone, and so do the sums over them: no result depends on threads.
#pragma once

#include "isa.h"

namespace diffad {

// The lanes of the widest vector; what widths and, in buffers, token sizes are multiples of.
constexpr int64_t kWidthStep = 16;
constexpr int64_t kGroupTokens = 32;

struct TokenRuns {
  int64_t rows, parts;  // tokens of a level, runs of a level
  int64_t of_group;     // runs
  int64_t count;        // of all levels
  // The first token of a run. Inlined always, see isa.h.
  __attribute__((always_inline)) int64_t begin(int64_t run) const {
    return run / parts * rows + run % parts * rows / parts;
  }
};

// Matrices named _t are transposed: (inputs, outputs).
struct TokenLossArgs {
  TokenRuns runs;
  int64_t size, filled, width, blocks;  // D, D filled up to a multiple of kWidthStep, W, B
  const float *x, *target, *weight;     // (M, D), (M, D), (M,)
  const float *w_in_t, *b_in;           // (D, W), (W,)
  const float *w1, *w2, *b2;            // (B, W, W), (B, W, W), (B, W)
  const float *w1_t, *w2_t;             // (B, W, W)
  const float *w_out, *w_out_t, *b_out;  // (D, W), (W, filled), (D,)
  const float* step_bias;                // (S, B, W)
  float factor;                          // of the gradient
  bool gradients;
  // What the products that make the weights' gradients read, of tokens from `first` on. Of B + 1
  // layers, `layer` elements apart (0 without gradients: nothing is kept then), the tokens' rows of W:
  // LN(h) in front of every block and of the last layer; the sigmoid of their SiLU's input, in whose
  // place comes that input's gradient in a block; the SiLU; the gradient of h. And rows of `filled`
  // with the gradient of the output.
  int64_t first, layer;
  float *normalised, *sigmoid, *activated, *gradient, *output;
  // Sums over tokens:
  double* loss;           // (groups,), of weight times square
  float* grad_bias;       // (groups, B + 1, W), of the gradients of h
  float* grad_out;        // (groups, filled), of those of the output
  float* grad_embedding;  // (runs, B, W), of those in front of a block's SiLU
};

// Bytes of scratch memory that a call of token_mlp_loss needs.
inline int64_t token_loss_scratch(const TokenLossArgs& a) {
  return (2 * a.width + a.blocks + 1) * kGroupTokens * static_cast<int64_t>(sizeof(float));
}

// Forward and, with `gradients`, backward pass of the tokens of groups [begin, end).
DIFFAD_KERNEL(token_mlp_loss, const TokenLossArgs& args, void* scratch, int64_t begin, int64_t end)

// out (rows, columns) = a^T b, or += it, of a (tokens, rows) and b (tokens, columns). `columns` is a
// multiple of kWidthStep.
struct OuterProduct {
  const float *a, *b;
  float* out;
  int64_t rows, columns;
  int64_t a_row;  // elements from token to token of a; of b these are `columns`
};
DIFFAD_KERNEL(token_outer_products, const OuterProduct* products, int64_t tokens, bool add,
              int64_t begin, int64_t end)

// out (columns, filled) = in^T, in (rows, columns), and zeros to its right.
struct Transposed {
  const float* in;
  float* out;
  int64_t rows, columns, filled;
};
DIFFAD_KERNEL(token_transposed, const Transposed* matrices, int64_t begin, int64_t end)

}  // namespace diffad
