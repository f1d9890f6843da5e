// Runs csrc/cuda/ddim_finish_tile.h on the CPU: thread blocks of fibers. Standard input: the task as
// numbers; standard output: x0, x_hat, pixel and sub_band.
#include "thread_block.h"

#include "../../csrc/cuda/ddim_finish_tile.h"

using emulated::read;

namespace {

// Of a dense tensor (N, C, H, W).
diffad::Strides strides(int64_t c, int64_t h, int64_t w, bool last) {
  if (last) return {c * h * w, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

}  // namespace

int main() {
  // level, samples, channels and blocks of an image, channels_last, guided, clamp, thread blocks
  const std::vector<int32_t> n = read<int32_t>(9);
  const int64_t r = int64_t{1} << n[0], batch = n[1], channels = n[2], rows = n[3], cols = n[4];
  const size_t packed = channels * r * r, plane = rows * cols * r * r, size = batch * channels * plane;
  const auto step = read<float>(9), x = read<float>(size), m = read<float>(size);
  const auto y = read<float>(size), images = read<float>(size);
  const auto mean = read<float>(packed), deviation = read<float>(packed);
  std::vector<float> x0(size, NAN), x_hat(size, NAN);
  std::vector<float> pixel(batch * plane, NAN), sub_band(batch * plane, NAN);

  diffad::FinishArgs<float> args{};
  args.g = {batch, channels, rows, cols, strides(channels, rows * r, cols * r, false),
            strides(packed, rows, cols, n[5]), static_cast<bool>(n[5])};
  args.x = x.data();
  args.m = m.data();
  args.y = n[6] ? y.data() : nullptr;
  args.images = images.data();
  args.mean = mean.data();
  args.deviation = deviation.data();
  args.x0 = x0.data();
  args.x_hat = x_hat.data();
  args.pixel = pixel.data();
  args.sub_band = sub_band.data();
  std::memcpy(&args.step, step.data(), sizeof(args.step));
  args.clamp = n[7];
  const unsigned threads = diffad::finish_grid(args, static_cast<int>(r));

  emulated::launch(n[8], threads, 0, [&] {
    switch (n[0]) {
      case 0: return diffad::finish_tiles<1, 0>(args);
      case 1: return diffad::finish_tiles<2, 1>(args);
      case 2: return diffad::finish_tiles<4, 2>(args);
      case 3: return diffad::finish_tiles<8, 3>(args);
      default: return diffad::finish_tiles<16, 4>(args);
    }
  });
  for (const auto* out : {&x0, &x_hat, &pixel, &sub_band}) {
    std::fwrite(out->data(), 4, out->size(), stdout);
  }
}
