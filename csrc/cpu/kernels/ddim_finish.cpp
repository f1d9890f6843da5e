#include "ddim_finish.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

template <class T>
void undo_standardisation(const FinishStrip& s) {
  const auto* mean = static_cast<const T*>(s.mean);
  const auto* deviation = static_cast<const T*>(s.deviation);
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < s.cols; ++i) {
    const T* from = static_cast<const T*>(s.x0) + i * s.coefficients;
    T* to = static_cast<T*>(s.standard) + i * s.coefficients;
    int64_t k = 0;
    for (; k + L <= s.coefficients; k += L) {
      store(to + k, fma(load(from + k), load(deviation + k), load(mean + k)));
    }
    if (k < s.coefficients) {
      const int64_t rest = s.coefficients - k;
      const Vec<T> x = fma(load_partial(from + k, rest), load_partial(deviation + k, rest),
                           load_partial(mean + k, rest));
      store_partial(to + k, x, rest);
    }
  }
}

template <class T>
void split_channels(const FinishStrip& s) {
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t c = 0; c < s.channels; ++c) {
      const T* from = static_cast<const T*>(s.pixels) + r * s.width * s.channels + c;
      T* to = static_cast<T*>(s.planes) + c * s.plane + r * s.width;
      for (int64_t x = 0; x < s.width; ++x) to[x] = from[x * s.channels];
      if (!s.clamp) continue;
      for (int64_t x = 0; x < s.width; ++x) {
        T value = to[x] > T(1) ? T(1) : to[x];  // a NaN stays one
        to[x] = value < T(0) ? T(0) : value;
      }
    }
  }
}

}  // namespace

void finish_coefficients_of_strip(const FinishStrip& s) {
  s.dtype == DType::kDouble ? undo_standardisation<double>(s) : undo_standardisation<float>(s);
}

void finish_pixels_of_strip(const FinishStrip& s) {
  s.dtype == DType::kDouble ? split_channels<double>(s) : split_channels<float>(s);
}

}  // namespace diffad::DIFFAD_ISA
