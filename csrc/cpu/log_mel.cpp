// Log-mel spectrograms on the CPU: arguments, the plan of the transform and threads. The work is in
// kernels/log_mel.cpp.
#include "kernels/log_mel.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <vector>

#include "dtype_of.h"
#include "layout.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kSmallest = 4, kLargest = 16;  // n_fft from 2^4 to 2^16
constexpr double kTau = 6.283185307179586476925;

struct Plan {
  int64_t base;
  std::vector<int32_t> order;
  std::vector<double> roots;

  explicit Plan(int64_t n_fft) : order(n_fft / 2) {
    const int64_t m = n_fft / 2;
    for (base = m; base > 8;) base /= 4;
    for (int64_t k = 0; k < m; ++k) {
      // Those with the same remainder modulo 4 form a quarter, and so on with their quotients.
      int64_t place = 0, rest = k;
      for (int64_t size = m; size > base; size /= 4, rest /= 4) place += rest % 4 * (size / 4);
      order[k] = static_cast<int32_t>(place + rest);
    }
    for (int64_t q = base; q < m; q *= 4) {
      for (int64_t j = 0; j < q; ++j) {
        for (int power = 1; power <= 3; ++power) add(j * power, 4 * q);
      }
    }
    for (int64_t k = 0; k <= m / 2; ++k) add(k, n_fft);
  }

  void add(int64_t k, int64_t size) {
    const double angle = kTau * static_cast<double>(k) / static_cast<double>(size);
    roots.push_back(std::cos(angle));
    roots.push_back(-std::sin(angle));
  }
};

// Made once for each size and kept.
FourierPlan plan_of(int64_t n_fft) {
  static std::array<std::once_flag, kLargest + 1> made;
  static std::array<std::unique_ptr<Plan>, kLargest + 1> plans;
  int number = 0;
  while (int64_t{1} << number < n_fft) ++number;
  std::call_once(made[number], [&] { plans[number] = std::make_unique<Plan>(n_fft); });
  const Plan& plan = *plans[number];
  return {plan.base, plan.order.data(), plan.roots.data()};
}

// Of each row of filters the columns from the first to after the last that are not 0.
std::vector<int32_t> ends_of(const double* filters, int64_t bands, int64_t bins) {
  constexpr int64_t kStep = 16;  // looked at together, by vectors
  std::vector<int32_t> ends(2 * bands);
  for (int64_t band = 0; band < bands; ++band, filters += bins) {
    const auto some = [&](int64_t from, int64_t to) {
      int found = 0;
      for (int64_t k = from; k < to; ++k) found |= filters[k] != 0;
      return found != 0;
    };
    int64_t first = 0, last = bins;
    while (first + kStep <= bins && !some(first, first + kStep)) first += kStep;
    while (first < bins && filters[first] == 0) ++first;
    while (last - kStep >= first && !some(last - kStep, last)) last -= kStep;
    while (last > first && filters[last - 1] == 0) --last;
    ends[2 * band] = static_cast<int32_t>(first);
    ends[2 * band + 1] = static_cast<int32_t>(last);
  }
  return ends;
}

Tensor log_mel(const Tensor& waves, const Tensor& window, const Tensor& filters, int64_t hop) {
  STD_TORCH_CHECK(waves.dim() == 2 && window.dim() == 1 && filters.dim() == 2,
                  "log_mel: waves must be (N, samples), window (n_fft) and filters (bands, bins)");
  LogMelArgs a{};
  a.dtype = dtype_of(waves, "log_mel");
  STD_TORCH_CHECK(window.scalar_type() == ScalarType::Double &&
                      filters.scalar_type() == ScalarType::Double,
                  "log_mel: window and filters must be double");
  const int64_t n_fft = a.n_fft = window.size(0);
  STD_TORCH_CHECK((n_fft & (n_fft - 1)) == 0 && n_fft >= int64_t{1} << kSmallest &&
                      n_fft <= int64_t{1} << kLargest,
                  "log_mel: n_fft must be a power of two from 16 to 2^16");
  STD_TORCH_CHECK(filters.size(1) == n_fft / 2 + 1, "log_mel: filters do not fit n_fft");
  STD_TORCH_CHECK(hop > 0 && waves.size(1) >= n_fft, "log_mel: hop or the number of samples is bad");
  const Tensor x = waves.stride(1) == 1 ? waves : torch::stable::contiguous(waves);
  const Tensor shape = torch::stable::contiguous(window), rows = torch::stable::contiguous(filters);
  a.waves = x.const_data_ptr();
  a.stride = x.stride(0);
  a.clips = x.size(0);
  a.hop = hop;
  a.frames = (x.size(1) - n_fft) / hop + 1;
  a.bands = rows.size(0);
  a.window = static_cast<const double*>(shape.const_data_ptr());
  a.filters = static_cast<const double*>(rows.const_data_ptr());
  const Tensor out = empty_strided(x, {a.clips, a.bands, a.frames},
                                   {a.bands * a.frames, a.frames, 1},
                                   a.dtype == DType::kDouble ? ScalarType::Double
                                                             : ScalarType::Float);
  if (out.numel() == 0) return out;
  a.out = out.mutable_data_ptr();
  a.plan = plan_of(n_fft);
  const std::vector<int32_t> ends = ends_of(a.filters, a.bands, n_fft / 2 + 1);
  a.ends = ends.data();
  const int64_t items = (a.clips * a.frames + kFramesOfItem - 1) / kFramesOfItem;
  // 2048 samples of 16 frames take some 30 us, worth a thread.
  const int64_t grain = std::max<int64_t>(1, 2048 / n_fft);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch = scratch_of(a.scratch() * sizeof(double));
    log_mel_kernel()(a, reinterpret_cast<double*>(scratch.get()), begin, end);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("log_mel", TORCH_BOX(&log_mel));
}

}  // namespace
}  // namespace diffad
