// ddim_finish on CUDA: the arguments of the kernel in ddim_finish_tile.h.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "../common/ddim_finish.h"
#include "../common/haar_tensor.h"
#include "ddim_finish_tile.h"
#include "launch.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

// Blocks of a processor are told, or the compiler keeps the addresses of all tensors in registers, of
// which few blocks have enough.
template <int R, int kLevel, class M>
__global__ void __launch_bounds__(kTileColumns, R < 16 ? 4 : 2) finish_kernel(const FinishArgs<M> args) {
  finish_tile<R, kLevel>(args);
}

template <int R, int kLevel, class M>
void launch(FinishArgs<M> args, cudaStream_t stream) {
  static_assert(1 << kLevel == R);
  const unsigned threads = finish_grid(args, R);
  STD_TORCH_CHECK(args.count <= std::numeric_limits<int32_t>::max(),
                  "ddim_finish: ", args.count, " tiles are more than a launch can have");
  const auto grid = static_cast<unsigned>(args.count);
  finish_kernel<R, kLevel><<<grid, threads, 0, stream>>>(args);
  check_launch("ddim_finish");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ddim_finish(
    const Tensor& x, const Tensor& model_output, std::optional<Tensor> guide, const Tensor& images,
    const Tensor& mean, const Tensor& deviation, double alpha_t, int64_t level, int64_t prediction,
    double guidance, double clip, bool clamp) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_finish(x, model_output, guide, images, mean, deviation, level, prediction);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float,
                  "ddim_finish: the CUDA kernel takes a float32 state, got ", x.scalar_type());
  const FinishOutputs out(x, images);
  if (x.numel() == 0) return {out.x0, out.x_hat, out.pixel, out.sub_band};
  const cudaStream_t stream = current_stream(x);
  const Tensor state = in_layout_of(out.x0, x, false);
  const Tensor m = in_layout_of(out.x0, model_output, false);
  Tensor y;
  if (guide) y = in_layout_of(out.x0, torch::stable::to(*guide, ScalarType::Float), false);

  for_narrow_dtype(m, "ddim_finish", [&](auto zero) {
    using M = decltype(zero);
    FinishArgs<M> args{};
    args.g = haar_geometry(images, out.x0, is_channels_last(out.x0));
    args.x = static_cast<const float*>(state.const_data_ptr());
    args.y = guide ? static_cast<const float*>(y.const_data_ptr()) : nullptr;
    args.m = static_cast<const M*>(m.const_data_ptr());
    args.mean = static_cast<const float*>(mean.const_data_ptr());
    args.deviation = static_cast<const float*>(deviation.const_data_ptr());
    args.images = static_cast<const float*>(images.const_data_ptr());
    args.x0 = static_cast<float*>(out.x0.mutable_data_ptr());
    args.x_hat = static_cast<float*>(out.x_hat.mutable_data_ptr());
    args.pixel = static_cast<float*>(out.pixel.mutable_data_ptr());
    args.sub_band = static_cast<float*>(out.sub_band.mutable_data_ptr());
    args.step = finish_coefficients(alpha_t, prediction, guide.has_value(), guidance, clip)
                    .as<float>();
    args.clamp = clamp;
    switch (level) {
      case 0: return launch<1, 0>(args, stream);
      case 1: return launch<2, 1>(args, stream);
      case 2: return launch<4, 2>(args, stream);
      case 3: return launch<8, 3>(args, stream);
      default: return launch<16, 4>(args, stream);
    }
  });
  return {out.x0, out.x_hat, out.pixel, out.sub_band};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("ddim_finish", TORCH_BOX(&ddim_finish));
}

}  // namespace
}  // namespace diffad
