// token_mlp_loop on CUDA, one kernel for all layers and steps: bf16 weights, width 128 or 256, any
// D. The kernel is in token_mlp_tile.h.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../common/token_mlp.h"
#include "launch.h"
#include "mma.h"
#include "token_mlp_tile.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

template <int W, int kTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 1) token_mlp_kernel(const TokenMlpTask task) {
  extern __shared__ __align__(128) char shared[];
  TokenMlp<W, kTiles, kWarps>(task, shared).run();
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "token_mlp_loop: ", cudaGetErrorString(error));
}

template <int W, int kTiles, int kWarps>
void launch(const TokenMlpTask& task, int processors, cudaStream_t stream) {
  const auto kernel = token_mlp_kernel<W, kTiles, kWarps>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTokenMlpShared));
  int resident = 0;  // thread blocks that a processor holds at once
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, 32 * kWarps,
                                                      kTokenMlpShared));
  const int per_block = kWarps * 16 * kTiles;
  const int tiles = (task.tokens + per_block - 1) / per_block;
  const int grid = std::min(tiles, std::max(1, resident) * processors);
  kernel<<<grid, 32 * kWarps, kTokenMlpShared, stream>>>(task);
  check_launch("token_mlp_loop");
}

Tensor as(const Tensor& x, ScalarType dtype) {
  const Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return y.is_contiguous() ? y : torch::stable::contiguous(y);
}

std::tuple<Tensor, Tensor> token_mlp_loop(const Tensor& x, const Tensor& w_in, const Tensor& b_in,
                                          const Tensor& w1, const Tensor& w2, const Tensor& b2,
                                          const Tensor& w_out, const Tensor& b_out,
                                          const Tensor& step_bias, const Tensor& table) {
  check_token_mlp(x, w_in, b_in, w1, w2, b2, w_out, b_out, step_bias, table);
  const int64_t d = x.size(1), width = w_in.size(0), steps = table.size(0);
  STD_TORCH_CHECK(w_in.scalar_type() == ScalarType::BFloat16 && (width == 128 || width == 256) &&
                      x.scalar_type() != ScalarType::Double,
                  "token_mlp_loop: the CUDA kernel serves bfloat16 weights of width 128 and 256 "
                  "and x in float32, bfloat16 or float16");
  // Tokens are counted in 32 bits, and so is the first token past a whole round of the grid.
  STD_TORCH_CHECK(x.size(0) < int64_t{1} << 30 && d < 1 << 20 && steps < 1 << 20,
                  "token_mlp_loop: too many tokens, features or steps for the CUDA kernel");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const ScalarType outer = x.scalar_type();
  Tensor x_end = empty_dense(x, {x.size(0), d}, ScalarType::Float);
  Tensor stats = empty_dense(x, {x.size(0), steps}, ScalarType::Float);
  const Tensor first = as(x, ScalarType::Float);
  if (steps == 0) torch::stable::copy_(x_end, first);
  if (steps > 0 && x.size(0) > 0) {
    // Rows of whole 16-byte units, for the asynchronous copies.
    const int64_t pitch = (d + 7) / 8 * 8;
    Tensor padded = as(w_in, ScalarType::BFloat16);
    if (pitch != d) padded = torch::stable::pad(padded, {0, pitch - d});
    const auto bf16 = [](const Tensor& t) { return as(t, ScalarType::BFloat16); };
    const Tensor kept[] = {padded,  bf16(b_in),  bf16(w1),   bf16(w2),
                           bf16(b2), bf16(w_out), bf16(b_out)};
    const Tensor bias = as(step_bias, ScalarType::Float), rows = as(table, ScalarType::Float);
    const auto weight = [&](int i) { return static_cast<const uint16_t*>(kept[i].const_data_ptr()); };
    constexpr int read_at_once[] = {16, 4, 16, 16, 4, 16, 2};  // bytes
    for (int i = 0; i < 7; ++i) {
      STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(weight(i)) % read_at_once[i] == 0,
                      "token_mlp_loop: weights must start at multiples of 16 bytes, biases of 4; "
                      "clone them");
    }
    TokenMlpTask task{};
    task.tokens = static_cast<int>(x.size(0));
    task.size = static_cast<int>(d);
    task.pitch = static_cast<int>(pitch);
    task.blocks = static_cast<int>(w1.size(0));
    task.steps = static_cast<int>(steps);
    const uint16_t** weights[] = {&task.w_in, &task.b_in,  &task.w1,   &task.w2,
                                  &task.b2,   &task.w_out, &task.b_out};
    for (int i = 0; i < 7; ++i) *weights[i] = weight(i);
    task.step_bias = static_cast<const float*>(bias.const_data_ptr());
    task.table = static_cast<const float*>(rows.const_data_ptr());
    task.x = static_cast<const float*>(first.const_data_ptr());
    task.x_end = static_cast<float*>(x_end.mutable_data_ptr());
    task.stats = static_cast<float*>(stats.mutable_data_ptr());

    int processors = 1;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                 x.get_device_index()));
    const cudaStream_t stream = current_stream(x);
    // Many tokens: as many as registers hold, so that weights are read least often. Few: more
    // thread blocks, until every processor has one.
    const bool many = task.tokens >= 128 * processors;
    const auto run = width == 256 ? (many ? launch<256, 1, 8> : launch<256, 1, 4>)
                                  : (many ? launch<128, 2, 8> : launch<128, 1, 4>);
    run(task, processors, stream);
  }
  return {outer == ScalarType::Float ? x_end : torch::stable::to(x_end, outer), stats};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("token_mlp_loop", TORCH_BOX(&token_mlp_loop));
}

}  // namespace
}  // namespace diffad
