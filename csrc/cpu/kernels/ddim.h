#pragma once

#include "../../common/diffusion.h"
#include "dtype.h"
#include "isa.h"

namespace diffad {

// Samples of `size` elements, one after the other; each pointer's layout within a sample is the
// same. `shared` ones have a single sample, that of all.
struct DdimOperand {
  const void* data = nullptr;  // absent
  DType dtype = DType::kFloat;
  bool shared = false;
};

// Coefficients are DdimCoefficients<float>, of double where x is, one a sample or one for all.
struct DdimArgs {
  int64_t samples, size;
  int64_t tiles = 0;  // of kDdimTile elements, in a sample
  DdimOperand x, m, y, z;
  void* out = nullptr;  // of x's dtype
  void* target = nullptr;  // the second result of noised_velocity
  const void* coefficients = nullptr;
  bool coefficients_shared = false;
  bool limited = false;
};

constexpr int64_t kDdimTile = 2048;

// The update of common/diffusion.h, and |x0| in float (or double) to `out`.
DIFFAD_KERNEL(ddim_update, const DdimArgs&, int64_t begin, int64_t end)
DIFFAD_KERNEL(ddim_magnitude, const DdimArgs&, int64_t begin, int64_t end)
// x s_x + m s_m to `out`, as ddim_update, and x x0_x + m x0_m to `target`.
DIFFAD_KERNEL(noised_velocity, const DdimArgs&, int64_t begin, int64_t end)

}  // namespace diffad
