// Log-mel spectrograms; diffad_fast/reference/spectrogram.py defines them.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace diffad {

// The Fourier transform of n_fft = 2 M real samples, by one of M complex ones.
struct FourierPlan {
  int64_t base;          // 4 or 8: M is base times a power of 4
  const int32_t* order;  // [M]: where the pair of samples 2k, 2k + 1 has to lie at first
  // Of every pass, from the first on, w^j, w^2j, w^3j for j below a quarter of its size, w its root
  // of unity e^(-2 pi i / size); then e^(-2 pi i k / n_fft) for k = 0 ... M/2.
  const double* roots;
};

constexpr int64_t kFramesOfItem = 16;

struct LogMelArgs {
  DType dtype;
  const void* waves;  // (clips, samples), samples next to each other
  int64_t stride;     // from one clip to the next
  int64_t clips, n_fft, hop, frames, bands;
  FourierPlan plan;
  const double* window;   // [n_fft]
  const double* filters;  // [bands][n_fft / 2 + 1]
  const int32_t* ends;    // [bands][2]: the bins from the first on and before the second count
  void* out;              // [clips][bands][frames], double where the dtype is, otherwise float

  // Numbers that the kernel needs: n_fft / 2 + 1 complex ones of an item's frames.
  int64_t scratch() const { return (n_fft + 2) * kFramesOfItem; }
};

// Items are frames of all clips one after another, as many at a time.
DIFFAD_KERNEL(log_mel, const LogMelArgs&, double* scratch, int64_t begin, int64_t end)

}  // namespace diffad
