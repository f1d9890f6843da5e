// token_mlp_loss on the CPU: the denoising loss of the token MLP and all its gradients in one call.
//
// Matrix products go to the library that PyTorch carries, everything between them to
// kernels/token_mlp_loss.cpp. Batches are cut into chunks of whole levels, so that what the
// backward pass reads stays in the cache; gradients of weights add up over the chunks.
#include "kernels/token_mlp_loss.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/tensor.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kChunkTokens = 512;
// Numbers below which a thread is not worth its start.
constexpr int64_t kGrain = 1 << 14;

// out = beta out + a b.
void product(const Tensor& out, const Tensor& a, const Tensor& b, bool add = false) {
  TORCH_ERROR_CODE_CHECK(
      add ? aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1)
          : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, 0, 1); }

float* data(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }
const float* read(const Tensor& x) { return static_cast<const float*>(x.const_data_ptr()); }

// out (columns,) += the sums over the rows of `part`.
void add_rows(const float* part, int64_t rows, int64_t columns, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[c] += part[r * columns + c];
  }
}

void check(const Tensor& x, const Tensor& target, const Tensor& weight,
           const std::vector<Tensor>& weights, const Tensor& step_bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weights.size() == 7 && weights[0].dim() == 2 &&
                      weights[2].dim() == 3 && step_bias.dim() == 3,
                  "token_mlp_loss: expected x (M,D), seven weights, step_bias (S,B,W)");
  const int64_t m = x.size(0), d = x.size(1), w = weights[0].size(0), b = weights[2].size(0);
  const int64_t levels = step_bias.size(0);
  STD_TORCH_CHECK(m > 0 && d > 0 && b > 0 && levels > 0 && m % levels == 0 && w % kWidthStep == 0,
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

// The loss, a scalar, and its gradients for the seven weights and step_bias; without `gradients`
// an empty list.
std::tuple<Tensor, std::vector<Tensor>> token_mlp_loss(const Tensor& x, const Tensor& target,
                                                       const Tensor& weight,
                                                       const std::vector<Tensor>& weights,
                                                       const Tensor& step_bias, bool gradients) {
  check(x, target, weight, weights, step_bias);
  const int64_t m = x.size(0), d = x.size(1), w = weights[0].size(0), blocks = weights[2].size(0);
  const int64_t levels = step_bias.size(0), rows = m / levels;
  const int64_t chunk = std::max<int64_t>(1, std::min(levels, kChunkTokens / rows));
  const auto block = [](const Tensor& t, int64_t l) { return torch::stable::select(t, 0, l); };
  const Tensor &w_in = weights[0], &w1 = weights[2], &w2 = weights[3], &w_out = weights[5];
  const float *b_in = read(weights[1]), *b2 = read(weights[4]), *b_out = read(weights[6]);

  // Of a chunk, (tokens, W): h, the input of a product or its result, and what the backward pass
  // needs of every block and of the last layer: LN(h), SiLU and its sigmoid.
  const int64_t kept = gradients ? blocks + 1 : 1;
  const Tensor space = torch::stable::new_empty(x, {2 + 3 * kept, chunk * rows, w});
  const Tensor scales = torch::stable::new_empty(x, {kept, chunk * rows});
  Tensor outputs = torch::stable::new_empty(x, {chunk * rows, d});
  const Tensor sums = torch::stable::new_empty(x, {chunk, std::max(w, d)});
  std::vector<double> losses(chunk);
  std::vector<Tensor> grads;
  if (gradients) {
    for (const Tensor& t : weights) grads.push_back(torch::stable::new_zeros(t, t.sizes()));
    grads.push_back(torch::stable::new_empty(step_bias, step_bias.sizes()));
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / (rows * w));
  double loss = 0;

  for (int64_t first = 0; first < levels; first += chunk) {
    const int64_t count = std::min(chunk, levels - first), tokens = count * rows;
    const auto part = [&](const Tensor& t) {
      return torch::stable::narrow(const_cast<Tensor&>(t), 0, first * rows, tokens);
    };
    const auto buffer = [&](int64_t i) {
      Tensor whole = torch::stable::select(space, 0, i);
      return torch::stable::narrow(whole, 0, 0, tokens);
    };
    const auto each_level = [&](auto kernel, const auto& args) {
      torch::stable::parallel_for(0, count, grain,
                                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    };
    const LevelRows of{rows, w};
    const Tensor h = buffer(0), moving = buffer(1), inputs = part(x);
    const Tensor output = torch::stable::narrow(outputs, 0, 0, tokens);
    const auto normalised = [&](int64_t l) { return buffer(2 + (gradients ? l : 0) * 3); };
    const auto sigmoids = [&](int64_t l) { return buffer(3 + (gradients ? l : 0) * 3); };
    const auto activated = [&](int64_t l) { return buffer(4 + (gradients ? l : 0) * 3); };
    const auto scale = [&](int64_t l) { return data(scales) + (gradients ? l : 0) * chunk * rows; };
    const float* e = read(step_bias) + first * blocks * w;

    product(h, inputs, transposed(w_in));
    for (int64_t l = 0; l <= blocks; ++l) {
      const bool last = l == blocks;
      each_level(token_norm_forward_kernel(),
                 NormForward{of, data(h), data(normalised(l)), scale(l),
                             last ? data(sigmoids(l)) : nullptr, data(activated(l)),
                             l == 0 ? nullptr : data(moving), l == 0 ? b_in : b2 + (l - 1) * w});
      if (last) break;
      const Tensor s = sigmoids(l);
      product(s, normalised(l), transposed(block(w1, l)));
      each_level(token_activation_forward_kernel(),
                 ActivationForward{of, data(s), e + l * w, blocks * w, data(s),
                                   data(activated(l))});
      product(moving, activated(l), transposed(block(w2, l)));
    }
    product(output, activated(blocks), transposed(w_out));
    each_level(token_residual_kernel(),
               Residual{{rows, d}, data(output), b_out, read(target) + first * rows * d,
                        read(weight) + first * rows, 2.0f / static_cast<float>(m * d),
                        losses.data(), data(sums)});
    for (int64_t i = 0; i < count; ++i) loss += losses[i];
    if (!gradients) continue;

    const bool add = first > 0;
    add_rows(read(sums), count, d, data(grads[6]));
    product(grads[5], transposed(output), activated(blocks), add);
    product(moving, output, w_out);
    // From here on h, which is not needed any more, holds its own gradient.
    Tensor gradient = moving;
    for (int64_t l = blocks; l >= 0; --l) {
      const bool last = l == blocks;
      each_level(token_norm_backward_kernel(),
                 NormBackward{of, data(gradient), data(h), data(normalised(l)), scale(l),
                              last ? data(sigmoids(l)) : nullptr, data(activated(l)), last,
                              data(sums)});
      add_rows(read(sums), count, w, l == 0 ? data(grads[1]) : data(grads[4]) + (l - 1) * w);
      if (l == 0) break;
      const int64_t k = l - 1;
      product(block(grads[3], k), transposed(h), activated(k), add);
      product(moving, h, block(w2, k));
      each_level(token_activation_backward_kernel(),
                 ActivationBackward{of, data(moving), data(sigmoids(k)), data(activated(k)),
                                    data(grads[7]) + (first * blocks + k) * w, blocks * w});
      product(block(grads[2], k), transposed(moving), normalised(k), add);
      gradient = sigmoids(k);  // what it held is not needed any more
      product(gradient, moving, block(w1, k));
    }
    product(grads[0], transposed(h), inputs, add);
  }
  Tensor result = torch::stable::new_empty(x, {});
  *data(result) = static_cast<float>(loss / static_cast<double>(m * d));
  return {result, grads};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("token_mlp_loss", TORCH_BOX(&token_mlp_loss));
}

}  // namespace
}  // namespace diffad
