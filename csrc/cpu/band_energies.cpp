// Energies of the undecimated Haar transform on the CPU: arguments, output and threads. The work is
// in kernels/band_energies.cpp.
#include "kernels/band_energies.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "dtype_of.h"
#include "layout.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of pixels in a block: of 256 columns these and their surroundings fit in an L2 cache.
constexpr int64_t kRows = 128;
constexpr int64_t kGrain = 1 << 14;  // pixels that are worth a thread

Tensor band_energies(const Tensor& x, int64_t cell, int64_t levels) {
  STD_TORCH_CHECK(x.dim() == 4, "band_energies: x must be (N, C, H, W)");
  STD_TORCH_CHECK(cell > 0 && 1 <= levels && levels <= 12, "band_energies: cell or levels is bad");
  BandEnergiesArgs a{};
  a.dtype = dtype_of(x, "band_energies");
  a.channels = x.size(1);
  a.height = x.size(2);
  a.width = x.size(3);
  a.cell = cell;
  a.levels = levels;
  STD_TORCH_CHECK(a.height % cell == 0 && a.width % cell == 0,
                  "band_energies: x does not divide into cells");
  STD_TORCH_CHECK(a.height > a.reach() && a.width > a.reach(),
                  "band_energies: x is smaller than the coarsest band");
  const int64_t n = x.size(0);
  const bool wide = a.dtype == DType::kDouble;
  const Tensor out = empty_dense(
      x, {n, (6 * levels + 1) * a.channels, a.rows(), a.columns()}, computed_in(x));
  if (out.numel() == 0) return out;
  a.x = x.const_data_ptr();
  for (int i = 0; i < 4; ++i) a.stride[i] = x.stride(i);
  a.block = std::clamp<int64_t>(kRows / cell, 1, a.rows());
  a.out = out.mutable_data_ptr();
  const int64_t grain = std::max<int64_t>(1, kGrain / (a.block * cell * a.width));
  torch::stable::parallel_for(
      0, n * a.channels * a.blocks(), grain, [&](int64_t begin, int64_t end) {
        const size_t bytes = a.scratch() * (wide ? sizeof(double) : sizeof(float));
        const Scratch scratch = scratch_of(bytes);
        band_energies_kernel()(a, scratch.get(), begin, end);
      });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("band_energies", TORCH_BOX(&band_energies));
}

}  // namespace
}  // namespace diffad
