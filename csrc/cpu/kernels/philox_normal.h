#pragma once

#include "isa.h"

namespace diffad {

// Fields of `size` elements each, one after the other, in tiles of kPhiloxTile elements.
struct PhiloxArgs {
  float* out;
  int64_t size, tiles;  // of one field
  uint64_t seed;
  uint64_t draw, step;
  const int64_t* draws;  // one a field in place of `draw`, or null; `steps` likewise
  const int64_t* steps;
};

constexpr int64_t kPhiloxTile = 8192;

DIFFAD_KERNEL(philox_normal, const PhiloxArgs&, int64_t begin, int64_t end)

}  // namespace diffad
