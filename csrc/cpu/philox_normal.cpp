// philox_normal on the CPU; the layout of the counter is in diffad_fast/reference/noise.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "kernels/philox_normal.h"

namespace diffad {
namespace {

using torch::stable::Tensor;

// The entries of an int64 tensor (fields,), contiguous; `keep` owns them.
const int64_t* keys(const std::optional<Tensor>& given, const char* name, int64_t fields,
                    Tensor& keep) {
  if (!given) return nullptr;
  STD_TORCH_CHECK(given->scalar_type() == torch::headeronly::ScalarType::Long &&
                      given->dim() == 1 && given->size(0) == fields,
                  "philox_normal: ", name, " must be int64 with an entry for each leading index");
  keep = torch::stable::contiguous(*given);
  return static_cast<const int64_t*>(keep.const_data_ptr());
}

void philox_normal(Tensor out, int64_t seed, int64_t draw, int64_t step,
                   std::optional<Tensor> draws, std::optional<Tensor> steps) {
  STD_TORCH_CHECK(out.scalar_type() == torch::headeronly::ScalarType::Float && out.is_contiguous(),
                  "philox_normal: the output must be contiguous float32");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(!(draws || steps) || out.dim() > 0, "philox_normal: no leading index");
  const int64_t fields = draws || steps ? out.size(0) : 1;
  Tensor keep[2];
  PhiloxArgs args;
  args.out = static_cast<float*>(out.mutable_data_ptr());
  args.size = out.numel() / fields;
  args.tiles = (args.size + kPhiloxTile - 1) / kPhiloxTile;
  args.seed = seed, args.draw = draw, args.step = step;
  args.draws = keys(draws, "draw", fields, keep[0]);
  args.steps = keys(steps, "step", fields, keep[1]);
  // A tile takes some 10 us, worth a thread; small fields are taken many at a time.
  const int64_t grain = args.size < kPhiloxTile ? kPhiloxTile / args.size : 1;
  torch::stable::parallel_for(0, fields * args.tiles, grain, [&](int64_t begin, int64_t end) {
    philox_normal_kernel()(args, begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal));
}

}  // namespace
}  // namespace diffad
