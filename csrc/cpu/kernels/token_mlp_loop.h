// token_mlp_loop on the CPU: what the operator hands to its kernel.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace diffad {

// Tokens of a tile. It is also the widest group of tokens that a kernel works on at once: two
// vectors of 16 floats.
constexpr int64_t kTokenTile = 32;
// What rows of bfloat16 weights, and numbers of rows, are filled up to.
constexpr int64_t kBf16Inputs = 32;
constexpr int64_t kBf16Outputs = 16;

struct TokenMlpArgs {
  // A loop has M tokens, one level and S steps. Evaluations that leave x as it is run side by side:
  // as M S tokens, S levels and one step, where token i is row i / levels of x, and its numbers are
  // those of row i % levels of the table.
  int64_t tokens, levels, steps;
  int64_t size, width, blocks;  // D, W, B
  DType dtype;                  // of x and x_end
  DType weight_dtype;           // what the inputs of matrix products are rounded to
  int64_t row_in, row;  // elements from row to row of W_in, and of the other matrices
  int64_t matrix;       // and from matrix to matrix
  const void* x;
  int64_t x_stride;  // elements between tokens; the elements of a token lie side by side
  void* x_end;       // (M, D); with levels, that of the first
  // (tokens, steps), and everything below, in compute_t of `dtype`, contiguous; in
  // token_mlp_loop_bf16 the matrices are of bf16.
  void* stats;
  const void *w_in, *b_in, *w1, *w2, *b2, *w_out, *b_out, *step_bias, *table;
};

// Bytes of scratch memory that a call of the kernel needs.
inline int64_t token_mlp_scratch(const TokenMlpArgs& a) {
  // Vectors, whichever way they lie.
  const auto whole = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t tokens = a.tokens < kTokenTile ? whole(a.tokens) : kTokenTile;
  const int64_t size = whole(a.size), width = whole(a.width), biases = a.levels > 1 ? width : 0;
  const int64_t widest = whole(a.row_in > a.row ? a.row_in : a.row);
  return (size + width + 2 * widest + biases) * tokens * (a.dtype == DType::kDouble ? 8 : 4);
}

// Tiles [begin, end) of kTokenTile tokens.
DIFFAD_KERNEL(token_mlp_loop, const TokenMlpArgs& args, void* scratch, int64_t begin, int64_t end)
// For weights in bfloat16 and a state in float32.
DIFFAD_BF16_KERNEL(token_mlp_loop_bf16, const TokenMlpArgs& args, void* scratch, int64_t begin,
                   int64_t end)

}  // namespace diffad
