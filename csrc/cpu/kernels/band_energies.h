// Energies of the undecimated Haar transform on cells; diffad_fast/reference/energies.py defines
// them. A stands for the type it computes in: double where the dtype is double, otherwise float.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace diffad {

struct BandEnergiesArgs {
  DType dtype;
  const void* x;  // (N, C, height, width)
  int64_t stride[4];
  int64_t channels, height, width;
  int64_t cell, levels;
  int64_t block;  // rows of cells that go through all levels together
  void* out;      // A[N][6 levels + 1][C][height / cell][width / cell]

  int64_t rows() const { return height / cell; }
  int64_t columns() const { return width / cell; }
  int64_t blocks() const { return (rows() + block - 1) / block; }
  // Pixels that the coarsest band reaches beyond a block.
  int64_t reach() const { return int64_t{1} << (levels - 1); }
  // A row of an array of A: whole vectors may begin at any of its pixels.
  int64_t pitch() const { return width + 2 * reach() + 32; }
  // Elements of type A that the kernel needs: a block of the image, and sums and maxima by column.
  int64_t scratch() const { return (block * cell + 2 * reach() + 1 + 6) * pitch(); }
};

// Items are blocks, of all channels of all samples.
DIFFAD_KERNEL(band_energies, const BandEnergiesArgs&, void* scratch, int64_t begin, int64_t end)

}  // namespace diffad
