// Runs csrc/cuda/haar_block.h on the CPU, thread by thread. Standard input: pack, level,
// channels_last, double, samples, channels and blocks of an image as numbers, then the values;
// standard output: the result, nothing where this way is not open.
#include <cmath>
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/haar_block.h"

namespace {

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, stdin) != count) std::abort();
  return values;
}

diffad::Strides strides(int64_t c, int64_t h, int64_t w, bool last) {
  if (last) return {c * h * w, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

template <class T, int R, bool kLast, bool kPack>
void run(const std::vector<int32_t>& n) {
  const int64_t batch = n[4], channels = n[5], rows = n[6], cols = n[7];
  const diffad::HaarGeometry g{batch, channels, rows, cols,
                               strides(channels, rows * R, cols * R, kLast),
                               strides(channels * R * R, rows, cols, kLast), kLast};
  const auto in = read<T>(batch * channels * rows * cols * R * R);
  std::vector<T> out(in.size(), NAN);
  const void *image = in.data(), *packed = out.data();
  if (!kPack) std::swap(image, packed);
  if constexpr (diffad::HaarBlocks<T, R, kLast>::kFits) {
    const int64_t threads = diffad::haar_threads<T, R, kLast>(g, image, packed);
    if (threads == 0) return;
    for (int64_t sample = 0; sample < batch; ++sample) {
      for (int64_t i = 0; i < threads; ++i) {
        diffad::haar_block<T, R, kLast, kPack>(g, sample, i, in.data(), out.data());
      }
    }
    std::fwrite(out.data(), sizeof(T), out.size(), stdout);
  }
}

template <class T, bool kLast, bool kPack>
void run_level(const std::vector<int32_t>& n) {
  n[1] == 1 ? run<T, 2, kLast, kPack>(n) : run<T, 4, kLast, kPack>(n);
}

template <class T>
void run_all(const std::vector<int32_t>& n) {
  if (n[2]) return n[0] ? run_level<T, true, true>(n) : run_level<T, true, false>(n);
  return n[0] ? run_level<T, false, true>(n) : run_level<T, false, false>(n);
}

}  // namespace

int main() {
  const auto n = read<int32_t>(8);
  n[3] ? run_all<double>(n) : run_all<float>(n);
}
