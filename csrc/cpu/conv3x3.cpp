// conv3x3 on the CPU: arguments, outputs and threads. The work is in kernels/conv3x3.cpp.
#include "kernels/conv3x3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "../common/tensor.h"
#include "layout.h"
#include "operators.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

// Multiply-adds, or numbers moved, below which a thread is not worth its start.
constexpr int64_t kGrain = 1 << 19, kMoveGrain = 1 << 15;
// Tiles that a thread transforms before it multiplies: whole blocks of the product's rows, few
// enough to stay in a second-level cache beside the weights that stream through it.
constexpr int64_t kAtOnce = 18, kCache = 640 << 10;
// What a chunk of the gradient for the weights may take: threads read each other's transforms, from
// the cache that they share.
constexpr int64_t kSharedCache = 8 << 20;
constexpr int64_t kChunkTiles = 192;
// Fewer tiles for each thread leave registers of the product without work.
constexpr int64_t kTilesOfThread = 12;

float* data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
const float* read(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

int64_t grain(int64_t per_item, int64_t worth = kGrain) {
  return std::max<int64_t>(1, worth / std::max<int64_t>(1, per_item));
}

// `x`, or a copy of it with its channels next to each other.
Tensor with_dense_channels(const Tensor& x) {
  using torch::headeronly::MemoryFormat;
  return x.stride(1) == 1 ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

Pixels pixels(const Tensor& x) { return {read(x), x.stride(0), x.stride(2), x.stride(3)}; }

TileGrid grid_of(const Tensor& x) {
  const int64_t h = x.size(2), w = x.size(3);
  return {h, w, (h + kTile - 1) / kTile, (w + kTile - 1) / kTile};
}

int64_t tiles_of(const Tensor& x, const TileGrid& grid) {
  return x.size(0) * grid.rows * grid.columns;
}

void check_images(const Tensor& x, const char* op) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float, op,
                  ": expected float32 (N, C, H, W)");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(1) % kChannelBlock == 0, op, ": ", x.size(1),
                  " channels are not a multiple of ", kChannelBlock);
}

// The packed form of weights (O, I, 3, 3), or `turned`: of those of the gradient for the input.
Tensor conv3x3_pack(const Tensor& weight, bool turned) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == ScalarType::Float &&
                      weight.size(2) == 3 && weight.size(3) == 3,
                  "conv3x3_pack: expected float32 (O, I, 3, 3)");
  const int64_t axis = turned ? 1 : 0;
  const int64_t outputs = weight.size(axis), inputs = weight.size(1 - axis);
  STD_TORCH_CHECK(outputs > 0 && outputs % kChannelBlock == 0 && inputs > 0,
                  "conv3x3_pack: ", outputs, " outputs are not a multiple of ", kChannelBlock);
  Tensor packed = empty_dense(
      weight, {outputs / kChannelBlock, kPoints, inputs, kChannelBlock});
  huge_pages(packed);
  const int64_t row = weight.stride(2), column = weight.stride(3);
  ConvPack a{read(weight), weight.stride(axis), weight.stride(1 - axis), row, column, inputs,
             data(packed)};
  if (turned) a.weight += 2 * (row + column), a.row = -row, a.column = -column;
  torch::stable::parallel_for(
      0, outputs / kChannelBlock * inputs, grain(kPoints * kChannelBlock, kMoveGrain),
      [&](int64_t begin, int64_t end) { conv3x3_pack_kernel()(a, begin, end); });
  return packed;
}

}  // namespace

Tensor conv3x3(const Tensor& input, const Tensor& packed, OptionalTensor bias,
               OptionalTensor residual) {
  check_images(input, "conv3x3");
  const int64_t n = input.size(0), h = input.size(2), w = input.size(3);
  STD_TORCH_CHECK(packed.dim() == 4 && packed.scalar_type() == ScalarType::Float &&
                      packed.is_contiguous() && packed.size(1) == kPoints &&
                      packed.size(2) == input.size(1) && packed.size(3) == kChannelBlock,
                  "conv3x3: the weights are not packed for ", input.size(1), " channels");
  const int64_t outputs = packed.size(0) * kChannelBlock;
  Tensor y = empty_4d(input, {n, outputs, h, w}, true);
  if (y.numel() == 0) return y;
  huge_pages(y);
  const Tensor x = with_dense_channels(input);

  ConvForward a{};
  a.grid = grid_of(x);
  a.inputs = x.size(1);
  a.outputs = outputs;
  a.x = pixels(x);
  a.packed = read(packed);
  a.y = data(y);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == outputs &&
                        bias->scalar_type() == ScalarType::Float,
                    "conv3x3: expected a float32 bias (", outputs, ")");
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    a.bias = read(*bias);
  }
  if (residual) {
    bool fits = residual->dim() == 4 && residual->scalar_type() == ScalarType::Float;
    for (int64_t i = 0; fits && i < 4; ++i) fits = residual->size(i) == y.size(i);
    STD_TORCH_CHECK(fits, "conv3x3: the residual is not float32 of the output's shape");
    residual = with_dense_channels(*residual);
    a.residual = pixels(*residual);
  }
  const std::vector<float> zeros(a.inputs);
  a.zeros = zeros.data();
  a.at_once = std::clamp<int64_t>(kCache / (kPoints * a.inputs * 4) / 6 * 6, 6, kAtOnce);
  const int64_t tiles = tiles_of(x, a.grid), blocks = outputs / kChannelBlock;
  const auto run = [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    const int64_t at_once = std::min(a.at_once, end - begin);
    const std::unique_ptr<float[]> scratch(new float[conv3x3_scratch(a.inputs, at_once)]);
    conv3x3_forward_kernel()(a, scratch.get(), begin, end, first, last);
  };
  // Threads share the tiles; where these are few they share the outputs instead: each transforms
  // all tiles, which is little, and reads its part of the weights, which is much.
  if (tiles >= kTilesOfThread * torch::stable::get_num_threads()) {
    torch::stable::parallel_for(
        0, tiles, grain(kPoints * a.inputs * outputs),
        [&](int64_t begin, int64_t end) { run(begin, end, 0, outputs); });
  } else {
    torch::stable::parallel_for(0, blocks, grain(kPoints * a.inputs * tiles * kChannelBlock),
                                [&](int64_t begin, int64_t end) {
                                  run(0, tiles, begin * kChannelBlock, end * kChannelBlock);
                                });
  }
  return y;
}

namespace {

// The gradient for the weights, (O, I, 3, 3).
Tensor conv3x3_weight_gradient(const Tensor& gradient, const Tensor& input) {
  check_images(gradient, "conv3x3_weight_gradient");
  check_images(input, "conv3x3_weight_gradient");
  for (int64_t axis : {0, 2, 3}) {
    STD_TORCH_CHECK(gradient.size(axis) == input.size(axis),
                    "conv3x3_weight_gradient: gradient and input differ in size");
  }
  const int64_t outputs = gradient.size(1), inputs = input.size(1);
  Tensor weight = empty_dense(input, {outputs, inputs, 3, 3});
  if (input.numel() == 0) return torch::stable::zero_(weight);
  const Tensor x = with_dense_channels(input), grad = with_dense_channels(gradient);

  ConvGradient a{};
  a.grid = grid_of(x);
  a.inputs = inputs;
  a.outputs = outputs;
  a.x = pixels(x);
  a.grad = pixels(grad);
  const std::vector<float> zeros(std::max(inputs, outputs));
  a.zeros = zeros.data();
  const int64_t tiles = tiles_of(x, a.grid);
  // The cut into chunks is the order of the sum: it depends on the shape alone.
  const int64_t fit = kSharedCache / (kPoints * (inputs + outputs) * 4);
  const int64_t most = std::clamp<int64_t>(fit, 24, kChunkTiles);
  const int64_t chunks = (tiles + most - 1) / most, largest = (tiles + chunks - 1) / chunks;
  const auto points = [&](int64_t channels) { return kPoints * (largest * channels + kPointGap); };
  const Tensor space = empty_dense(x, {points(inputs) + points(outputs)});
  huge_pages(space);
  a.x_points = data(space);
  a.grad_points = a.x_points + points(inputs);
  const Tensor packed = empty_dense(x, {kPoints * (outputs * inputs + kPointGap)});
  huge_pages(packed);
  a.packed = data(packed);
  const int64_t groups = (outputs + kGroup - 1) / kGroup;
  for (a.first = 0; a.first < tiles; a.first += a.tiles) {
    a.tiles = std::min(largest, tiles - a.first);
    torch::stable::parallel_for(
        0, a.tiles, grain(kPoints * (inputs + outputs), kMoveGrain),
        [&](int64_t begin, int64_t end) { conv3x3_transform_kernel()(a, begin, end); });
    torch::stable::parallel_for(
        0, kPoints * groups, grain(a.tiles * inputs * kGroup),
        [&](int64_t begin, int64_t end) { conv3x3_products_kernel()(a, begin, end); });
  }
  const ConvUnpack unpack{a.packed, inputs, outputs, data(weight)};
  torch::stable::parallel_for(
      0, outputs / kChannelBlock * inputs, grain(kPoints * kChannelBlock, kMoveGrain),
      [&](int64_t begin, int64_t end) { conv3x3_unpack_kernel()(unpack, begin, end); });
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&conv3x3));
  m.impl("conv3x3_pack", TORCH_BOX(&conv3x3_pack));
  m.impl("conv3x3_weight_gradient", TORCH_BOX(&conv3x3_weight_gradient));
}

}  // namespace
}  // namespace diffad
