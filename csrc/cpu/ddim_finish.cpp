// ddim_finish on the CPU: each row of blocks of the Haar packet, a strip, goes through the kernels
// of the step, the transform and the residual maps one after the other, while it is in the cache.
// In memory, inputs are read and outputs written once.
#include "../common/ddim_finish.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../common/haar_tensor.h"
#include "dtype_of.h"
#include "kernels/anomaly_map.h"
#include "kernels/ddim.h"
#include "kernels/ddim_finish.h"
#include "kernels/haar.h"
#include "layout.h"

namespace diffad {
namespace {

// Fewer elements than this are not worth a thread.
constexpr int64_t kGrain = 32768;

Samples samples_of(const Tensor& x) {
  return {x.const_data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ddim_finish(
    const Tensor& x, const Tensor& model_output, std::optional<Tensor> guide, const Tensor& images,
    const Tensor& mean, const Tensor& deviation, double alpha_t, int64_t level, int64_t prediction,
    double guidance, double clip, bool clamp) {
  check_finish(x, model_output, guide, images, mean, deviation, level, prediction);
  FinishOutputs out(x, images);
  if (x.numel() == 0) return {out.x0, out.x_hat, out.pixel, out.sub_band};
  for (const Tensor* each : {&out.x_hat, &out.pixel, &out.sub_band}) huge_pages(*each);

  // Inside, the coefficients of a position lie next to each other.
  const DType dtype = dtype_of(x, "ddim_finish");
  const bool last = is_channels_last(x);
  const auto size = [&](int axis) { return x.size(axis); };
  Tensor x0 = last ? out.x0 : empty_4d(x, {size(0), size(1), size(2), size(3)}, true);
  const Tensor state = in_layout_of(x0, x, false);
  const Tensor m = in_layout_of(x0, model_output, false);
  Tensor y;
  if (guide) y = in_layout_of(x0, *guide, false);

  const int64_t r = int64_t{1} << level, channels = images.size(1);
  const int64_t rows = x.size(2), cols = x.size(3), width = images.size(3);
  const int64_t strip = cols * x.size(1);  // elements, of coefficients or of pixels
  const int64_t bytes = size_of(dtype);
  const auto coefficients =
      finish_coefficients(alpha_t, prediction, guide.has_value(), guidance, clip);
  const auto narrow = coefficients.as<float>();

  DdimArgs step{1, strip, (strip + kDdimTile - 1) / kDdimTile};
  step.coefficients = dtype == DType::kDouble ? static_cast<const void*>(&coefficients) : &narrow;
  step.coefficients_shared = step.limited = true;

  HaarArgs haar{};
  haar.dtype = dtype;
  haar.level = static_cast<int>(level);
  haar.channels = haar.rows = haar.tile_rows = 1;
  haar.lanes = channels;
  haar.cols = haar.tile_cols = cols;
  haar.image_strides = {0, 0, width * channels, channels};
  haar.band_strides = {0, 0, strip, x.size(1)};

  FinishStrip finish{};
  finish.dtype = dtype;
  finish.cols = cols;
  finish.coefficients = x.size(1);
  finish.mean = mean.const_data_ptr();
  finish.deviation = deviation.const_data_ptr();
  finish.channels = channels;
  finish.rows = r;
  finish.width = width;
  finish.clamp = clamp;
  finish.plane = images.size(2) * width;

  AnomalyMapArgs maps{};
  maps.dtype = dtype;
  maps.x = samples_of(images);
  maps.x_hat = samples_of(out.x_hat);
  maps.channels = channels;
  maps.height = images.size(2);
  maps.width = width;
  maps.pitch = (width + 15) / 16 * 16;
  maps.levels = static_cast<int>(level);
  maps.weight[0] = maps.weight[2] = 1;

  torch::stable::parallel_for(
      0, x.size(0) * rows, std::max<int64_t>(1, kGrain / strip), [&](int64_t begin, int64_t end) {
        // Standardised coefficients, pixels, and what the kernels need.
        const Scratch memory =
            scratch_of((3 * strip + kHaarPadding + anomaly_scratch(maps)) * bytes);
        char* const pixels = memory.get() + strip * bytes;
        char* const scratch = pixels + strip * bytes;
        DdimArgs s = step;
        HaarArgs h = haar;
        FinishStrip f = finish;
        for (int64_t band = 0; band < r * r; ++band) {
          h.bands[band] = memory.get() + band * channels * bytes;
        }
        h.image = pixels;
        f.standard = memory.get();
        f.pixels = level ? pixels : memory.get();
        for (int64_t i = begin; i < end; ++i) {
          const int64_t n = i / rows, row = i % rows;
          const auto part = [&](const Tensor& of) -> DdimOperand {
            const DType own = dtype_of(of, "ddim_finish");
            return {static_cast<const char*>(of.const_data_ptr()) + i * strip * size_of(own), own};
          };
          s.x = part(state);
          s.m = part(m);
          if (guide) s.y = part(y);
          s.out = static_cast<char*>(x0.mutable_data_ptr()) + i * strip * bytes;
          ddim_update_kernel()(s, 0, s.tiles);
          f.x0 = s.out;
          finish_coefficients_of_strip_kernel()(f);
          if (level) haar_kernel()(h, scratch, 0, 1);
          f.planes = static_cast<char*>(out.x_hat.mutable_data_ptr()) +
                     (n * channels * finish.plane + row * r * width) * bytes;
          finish_pixels_of_strip_kernel()(f);
          residual_rows_kernel()(maps, out.pixel.mutable_data_ptr(),
                                 out.sub_band.mutable_data_ptr(), scratch, i, i + 1);
        }
      });
  if (!last) torch::stable::copy_(out.x0, x0);
  return {out.x0, out.x_hat, out.pixel, out.sub_band};
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) { m.impl("ddim_finish", TORCH_BOX(&ddim_finish)); }

}  // namespace
}  // namespace diffad
