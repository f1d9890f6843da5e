// Distances to nearest neighbours on the CPU: arguments, the output and threads. The work is in
// kernels/nearest_distances.cpp.
#include "kernels/nearest_distances.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "dtype_of.h"
#include "layout.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

// Differences that are worth a thread.
constexpr int64_t kGrain = 1 << 19;

Tensor dense_rows(const Tensor& x, ScalarType dtype) {
  const Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return y.size(1) == 1 || y.stride(1) == 1 ? y : torch::stable::contiguous(y);
}

Tensor nearest_distances(const Tensor& x, const Tensor& sample, int64_t count) {
  STD_TORCH_CHECK(x.dim() == 2 && sample.dim() == 2 && x.size(1) == sample.size(1) && x.size(1) > 0,
                  "nearest_distances: expected x (M,D) and sample (S,D) with D > 0");
  STD_TORCH_CHECK(x.scalar_type() == sample.scalar_type() && sample.device() == x.device(),
                  "nearest_distances: x and sample differ in dtype or device");
  STD_TORCH_CHECK(count > 0 && count <= sample.size(0),
                  "nearest_distances: count must be from 1 to the rows of the sample");
  STD_TORCH_CHECK(sample.size(0) <= std::numeric_limits<int32_t>::max(),
                  "nearest_distances: the sample has more than 2^31 - 1 rows");
  NearestArgs a{};
  a.dtype = dtype_of(x, "nearest_distances") == DType::kDouble ? DType::kDouble : DType::kFloat;
  const ScalarType dtype = computed_in(x);
  const Tensor rows = dense_rows(x, dtype), others = dense_rows(sample, dtype);
  a.rows = rows.size(0);
  a.size = rows.size(1);
  a.samples = others.size(0);
  a.count = count;
  a.x = rows.const_data_ptr();
  a.sample = others.const_data_ptr();
  a.x_stride = rows.stride(0);
  a.sample_stride = others.stride(0);
  const Tensor out = empty_dense(x, {a.rows, count}, ScalarType::Double);
  if (a.rows == 0) return out;
  a.out = static_cast<double*>(out.mutable_data_ptr());
  const int64_t items = (a.rows + kRowsOfItem - 1) / kRowsOfItem;
  const int64_t work = std::min(a.rows, kRowsOfItem) * a.size * a.samples;
  torch::stable::parallel_for(0, items, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t begin, int64_t end) {
    const Scratch scratch = scratch_of(a.scratch());
    nearest_distances_kernel()(a, scratch.get(), begin, end);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("nearest_distances", TORCH_BOX(&nearest_distances));
}

}  // namespace
}  // namespace diffad
