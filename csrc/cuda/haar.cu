// haar_pack and haar_unpack on CUDA. See common/haar.h for the maths.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <utility>

#include "../common/haar_tensor.h"
#include "haar_kernels.h"
#include "launch.h"

namespace diffad {
namespace {

// Whether it was done so.
template <class scalar_t, int R, bool kLast, bool kPack>
bool launch_blocks(const HaarGeometry& g, const scalar_t* in, scalar_t* out, cudaStream_t stream) {
  if constexpr (HaarBlocks<scalar_t, R, kLast>::kFits) {
    const void *image = in, *packed = out;
    if (!kPack) std::swap(image, packed);
    const int64_t threads = haar_threads<scalar_t, R, kLast>(g, image, packed);
    if (threads == 0 || threads > int64_t{1} << 31) return false;
    const dim3 grid(static_cast<unsigned>((threads + kHaarBlockThreads - 1) / kHaarBlockThreads),
                    static_cast<unsigned>(std::min<int64_t>(g.batch, 65535)));
    haar_block_kernel<scalar_t, R, kLast, kPack>
        <<<grid, kHaarBlockThreads, 0, stream>>>(g, static_cast<uint32_t>(threads), in, out);
    check_launch(kPack ? "haar_pack" : "haar_unpack");
    return true;
  }
  return false;
}

template <class scalar_t, int R, bool kPack>
void haar_launch(const HaarGeometry& g, const Tensor& in, const Tensor& out, cudaStream_t stream) {
  const auto* from = static_cast<const scalar_t*>(in.const_data_ptr());
  auto* to = static_cast<scalar_t*>(out.mutable_data_ptr());
  if (g.channels_last ? launch_blocks<scalar_t, R, true, kPack>(g, from, to, stream)
                      : launch_blocks<scalar_t, R, false, kPack>(g, from, to, stream)) {
    return;
  }
  const HaarTile tile = haar_tile<R>(g);
  STD_TORCH_CHECK(tile.count < int64_t{1} << 31, "haar: a sample of ", tile.count, " tiles of ",
                  tile.blocks * R * tile.lanes * R, " values is more than a launch can have");
  const dim3 grid(static_cast<unsigned>(tile.count),
                  static_cast<unsigned>(std::min<int64_t>(g.batch, 65535)));
  haar_kernel<scalar_t, R, kPack><<<grid, tile.threads, 0, stream>>>(g, tile, from, to);
  check_launch(kPack ? "haar_pack" : "haar_unpack");
}

template <bool kPack>
Tensor haar(const Tensor& x, int64_t level) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor out = haar_output(x, level, kPack);
  if (out.numel() == 0) return out;
  const cudaStream_t stream = current_stream(x);
  const HaarGeometry g = haar_geometry(kPack ? x : out, kPack ? out : x, is_channels_last(x));
  for_floating_dtype(x, "haar", [&](auto zero) {
    using scalar_t = decltype(zero);
    switch (level) {
      case 1: return haar_launch<scalar_t, 2, kPack>(g, x, out, stream);
      case 2: return haar_launch<scalar_t, 4, kPack>(g, x, out, stream);
      case 3: return haar_launch<scalar_t, 8, kPack>(g, x, out, stream);
      default: return haar_launch<scalar_t, 16, kPack>(g, x, out, stream);
    }
  });
  return out;
}

Tensor haar_pack(const Tensor& x, int64_t level) { return haar<true>(x, level); }
Tensor haar_unpack(const Tensor& y, int64_t level) { return haar<false>(y, level); }

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("haar_pack", TORCH_BOX(&haar_pack));
  m.impl("haar_unpack", TORCH_BOX(&haar_unpack));
}

}  // namespace
}  // namespace diffad
