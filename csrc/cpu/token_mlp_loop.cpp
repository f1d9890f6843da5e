// token_mlp_loop on the CPU: arguments, outputs and threads. The work is in
// kernels/token_mlp_loop.cpp.
#include "kernels/token_mlp_loop.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <tuple>

#include "../common/token_mlp.h"
#include "dtype_of.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

// Multiply-adds below which a thread is not worth its start.
constexpr int64_t kGrain = 1 << 19;

// `x` itself where it is contiguous and of that dtype already.
Tensor as(const Tensor& x, ScalarType dtype) {
  const Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return y.is_contiguous() ? y : torch::stable::contiguous(y);
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
  a.tokens = x.size(0);
  a.size = x.size(1);
  a.width = w_in.size(0);
  a.blocks = w1.size(0);
  a.steps = table.size(0);
  a.dtype = dtype_of(in, "token_mlp_loop");
  a.weight_dtype = weight_dtype;
  Tensor x_end = torch::stable::new_empty(in, {a.tokens, a.size});
  Tensor stats = torch::stable::new_empty(in, {a.tokens, a.steps}, state);
  const Tensor kept[] = {as(w_in, state), as(b_in, state),      as(w1, state),
                         as(w2, state),   as(b2, state),        as(w_out, state),
                         as(b_out, state), as(step_bias, state), as(table, state)};
  const void** pointers[] = {&a.w_in,  &a.b_in,  &a.w1,        &a.w2,   &a.b2,
                             &a.w_out, &a.b_out, &a.step_bias, &a.table};
  for (int i = 0; i < 9; ++i) *pointers[i] = kept[i].const_data_ptr();
  a.x = in.const_data_ptr();
  a.x_stride = in.stride(0);
  a.x_end = x_end.mutable_data_ptr();
  a.stats = stats.mutable_data_ptr();

  const int64_t products = 2 * a.width * (a.size + a.blocks * a.width);
  const int64_t tiles = (a.tokens + kTokenTile - 1) / kTokenTile;
  const int64_t grain = std::max<int64_t>(1, kGrain / (kTokenTile * products * a.steps + 1));
  const auto run = [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> scratch(new char[token_mlp_scratch(a)]);
    token_mlp_loop_kernel()(a, scratch.get(), begin, end);
  };
  if (tiles == 1) {
    run(0, 1);
  } else if (tiles > 1) {
    torch::stable::parallel_for(0, tiles, grain, run);
  }
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
