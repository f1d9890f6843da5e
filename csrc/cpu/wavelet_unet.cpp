// wavelet_unet on the CPU: a whole evaluation of the U-Net, or of its encoder, in one call.
//
// It does what the modules of diffad_fast/denoisers/wavelet_unet.py do, by the same operators. Of a
// single image Python, PyTorch's modules and its dispatcher would take a fifth of the time, on one
// core, while the others wait.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "operators.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

// Of NormSiLU.
constexpr double kEpsilon = 1e-5;
// Numbers to be moved that are worth a thread.
constexpr int64_t kGrain = 1 << 15;

// The numbers of `x` from `first` on, seen in another shape.
template <size_t D>
Tensor view(const Tensor& x, const std::array<int64_t, D>& size,
            const std::array<int64_t, D>& stride, int64_t first = 0) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), D, size.data(), stride.data(),
                                                        first, &made));
  return Tensor(made);
}

// An image in channels_last: (N, C, H, W), dense.
struct Size {
  int64_t n, c, h, w;
  explicit Size(const Tensor& x) : n(x.size(0)), c(x.size(1)), h(x.size(2)), w(x.size(3)) {}
  int64_t pixels() const { return n * h * w; }
};

// The evaluation: its weights and numbers of groups, in the order of their use, and what each
// stage's modulation begins with.
class Network {
 public:
  Network(const Tensor& conditioning, const std::vector<Tensor>& weights,
          const std::vector<int64_t>& groups)
      : conditioning_(conditioning), weights_(weights), groups_(groups) {}

  Tensor conv(const Tensor& x, const std::optional<Tensor>& residual = std::nullopt) {
    const Tensor& packed = next();
    const Tensor& bias = next();
    return conv3x3(x, packed, bias, residual);
  }

  // Of whatever channels: the input and the output of the network have those of the images, and
  // where these make no whole blocks their convolution is PyTorch's, with weights (O, I, 3, 3).
  Tensor outer_conv(const Tensor& x) {
    if (next_weight().dim() != 4 || next_weight().size(3) != 3) return conv(x);
    const Tensor& weight = next();
    const Tensor& bias = next();
    using torch::stable::detail::from, torch::stable::detail::to;
    const std::vector<int64_t> one{1, 1};
    std::array<StableIValue, 7> stack{
        from(x), from(weight), from(std::optional<Tensor>(bias)), from(one), from(one), from(one),
        from(int64_t{1})};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::conv2d", "", stack.data(), TORCH_ABI_VERSION));
    const Tensor y = to<Tensor>(stack[0]);
    using torch::headeronly::MemoryFormat;
    return is_channels_last(y) ? y : torch::stable::contiguous(y, MemoryFormat::ChannelsLast);
  }

  Tensor norm(const Tensor& x, bool activation, const std::optional<Tensor>& scale = std::nullopt,
              const std::optional<Tensor>& shift = std::nullopt) {
    STD_TORCH_CHECK(group_ < groups_.size(), "wavelet_unet: too few groups");
    const Tensor& weight = next();
    const Tensor& bias = next();
    return std::get<0>(
        group_norm_silu(x, groups_[group_++], weight, bias, kEpsilon, scale, shift, activation));
  }

  // The convolution of 1x1: pixels (N H W, C) times weights (O, C).
  Tensor linear(const Tensor& x) {
    const Size size(x);
    const Tensor& weight = next();
    const Tensor& bias = next();
    STD_TORCH_CHECK(weight.dim() == 2, "wavelet_unet: weights of 1x1 that are no matrix");
    const int64_t outputs = weight.size(0);
    const Tensor y =
        product(view<2>(x, {size.pixels(), size.c}, {size.c, 1}), weight, bias);
    return view<4>(y, {size.n, outputs, size.h, size.w},
                   {size.h * size.w * outputs, 1, size.w * outputs, outputs});
  }

  Tensor stage(const Tensor& x, bool attends) {
    const Tensor y = residual(x);
    return attends ? attention(y) : y;
  }

 private:
  const Tensor& next_weight() const {
    STD_TORCH_CHECK(weight_ < weights_.size(), "wavelet_unet: too few weights");
    return weights_[weight_];
  }

  const Tensor& next() {
    const Tensor& weight = next_weight();
    ++weight_;
    return weight;
  }

  static Tensor product(const Tensor& x, const Tensor& weight, const Tensor& bias) {
    using torch::stable::detail::from, torch::stable::detail::to;
    std::array<StableIValue, 3> stack{from(x), from(weight), from(std::optional<Tensor>(bias))};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return to<Tensor>(stack[0]);
  }

  Tensor residual(const Tensor& x) {
    const Tensor h = conv(norm(x, true));
    const Size size(h);
    const auto modulation = [&] {
      STD_TORCH_CHECK(modulated_ + size.c <= conditioning_.size(1),
                      "wavelet_unet: too few numbers of conditioning");
      const Tensor part = view<2>(conditioning_, {size.n, size.c},
                                  {conditioning_.stride(0), conditioning_.stride(1)},
                                  modulated_ * conditioning_.stride(1));
      modulated_ += size.c;
      return part;
    };
    const Tensor scale = modulation(), shift = modulation();
    const Tensor skip = x.size(1) == size.c ? x : linear(x);
    return conv(norm(h, true, scale, shift), skip);
  }

  Tensor attention(const Tensor& x) {
    const Size size(x);
    const Tensor qkv = linear(norm(x, false));
    const Tensor& logit_gain = next();
    const Tensor& value_gain = next();
    const int64_t heads = logit_gain.dim() == 2 ? logit_gain.size(0) : 0, pixel = 3 * size.c;
    STD_TORCH_CHECK(heads > 0 && size.c % heads == 0 && qkv.size(1) == pixel,
                    "wavelet_unet: attention's weights are not those of ", size.c, " channels");
    const int64_t d = size.c / heads;
    const auto part = [&](int64_t which) {
      return view<5>(qkv, {size.n, heads, size.h, size.w, d},
                     {size.h * size.w * pixel, d, size.w * pixel, pixel, 1}, which * size.c);
    };
    // q, k and v lie within a pixel, and so does what comes back.
    const Tensor o = std::get<0>(wavelet_attention(part(0), part(1), part(2), logit_gain,
                                                   value_gain, 1, std::pow(4.0 * d, -0.5)));
    const Tensor y = linear(view<4>(o, {size.n, size.c, size.h, size.w},
                                    {size.h * size.w * size.c, 1, size.w * size.c, size.c}));
    STD_TORCH_CHECK(y.size(1) == size.c, "wavelet_unet: a projection to other channels");
    const auto* from = static_cast<const float*>(x.const_data_ptr());
    auto* to = static_cast<float*>(y.mutable_data_ptr());
    torch::stable::parallel_for(0, size.pixels() * size.c, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] = from[i] + to[i];
    });
    return y;
  }

  const Tensor& conditioning_;
  const std::vector<Tensor>& weights_;
  const std::vector<int64_t>& groups_;
  size_t weight_ = 0, group_ = 0;
  int64_t modulated_ = 0;
};

// Both next to each other along the channels.
Tensor concatenated(const Tensor& a, const Tensor& b) {
  const Size left(a), right(b);
  const Tensor y = empty_4d(a, {left.n, left.c + right.c, left.h, left.w}, true);
  const auto* from = static_cast<const float*>(a.const_data_ptr());
  const auto* other = static_cast<const float*>(b.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t channels = left.c + right.c;
  torch::stable::parallel_for(0, left.pixels(), kGrain / channels + 1,
                              [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(to + i * channels, from + i * left.c, left.c * sizeof(float));
      std::memcpy(to + i * channels + left.c, other + i * right.c, right.c * sizeof(float));
    }
  });
  return y;
}

// [output], or with `features` those of the encoder, fine to coarse. weights: as Network takes them;
// groups: of the norms; widths: of the levels, fine to coarse; blocks: of a level. conditioning: the
// scale and shift of each residual block, one after another.
std::vector<Tensor> wavelet_unet(const Tensor& x, const Tensor& conditioning,
                                 const std::vector<Tensor>& weights,
                                 const std::vector<int64_t>& groups,
                                 const std::vector<int64_t>& widths, int64_t blocks,
                                 bool features) {
  STD_TORCH_CHECK(x.dim() == 4 && x.scalar_type() == ScalarType::Float && is_channels_last(x),
                  "wavelet_unet: expected float32 (N, C, H, W) in channels_last");
  STD_TORCH_CHECK(conditioning.dim() == 2 && conditioning.scalar_type() == ScalarType::Float &&
                      conditioning.size(0) == x.size(0),
                  "wavelet_unet: expected float32 conditioning (N, M)");
  STD_TORCH_CHECK(blocks > 0 && !widths.empty(), "wavelet_unet: no blocks");
  for (const Tensor& weight : weights) {
    // Convolutions look after their own layouts.
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float &&
                        (weight.dim() == 4 || weight.is_contiguous()),
                    "wavelet_unet: expected contiguous float32 weights");
  }
  Network net(conditioning, weights, groups);
  Tensor h = net.outer_conv(x);
  std::vector<Tensor> skips;
  const int64_t levels = static_cast<int64_t>(widths.size());
  for (int64_t level = 0; level < levels; ++level) {
    for (int64_t block = 0; block < blocks; ++block) {
      h = net.stage(h, level > 0);
      STD_TORCH_CHECK(h.size(1) == widths[level], "wavelet_unet: weights of other widths");
      skips.push_back(h);
    }
    if (level + 1 < levels) h = net.linear(haar_pack(h, 1));
  }
  h = net.stage(h, true);
  if (features) {
    std::vector<Tensor> maps;
    for (int64_t level = 0; level + 1 < levels; ++level) {
      maps.push_back(skips[(level + 1) * blocks - 1]);
    }
    maps.push_back(h);
    return maps;
  }
  for (int64_t level = levels; level-- > 0;) {
    for (int64_t block = 0; block < blocks; ++block) {
      h = net.stage(concatenated(h, skips.back()), level > 0);
      skips.pop_back();
    }
    if (level > 0) h = haar_unpack(net.linear(h), 1);
  }
  return {net.outer_conv(net.norm(h, true))};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("wavelet_unet", TORCH_BOX(&wavelet_unet));
}

}  // namespace
}  // namespace diffad
