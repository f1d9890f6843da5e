// token_mlp_loop on the CPU: arguments, outputs and threads. The work is in
// kernels/token_mlp_loop.cpp.
#include "kernels/token_mlp_loop.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "../common/token_mlp.h"
#include "dtype_of.h"
#include "layout.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

// Of fewer tokens than these, reading the weights takes a good part of the time.
constexpr int64_t kFewTokens = 16;
// Tokens, and multiply-adds, below which a thread is not worth its start: for fewer tokens the
// readings of the weights take as long as the work.
constexpr int64_t kTokensOfThread = 4;
constexpr int64_t kGrain = 1 << 19;

// `x` itself where it is contiguous and of that dtype already.
Tensor as(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) return x.is_contiguous() ? x : torch::stable::contiguous(x);
  return torch::stable::to(x, dtype, std::nullopt, std::nullopt, std::nullopt, false, false,
                           torch::headeronly::MemoryFormat::Contiguous);
}

// Whether the columns of matrices (..., rows, columns) follow each other in memory without gaps.
bool by_columns(const Tensor& w) {
  const int64_t axis = w.dim() - 2, rows = w.size(axis);
  return w.stride(axis) == 1 && w.stride(axis + 1) == rows &&
         (axis == 0 || w.stride(0) == rows * w.size(axis + 1));
}

// (..., rows, columns) with zeros to whole blocks of rows and groups of columns; `w` itself where
// it has them.
Tensor filled_up(const Tensor& w) {
  const int64_t axis = w.dim() - 2;
  const int64_t rows = w.size(axis), columns = w.size(axis + 1);
  const int64_t more_rows = up_to(kAmxOutputs, rows), more_columns = up_to(kAmxInputs, columns);
  if (rows == more_rows && columns == more_columns) return w;
  const int64_t matrices = axis == 1 ? w.size(0) : 1;
  const Tensor filled = torch::stable::new_zeros(w, {matrices, more_rows, more_columns});
  const auto* from = static_cast<const uint16_t*>(w.const_data_ptr());
  auto* to = static_cast<uint16_t*>(filled.mutable_data_ptr());
  for (int64_t m = 0; m < matrices; ++m) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(from + (m * rows + r) * columns, columns,
                  to + (m * more_rows + r) * more_columns);
    }
  }
  return filled;
}

// Whether no row of the table (S, 5) changes x: A = 1 and Bm = 0.
template <class C>
bool leaves_x(const void* table, int64_t steps) {
  const C* row = static_cast<const C*>(table);
  for (int64_t s = 0; s < steps; ++s, row += 5) {
    if (row[1] != 1 || row[2] != 0) return false;
  }
  return true;
}

template <class C>
bool all_finite(const void* numbers, int64_t count) {
  const C* p = static_cast<const C*>(numbers);
  return std::all_of(p, p + count, [](C x) { return std::isfinite(x); });
}

std::tuple<Tensor, Tensor> token_mlp_loop(const Tensor& x, const Tensor& w_in, const Tensor& b_in,
                                          const Tensor& w1, const Tensor& w2, const Tensor& b2,
                                          const Tensor& w_out, const Tensor& b_out,
                                          const Tensor& step_bias, const Tensor& table) {
  check_token_mlp(x, w_in, b_in, w1, w2, b2, w_out, b_out, step_bias, table);
  const DType weight_dtype = dtype_of(w_in, "token_mlp_loop");
  const ScalarType outer = x.scalar_type();
  // One wide operand makes the whole loop wide.
  const bool wide = outer == ScalarType::Double || weight_dtype == DType::kDouble;
  const ScalarType state = wide ? ScalarType::Double : ScalarType::Float;
  Tensor in = wide ? as(x, state) : x;
  if (in.size(1) > 1 && in.stride(1) != 1) in = torch::stable::contiguous(in);

  TokenMlpArgs a{};
  const int64_t tokens = x.size(0), steps = table.size(0);
  a.size = x.size(1);
  a.width = w_in.size(0);
  a.blocks = w1.size(0);
  a.dtype = dtype_of(in, "token_mlp_loop");
  a.weight_dtype = weight_dtype;
  Tensor x_end = empty_dense(in, {tokens, a.size});
  Tensor stats = empty_dense(in, {tokens, steps}, state);
  auto* kernel = token_mlp_loop_bf16_kernel();
  const bool dots = kernel != nullptr && weight_dtype == DType::kBFloat16 && !wide;
  if (!dots) kernel = token_mlp_loop_kernel();
  // AMX reads the weights row by row, all others column by column.
  const bool by_rows = dots && active_isa() == Isa::kAmx;
  const ScalarType read_as = dots ? ScalarType::BFloat16 : state;
  const auto matrix = [&](const Tensor& w) {
    if (by_rows) return filled_up(as(w, read_as));
    return w.scalar_type() == read_as && by_columns(w)
               ? w
               : as(torch::stable::transpose(w, w.dim() - 2, w.dim() - 1), read_as);
  };
  a.row_in = by_rows ? up_to(kAmxInputs, a.size) : a.size;
  a.row = by_rows ? up_to(kAmxInputs, a.width) : a.width;
  a.matrix = (by_rows ? up_to(kAmxOutputs, a.width) : a.width) * a.row;
  const Tensor kept[] = {matrix(w_in),     as(b_in, state),      matrix(w1),
                         matrix(w2),       as(b2, state),        matrix(w_out),
                         as(b_out, state), as(step_bias, state), as(table, state)};
  const void** pointers[] = {&a.w_in,  &a.b_in,  &a.w1,        &a.w2,   &a.b2,
                             &a.w_out, &a.b_out, &a.step_bias, &a.table};
  for (int i = 0; i < 9; ++i) *pointers[i] = kept[i].const_data_ptr();
  a.x = in.const_data_ptr();
  a.x_stride = in.stride(0);
  a.x_end = x_end.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();

  const auto run = [&](int64_t levels) {
    a.tokens = tokens * levels;
    a.levels = levels;
    a.steps = levels == 1 ? steps : 1;
    // Several threads have as many tiles each, and smaller ones where tokens are few.
    const int64_t products = 2 * a.width * (a.size + a.blocks * a.width) * a.steps;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t rounds = up_to(threads * kTokenTile, a.tokens) / kTokenTile;
    const int64_t even = threads > 1 && rounds > 0 ? (a.tokens + rounds - 1) / rounds : kTokenTile;
    const int64_t least = std::clamp(kGrain / (products + 1), kTokensOfThread, kTokenTile);
    // Products of AMX are those of whole vectors.
    a.tile = std::clamp(by_rows ? up_to(kAmxOutputs, even) : even, least, kTokenTile);
    const int64_t tiles = (a.tokens + a.tile - 1) / a.tile;
    const int64_t grain = std::max<int64_t>(1, kGrain / (a.tile * products + 1));
    const auto run_tiles = [&](int64_t begin, int64_t end) {
      const Scratch scratch = scratch_of(token_mlp_scratch(a));
      kernel(a, scratch.get(), begin, end);
    };
    if (tiles == 1) {
      run_tiles(0, 1);
    } else if (tiles > 1) {
      torch::stable::parallel_for(0, tiles, grain, run_tiles);
    }
  };
  bool done = false;
  if (tokens > 0 && tokens < kFewTokens && steps > 1 &&
      (wide ? leaves_x<double>(a.table, steps) : leaves_x<float>(a.table, steps))) {
    // The same numbers from fewer readings of the weights; only a zero in x keeps its sign. Not
    // where the network gives infinity or NaN, which 0 times it hands on to the next level.
    run(steps);
    done = wide ? all_finite<double>(a.stats, tokens * steps)
                : all_finite<float>(a.stats, tokens * steps);
  }
  if (!done) run(1);
  if (outer != in.scalar_type()) {
    x_end = torch::stable::to(x_end, outer);
    stats = torch::stable::to(stats, ScalarType::Float);
  }
  return {x_end, stats};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("token_mlp_loop", TORCH_BOX(&token_mlp_loop));
}

}  // namespace
}  // namespace diffad
