// wavelet_attention and its gradients on the CPU. See kernels/wavelet_attention.h for the maths.
#include "kernels/wavelet_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "../common/tensor.h"
#include "dtype_of.h"
#include "operators.h"

namespace diffad {
namespace {

using torch::stable::Tensor;
using Gain = std::optional<Tensor>;

// Multiply-adds that are worth a thread.
constexpr int64_t kGrain = 1 << 20;
// The backward pass cuts the keys of a head into chunks for so many items over all heads, so that
// few heads keep several threads busy too. Not the number of threads: that must change no bit.
constexpr int64_t kBackwardItems = 32;

AttentionTensor strided(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.stride(4)};
}

// A new tensor (N, heads, H, W, d), in memory (N, H, W, heads, d) where `like` has the heads within
// a pixel, as views of a channels_last tensor do: the result is one again without a copy.
// diffad_fast/ops/attention.py has the same rule.
Tensor empty_like_heads(const Tensor& like) {
  const int64_t n = like.size(0), heads = like.size(1), h = like.size(2), w = like.size(3);
  const int64_t d = like.size(4);
  if (like.stride(1) < like.stride(3)) {
    return empty_strided(like, {n, heads, h, w, d},
                         {h * w * heads * d, d, w * heads * d, heads * d, 1});
  }
  return empty_dense(like, {n, heads, h, w, d});
}

// The Python side checks first and raises ValueError or TypeError: the checks here only keep a
// direct call from touching memory that is not its own.
void check_like(const Tensor& x, const Tensor& q, const char* name) {
  bool same = x.dim() == 5 && x.scalar_type() == q.scalar_type() && x.device() == q.device();
  for (int i = 0; same && i < 5; ++i) same = x.size(i) == q.size(i);
  STD_TORCH_CHECK(same, "wavelet_attention: ", name, " must be like q");
}

Gain checked_gain(const Gain& gain, const Tensor& q, int64_t level) {
  if (!gain) return gain;
  STD_TORCH_CHECK(gain->dim() == 2 && gain->size(0) == q.size(1) &&
                      gain->size(1) == 1 + 3 * level && gain->device() == q.device() &&
                      gain->scalar_type() == computed_in(q),
                  "wavelet_attention: a gain must be (heads, 1 + 3 level) of the type that is "
                  "computed in");
  return torch::stable::contiguous(*gain);
}

// What both directions take; `out` and `lse` are to be filled in.
AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Gain& logit_gain,
                        const Gain& value_gain, int64_t level, double scale) {
  check_like(q, q, "q");
  check_like(k, q, "k");
  check_like(v, q, "v");
  STD_TORCH_CHECK(level == 1 || level == 2, "wavelet_attention: level must be 1 or 2");
  STD_TORCH_CHECK((q.size(2) | q.size(3)) % (1 << level) == 0, "wavelet_attention: ", q.size(2),
                  " x ", q.size(3), " does not divide by ", 1 << level);
  AttentionArgs a{};
  a.dtype = dtype_of(q, "wavelet_attention");
  a.level = static_cast<int>(level);
  a.heads = q.size(1);
  a.rows = q.size(2) >> level;
  a.cols = q.size(3) >> level;
  a.channels = q.size(4);
  a.scale = scale;
  a.q = strided(q);
  a.k = strided(k);
  a.v = strided(v);
  a.logit_gain = logit_gain ? logit_gain->const_data_ptr() : nullptr;
  a.value_gain = value_gain ? value_gain->const_data_ptr() : nullptr;
  return a;
}

// Items of `queries` x `keys` that are worth a thread.
int64_t grain(const AttentionArgs& a, int64_t queries, int64_t keys) {
  return std::max<int64_t>(1, kGrain / (2 * queries * keys * a.block_size()));
}

}  // namespace

std::tuple<Tensor, Tensor> wavelet_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const Gain& logit_gain, const Gain& value_gain,
                                             int64_t level, double scale) {
  const Gain w = checked_gain(logit_gain, q, level), g = checked_gain(value_gain, q, level);
  AttentionArgs a = arguments(q, k, v, w, g, level, scale);
  const Tensor out = empty_like_heads(q);
  const Tensor lse = empty_dense(q, {q.size(0), a.heads, a.tokens()}, computed_in(q));
  if (out.numel() == 0) return {out, lse};
  a.out = strided(out);
  a.lse = lse.data_ptr();
  torch::stable::parallel_for(
      0, q.size(0) * a.heads * a.items(), grain(a, kAttentionQueries, a.tokens()),
      [&](int64_t begin, int64_t end) { wavelet_attention_kernel()(a, begin, end); });
  return {out, lse};
}

namespace {

// gain[head, band] = sum over n and items of parts[n, head, item, band], in this order; T is the
// type of all.
template <class T>
void add_up(const Tensor& parts, const Tensor& gain) {
  const int64_t heads = gain.size(0), bands = gain.size(1), items = parts.size(2);
  const T* part = static_cast<const T*>(parts.const_data_ptr());
  T* result = static_cast<T*>(gain.mutable_data_ptr());
  for (int64_t i = 0; i < heads * bands; ++i) {
    double sum = 0;
    for (int64_t n = 0; n < parts.size(0); ++n) {
      for (int64_t j = 0; j < items; ++j) {
        sum += part[((n * heads + i / bands) * items + j) * bands + i % bands];
      }
    }
    result[i] = static_cast<T>(sum);
  }
}

Tensor gain_gradient(const Tensor& parts, bool wanted) {
  const Tensor gain = empty_dense(parts, {wanted ? parts.size(1) : 0, parts.size(3)});
  if (gain.numel() == 0) return gain;
  if (parts.scalar_type() == torch::headeronly::ScalarType::Double) {
    add_up<double>(parts, gain);
  } else {
    add_up<float>(parts, gain);
  }
  return gain;
}

// Gradients of q, k, v, logit_gain and value_gain; without a gain an empty one.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> wavelet_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Gain& logit_gain,
    const Gain& value_gain, const Tensor& out, const Tensor& lse, int64_t level, double scale) {
  const Gain w = checked_gain(logit_gain, q, level), g = checked_gain(value_gain, q, level);
  AttentionBackwardArgs b{};
  AttentionArgs& a = b.forward;
  a = arguments(q, k, v, w, g, level, scale);
  check_like(grad, q, "the gradient");
  check_like(out, q, "out");
  const int64_t heads = q.size(0) * a.heads;
  STD_TORCH_CHECK(lse.numel() == heads * a.tokens() && lse.is_contiguous() &&
                      lse.scalar_type() == computed_in(q) && lse.device() == q.device(),
                  "wavelet_attention: lse must be the one of the forward pass");
  const Tensor dq = empty_like_heads(q), dk = empty_like_heads(q), dv = empty_like_heads(q);
  if (q.numel() > 0) {
    const int64_t units = (a.tokens() + kAttentionKeys - 1) / kAttentionKeys;
    b.chunks = std::clamp<int64_t>(kBackwardItems / heads, 1, units);
    b.chunk_keys = (units + b.chunks - 1) / b.chunks * kAttentionKeys;
    b.chunks = (a.tokens() + b.chunk_keys - 1) / b.chunk_keys;
  }
  const auto parts = [&](int64_t items, int64_t size) {
    return empty_dense(q, {q.size(0), a.heads, items, size}, computed_in(q));
  };
  const Tensor dq_parts = parts(b.chunks, b.dq_rows() * a.row_stride());
  const Tensor w_parts = parts(w ? a.items() : 0, a.bands());
  const Tensor g_parts = parts(g ? b.chunks : 0, a.bands());
  if (q.numel() > 0) {
    a.out = strided(out);
    a.lse = lse.data_ptr();
    b.dout = strided(grad);
    b.dq = strided(dq);
    b.dk = strided(dk);
    b.dv = strided(dv);
    b.dq_parts = dq_parts.data_ptr();
    b.logit_gain_parts = w ? w_parts.data_ptr() : nullptr;
    b.value_gain_parts = g ? g_parts.data_ptr() : nullptr;
    torch::stable::parallel_for(
        0, heads * b.chunks, grain(a, a.tokens(), b.chunk_keys), [&](int64_t begin, int64_t end) {
          wavelet_attention_backward_keys_kernel()(b, begin, end);
        });
    torch::stable::parallel_for(
        0, heads * a.items(), grain(a, kAttentionQueries, b.chunks),
        [&](int64_t begin, int64_t end) {
          wavelet_attention_backward_queries_kernel()(b, begin, end);
        });
  }
  return {dq, dk, dv, gain_gradient(w_parts, w.has_value()),
          gain_gradient(g_parts, g.has_value())};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("wavelet_attention", TORCH_BOX(&wavelet_attention));
  m.impl("wavelet_attention_backward", TORCH_BOX(&wavelet_attention_backward));
}

}  // namespace
}  // namespace diffad
