// Distances to nearest neighbours; diffad_fast/reference/neighbours.py defines them.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace diffad {

// Rows that go through the sample together.
constexpr int64_t kRowsOfItem = 48;

struct NearestArgs {
  DType dtype;  // float or double, of x and the sample; the numbers of a row lie side by side
  int64_t rows, size, samples, count;
  const void *x, *sample;
  int64_t x_stride, sample_stride;
  double* out;  // (rows, count)

  // Neighbours that are looked for in float32, to be chosen from in float64.
  int64_t candidates() const { return count + 2 < samples ? count + 2 : samples; }
  int64_t padded() const { return (size + 15) / 16 * 16; }
  // Bytes of scratch memory that a call of the kernel needs: rows of the sample, one for a lane of
  // two of the longest vectors, and two numbers of each; of an item's rows their numbers and
  // candidates, each in two types.
  int64_t scratch() const {
    const int64_t together = rows < kRowsOfItem ? rows : kRowsOfItem;
    return 2 * 64 * (padded() + 2) + together * (12 * padded() + 16 * candidates());
  }
};

// Items of kRowsOfItem rows.
DIFFAD_KERNEL(nearest_distances, const NearestArgs&, void* scratch, int64_t begin, int64_t end)

}  // namespace diffad
