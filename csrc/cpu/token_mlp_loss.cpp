// token_mlp_loss on the CPU: the denoising loss of the token MLP and all its gradients in one call.
//
// Chunks of the batch go through two parts, each on several threads: groups of tokens through the
// forward and the backward pass, then the products over all tokens of the chunk that make the weights'
// gradients, some rows of a matrix at a time. In the end what the groups left is added up.
#include "kernels/token_mlp_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/tensor.h"
#include "layout.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

// Tokens of a chunk, of which what is kept for the weights' gradients lies in the cache that cores
// share.
constexpr int64_t kChunkTokens = 512;
// Rows of a gradient that a thread makes at once.
constexpr int64_t kOuterRows = 64;
// Multiply-adds below which a thread is not worth its start.
constexpr int64_t kGrain = 1 << 19;

float* data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
const float* read(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

// out (columns,) = the sums over `rows` rows, `next` elements apart.
void sum_rows(const float* part, int64_t rows, int64_t next, int64_t columns, float* out) {
  std::fill_n(out, columns, 0.0f);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[c] += part[r * next + c];
  }
}

void check(const Tensor& x, const Tensor& target, const Tensor& weight,
           const std::vector<Tensor>& weights, const Tensor& step_bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weights.size() == 7 && weights[0].dim() == 2 &&
                      weights[2].dim() == 3 && step_bias.dim() == 3,
                  "token_mlp_loss: expected x (M,D), seven weights, step_bias (S,B,W)");
  const int64_t m = x.size(0), d = x.size(1), w = weights[0].size(0), b = weights[2].size(0);
  const int64_t levels = step_bias.size(0);
  STD_TORCH_CHECK(m > 0 && d > 0 && b > 0 && levels > 0 && w > 0 && m % levels == 0 &&
                      w % kWidthStep == 0,
                  "token_mlp_loss: M must be a multiple of S, W of ", kWidthStep, ", none 0");
  const auto same = [&](const Tensor& t, std::vector<int64_t> shape) {
    bool fits = t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous() &&
                t.scalar_type() == ScalarType::Float && t.device() == x.device();
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = t.size(i) == shape[i];
    STD_TORCH_CHECK(fits, "token_mlp_loss: a tensor is not contiguous float32 of its shape");
  };
  same(x, {m, d}), same(target, {m, d}), same(weight, {m}), same(step_bias, {levels, b, w});
  same(weights[0], {w, d}), same(weights[1], {w}), same(weights[2], {b, w, w});
  same(weights[3], {b, w, w}), same(weights[4], {b, w}), same(weights[5], {d, w});
  same(weights[6], {d});
}

// Of S levels of so many tokens each.
TokenRuns runs_of(int64_t levels, int64_t rows) {
  const int64_t parts = (rows + kGroupTokens - 1) / kGroupTokens;
  return {rows, parts, parts > 1 ? 1 : std::max<int64_t>(1, kGroupTokens / rows), levels * parts};
}

// Calls f(begin, end) for [begin, end) in parts, each of them so many multiply-adds.
template <class F>
void on_threads(int64_t begin, int64_t end, int64_t work, const F& f) {
  torch::stable::parallel_for(begin, end, std::max<int64_t>(1, kGrain / (work + 1)), f);
}

// The weights as the forward pass reads them, in a buffer that is returned.
Tensor transpose_weights(TokenLossArgs& a, const Tensor& w_in) {
  const int64_t d = a.size, w = a.width, blocks = a.blocks;
  const Tensor all = empty_dense(w_in, {d * w + 2 * blocks * w * w + w * a.filled});
  std::vector<Transposed> matrices;
  float* next = data(all);
  const auto transposed = [&](const float* in, int64_t count, int64_t rows, int64_t columns,
                              int64_t filled) {
    const float* first = next;
    for (int64_t i = 0; i < count; ++i) {
      matrices.push_back({in + i * rows * columns, next, rows, columns, filled});
      next += columns * filled;
    }
    return first;
  };
  a.w_in_t = transposed(read(w_in), 1, w, d, w);
  a.w1_t = transposed(a.w1, blocks, w, w, w);
  a.w2_t = transposed(a.w2, blocks, w, w, w);
  a.w_out_t = transposed(a.w_out, 1, d, w, a.filled);
  on_threads(0, matrices.size(), w * w, [&](int64_t begin, int64_t end) {
    token_transposed_kernel()(matrices.data(), begin, end);
  });
  return all;
}

// Those that make the gradients of the matrices from what lies in the buffers; that of W_in (D, W),
// transposed, since vectors are of W.
std::vector<OuterProduct> outer_products(const TokenLossArgs& a, const std::vector<Tensor>& grads,
                                         const Tensor& w_in_grad) {
  const int64_t d = a.size, w = a.width;
  std::vector<OuterProduct> products;
  const auto add = [&](const float* left, int64_t row, int64_t rows, const float* right,
                       float* out) {
    for (int64_t r = 0; r < rows; r += kOuterRows) {
      const int64_t some = std::min(kOuterRows, rows - r);
      products.push_back({left + r, right, out + r * w, some, w, row});
    }
  };
  const auto layer = [&](float* array, int64_t l) { return array + l * a.layer; };
  add(a.x + a.first * d, d, d, a.gradient, data(w_in_grad));
  for (int64_t l = 0; l < a.blocks; ++l) {
    const int64_t matrix = l * w * w;
    add(layer(a.sigmoid, l), w, w, layer(a.normalised, l), data(grads[2]) + matrix);
    add(layer(a.gradient, l + 1), w, w, layer(a.activated, l), data(grads[3]) + matrix);
  }
  add(a.output, a.filled, d, layer(a.activated, a.blocks), data(grads[5]));
  return products;
}

// The loss, a scalar, and its gradients for the seven weights and step_bias; without `gradients`
// an empty list.
std::tuple<Tensor, std::vector<Tensor>> token_mlp_loss(const Tensor& x, const Tensor& target,
                                                       const Tensor& weight,
                                                       const std::vector<Tensor>& weights,
                                                       const Tensor& step_bias, bool gradients) {
  check(x, target, weight, weights, step_bias);
  const int64_t m = x.size(0), d = x.size(1), w = weights[0].size(0), blocks = weights[2].size(0);
  const int64_t levels = step_bias.size(0), layers = blocks + 1;
  const int64_t filled = up_to(kWidthStep, d);

  TokenLossArgs a{};
  const TokenRuns& runs = a.runs = runs_of(levels, m / levels);
  a.size = d, a.filled = filled, a.width = w, a.blocks = blocks;
  a.x = read(x), a.target = read(target), a.weight = read(weight);
  a.b_in = read(weights[1]), a.w1 = read(weights[2]), a.w2 = read(weights[3]);
  a.b2 = read(weights[4]), a.w_out = read(weights[5]), a.b_out = read(weights[6]);
  a.step_bias = read(step_bias);
  a.factor = 2.0f / static_cast<float>(m * d);
  a.gradients = gradients;

  const int64_t groups = (runs.count + runs.of_group - 1) / runs.of_group;
  const int64_t group_tokens = runs.of_group * ((runs.rows + runs.parts - 1) / runs.parts);
  const int64_t chunk = std::max<int64_t>(1, kChunkTokens / group_tokens);
  const int64_t kept = std::min(m, chunk * group_tokens);
  a.layer = gradients ? kept * w : 0;
  const int64_t array = (gradients ? layers : 1) * kept * w;
  const Tensor space = empty_dense(x, {(gradients ? 4 : 3) * array + kept * filled});
  a.output = data(space);
  a.normalised = a.output + kept * filled;
  a.sigmoid = a.normalised + array;
  a.activated = a.sigmoid + array;
  a.gradient = a.activated + array;
  const Tensor sums = empty_dense(x, {groups, layers * w + filled});
  a.grad_bias = data(sums);
  a.grad_out = a.grad_bias + groups * layers * w;
  std::vector<double> losses(groups);
  a.loss = losses.data();
  std::vector<Tensor> grads;
  Tensor w_in_grad, embedding;
  if (gradients) {
    for (const Tensor& t : weights) grads.push_back(empty_dense(t, t.sizes()));
    grads.push_back(empty_dense(step_bias, step_bias.sizes()));
    w_in_grad = empty_dense(x, {d, w});
    embedding = runs.parts == 1 ? grads[7] : empty_dense(x, {runs.count, blocks, w});
    a.grad_embedding = data(embedding);
  }
  const Tensor transposed = transpose_weights(a, weights[0]);

  const auto first_token = [&](int64_t group) {
    return runs.begin(std::min(group * runs.of_group, runs.count));
  };
  for (int64_t first = 0; first < groups; first += chunk) {
    const int64_t last = std::min(first + chunk, groups);
    a.first = first_token(first);
    const int64_t passes = (gradients ? 4 : 2) * w * (d + blocks * w);
    on_threads(first, last, group_tokens * passes, [&](int64_t begin, int64_t end) {
      const Scratch scratch = scratch_of(token_loss_scratch(a));
      token_mlp_loss_kernel()(a, scratch.get(), begin, end);
    });
    if (!gradients) continue;
    const int64_t tokens = first_token(last) - a.first;
    const std::vector<OuterProduct> products = outer_products(a, grads, w_in_grad);
    on_threads(0, products.size(), kOuterRows * w * tokens, [&](int64_t begin, int64_t end) {
      token_outer_products_kernel()(products.data(), tokens, first > 0, begin, end);
    });
  }

  double loss = 0;
  for (const double part : losses) loss += part;
  Tensor result = empty_dense(x, {});
  *data(result) = static_cast<float>(loss / static_cast<double>(m * d));
  if (!gradients) return {result, grads};
  const Transposed back{read(w_in_grad), data(grads[0]), d, w, d};
  token_transposed_kernel()(&back, 0, 1);
  sum_rows(a.grad_bias, groups, layers * w, w, data(grads[1]));
  sum_rows(a.grad_bias + w, groups, layers * w, blocks * w, data(grads[4]));
  sum_rows(a.grad_out, groups, filled, d, data(grads[6]));
  const int64_t row = blocks * w;
  for (int64_t level = 0; level < levels && runs.parts > 1; ++level) {
    sum_rows(a.grad_embedding + level * runs.parts * row, runs.parts, row, row,
             data(grads[7]) + level * row);
  }
  return {result, grads};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("token_mlp_loss", TORCH_BOX(&token_mlp_loss));
}

}  // namespace
}  // namespace diffad
