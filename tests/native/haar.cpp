// Runs csrc/cuda/haar_kernels.h on the CPU. Standard input: pack, level, channels_last, double, tiles,
// samples, channels and blocks of an image as numbers, then the values; standard output: the
// result, nothing where threads that hold whole blocks were asked for and cannot serve.
#include "thread_block.h"

#include "../../csrc/cuda/haar_kernels.h"

using emulated::read;

namespace {

diffad::Strides strides(int64_t c, int64_t h, int64_t w, bool last) {
  if (last) return {c * h * w, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

template <class T, int R, bool kLast, bool kPack>
void run(const std::vector<int32_t>& n) {
  const int64_t batch = n[5], channels = n[6], rows = n[7], cols = n[8];
  const diffad::HaarGeometry g{batch, channels, rows, cols,
                               strides(channels, rows * R, cols * R, kLast),
                               strides(channels * R * R, rows, cols, kLast), kLast};
  const auto in = read<T>(batch * channels * rows * cols * R * R);
  std::vector<T> out(in.size(), NAN);
  // Fewer rows of thread blocks than samples.
  const unsigned half = static_cast<unsigned>(batch + 1) / 2;
  if (n[4]) {
    const diffad::HaarTile tile = diffad::haar_tile<R>(g);
    emulated::launch({static_cast<unsigned>(tile.count), half}, tile.threads, 0, [&] {
      diffad::haar_kernel<T, R, kPack>(g, tile, in.data(), out.data());
    });
  } else if constexpr (diffad::HaarBlocks<T, R, kLast>::kFits) {
    const void *image = in.data(), *packed = out.data();
    if (!kPack) std::swap(image, packed);
    const auto threads = static_cast<uint32_t>(diffad::haar_threads<T, R, kLast>(g, image, packed));
    if (threads == 0) return;
    constexpr int each = diffad::kHaarBlockThreads;
    emulated::launch({(threads + each - 1) / each, half}, each, 0, [&] {
      diffad::haar_block_kernel<T, R, kLast, kPack>(g, threads, in.data(), out.data());
    });
  }
  std::fwrite(out.data(), sizeof(T), out.size(), stdout);
}

template <class T, bool kLast, bool kPack>
void run_level(const std::vector<int32_t>& n) {
  switch (n[1]) {
    case 1: return run<T, 2, kLast, kPack>(n);
    case 2: return run<T, 4, kLast, kPack>(n);
    case 3: return run<T, 8, kLast, kPack>(n);
    default: return run<T, 16, kLast, kPack>(n);
  }
}

template <class T>
void run_all(const std::vector<int32_t>& n) {
  if (n[2]) return n[0] ? run_level<T, true, true>(n) : run_level<T, true, false>(n);
  return n[0] ? run_level<T, false, true>(n) : run_level<T, false, false>(n);
}

}  // namespace

int main() {
  const auto n = read<int32_t>(9);
  n[3] ? run_all<double>(n) : run_all<float>(n);
}
