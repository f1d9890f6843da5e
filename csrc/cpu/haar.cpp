// haar_pack, haar_unpack and standardised_packet on the CPU. See common/haar.h for the maths.
#include "haar.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/haar_tensor.h"
#include "dtype_of.h"
#include "layout.h"
#include "operators.h"

namespace diffad {
namespace {

// Elements of a tile: 32 KiB of float, which with the rows of the image fits a small L2.
constexpr int64_t kTile = 8192;
// Fewer elements than this are not worth a thread.
constexpr int64_t kGrain = 32768;

Tensor haar(const Tensor& x, int64_t level, bool pack, const void* mean = nullptr,
            const void* inverse = nullptr) {
  const Tensor out = haar_output(x, level, pack);
  HaarArgs args;
  args.mean = mean, args.inverse = inverse;
  args.dtype = dtype_of(x, "haar");
  if (out.numel() == 0) return out;
  huge_pages(out);
  const bool last = is_channels_last(x);
  const Tensor in = with_dense_rows(x, last);
  const Tensor& image = pack ? in : out;
  const Tensor& packed = pack ? out : in;
  args.level = static_cast<int>(level);
  args.pack = pack;
  const int64_t channels = image.size(1);
  args.channels = last ? 1 : channels;
  args.lanes = last ? channels : 1;
  args.by_pixels = last && (channels == 1 || channels == 3);
  args.rows = packed.size(2);
  args.cols = packed.size(3);
  void* const from = const_cast<void*>(in.const_data_ptr());
  void* const to = out.mutable_data_ptr();
  args.image = pack ? from : to;
  args.image_strides = strides_of(image);
  args.band_strides = strides_of(packed);
  char* const first = static_cast<char*>(pack ? to : from);
  for (int64_t band = 0; band < int64_t{1} << 2 * level; ++band) {
    args.bands[band] = first + band * channels * packed.stride(1) * size_of(args.dtype);
  }
  haar_tiles(args, image.size(0));
  return out;
}

}  // namespace

Tensor haar_pack(const Tensor& x, int64_t level) { return haar(x, level, true); }
Tensor haar_unpack(const Tensor& y, int64_t level) { return haar(y, level, false); }

namespace {

Tensor standardised_packet(const Tensor& x, const Tensor& mean, const Tensor& deviation,
                           int64_t level) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(x.dim() == 4 && (x.size(1) == 1 || x.size(1) == 3) && is_channels_last(x),
                  "standardised_packet: expected channels_last images of 1 or 3 channels");
  STD_TORCH_CHECK(1 <= level && level <= kHaarMaxLevel, "standardised_packet: level must be 1 to ",
                  kHaarMaxLevel, ", got ", level);
  const int64_t numbers = x.size(1) << 2 * level;
  const auto entries = [&](const Tensor& given, const char* name) {
    STD_TORCH_CHECK(given.dim() == 1 && given.size(0) == numbers && given.device() == x.device(),
                    "standardised_packet: ", name, " must have ", numbers, " entries");
    return torch::stable::contiguous(torch::stable::to(given, ScalarType::Double));
  };
  const Tensor means = entries(mean, "mean"), deviations = entries(deviation, "deviation");
  const auto* m = static_cast<const double*>(means.const_data_ptr());
  const auto* d = static_cast<const double*>(deviations.const_data_ptr());
  const auto go = [&](auto zero) {
    using C = decltype(zero);
    std::vector<C> both(2 * numbers);
    for (int64_t k = 0; k < numbers; ++k) {
      both[k] = static_cast<C>(m[k]);
      both[numbers + k] = static_cast<C>(1 / d[k]);
    }
    return haar(x, level, true, both.data(), both.data() + numbers);
  };
  return x.scalar_type() == ScalarType::Double ? go(double{}) : go(float{});
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("haar_pack", TORCH_BOX(&haar_pack));
  m.impl("haar_unpack", TORCH_BOX(&haar_unpack));
  m.impl("standardised_packet", TORCH_BOX(&standardised_packet));
}

}  // namespace

void haar_tiles(HaarArgs& args, int64_t batch) {
  const int64_t block = args.lanes << 2 * args.level;
  args.tile_cols = std::clamp<int64_t>(kTile / block, 1, args.cols);
  args.tile_rows = std::clamp<int64_t>(kTile / (block * args.tile_cols), 1, args.rows);
  const int64_t tile = block * args.tile_rows * args.tile_cols;
  const int64_t tiles = batch * args.channels * ((args.rows + args.tile_rows - 1) / args.tile_rows) *
                        ((args.cols + args.tile_cols - 1) / args.tile_cols);
  const int64_t grain = std::max<int64_t>(1, kGrain / tile);
  const int64_t bytes = batch * args.channels * args.lanes * args.rows * args.cols *
                        (int64_t{1} << 2 * args.level) * size_of(args.dtype);
  args.past_cache = args.level > 1 && 2 * bytes > kCacheBytes;
  const int64_t scratch = haar_scratch(args);
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> memory(scratch ? new double[scratch] : nullptr);
    haar_kernel()(args, memory.get(), begin, end);
  });
}

}  // namespace diffad
