// token_mlp_loop on the CPU: what the operator hands to its kernel.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace diffad {

// The most tokens of a tile. It is also the widest group of tokens that a kernel works on at once:
// two vectors of 16 floats.
constexpr int64_t kTokenTile = 32;
// What AMX has rows of weights, and numbers of rows, filled up to.
constexpr int64_t kAmxInputs = 32;
constexpr int64_t kAmxOutputs = 16;

struct TokenMlpArgs {
  // A loop has M tokens, one level and S steps. Evaluations that leave x as it is run side by side:
  // as M S tokens, S levels and one step, where token i is row i / levels of x, and its numbers are
  // those of row i % levels of the table.
  int64_t tokens, levels, steps;
  int64_t tile;                 // tokens of a tile, at most kTokenTile
  int64_t size, width, blocks;  // D, W, B
  DType dtype;                  // of x and x_end
  DType weight_dtype;           // what the inputs of matrix products are rounded to
  // Inputs of W_in, and of the other matrices; for AMX with those filled up.
  int64_t row_in, row;
  int64_t matrix;  // elements from matrix to matrix
  const void* x;
  int64_t x_stride;  // elements between tokens; the elements of a token lie side by side
  void* x_end;       // (M, D); with levels, that of the first
  // (tokens, steps), and everything below, in compute_t of `dtype`, contiguous, the matrices column
  // by column; in token_mlp_loop_bf16 these are of bf16, and for AMX lie row by row.
  void* stats;
  const void *w_in, *b_in, *w1, *w2, *b2, *w_out, *b_out, *step_bias, *table;
};

// Bytes of scratch memory that a call of the kernel needs.
inline int64_t token_mlp_scratch(const TokenMlpArgs& a) {
  // Vectors, whichever way they lie.
  const auto whole = [](int64_t n) { return (n + 15) / 16 * 16; };
  const int64_t tokens = whole(a.tile);
  const int64_t size = whole(a.size), width = whole(a.width), biases = a.levels > 1 ? width : 0;
  const int64_t widest = whole(a.row_in > a.row ? a.row_in : a.row);
  return (size + width + 2 * widest + biases) * tokens * (a.dtype == DType::kDouble ? 8 : 4);
}

// Tiles [begin, end).
DIFFAD_KERNEL(token_mlp_loop, const TokenMlpArgs& args, void* scratch, int64_t begin, int64_t end)
// For weights in bfloat16 and a state in float32.
DIFFAD_BF16_KERNEL(token_mlp_loop_bf16, const TokenMlpArgs& args, void* scratch, int64_t begin,
                   int64_t end)

// Calls f(first token, how many) for tiles [begin, end).
template <class F>
void for_tiles(const TokenMlpArgs& a, int64_t begin, int64_t end, F&& f) {
  for (int64_t first = begin * a.tile; first < end * a.tile && first < a.tokens; first += a.tile) {
    f(first, a.tokens - first < a.tile ? a.tokens - first : a.tile);
  }
}

}  // namespace diffad
