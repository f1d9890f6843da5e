// philox_normal on CUDA: a thread computes one block of four numbers and stores 16 bytes. The
// layout of the counter is in diffad_fast/reference/noise.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "../common/divide.h"
#include "../common/philox.h"
#include "launch.h"

namespace diffad {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

struct Keys {
  uint64_t seed, draw, step;
  const int64_t* draws;  // one a field in place of `draw`, or null; `steps` likewise
  const int64_t* steps;
};

__global__ void __launch_bounds__(kThreads)
philox_kernel(Keys keys, int64_t fields, int64_t size, float* __restrict__ out) {
  const int64_t blocks = (size + 3) / 4, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < fields * blocks; i += stride) {
    const int64_t field = fields == 1 ? 0 : quotient(i, blocks), block = i - field * blocks;
    const uint64_t draw = keys.draws ? static_cast<uint64_t>(keys.draws[field]) : keys.draw;
    const uint64_t step = keys.steps ? static_cast<uint64_t>(keys.steps[field]) : keys.step;
    uint64_t w[4] = {static_cast<uint64_t>(block), draw & 0xffffffffu, step, draw >> 32};
    one::philox4x32(w, static_cast<uint32_t>(keys.seed), static_cast<uint32_t>(keys.seed >> 32));
    float4 z;
    one::box_muller(static_cast<uint32_t>(w[0]), static_cast<uint32_t>(w[1]), z.x, z.y);
    one::box_muller(static_cast<uint32_t>(w[2]), static_cast<uint32_t>(w[3]), z.z, z.w);
    float* to = out + field * size + 4 * block;
    if (size % 4 == 0) {
      *reinterpret_cast<float4*>(to) = z;
    } else {
      const float four[4] = {z.x, z.y, z.z, z.w};
      for (int j = 0; j < 4; ++j) {
        if (4 * block + j < size) to[j] = four[j];
      }
    }
  }
}

const int64_t* keys_of(const std::optional<Tensor>& given, const char* name, const Tensor& out,
                       Tensor& keep) {
  if (!given) return nullptr;
  STD_TORCH_CHECK(given->scalar_type() == torch::headeronly::ScalarType::Long &&
                      given->dim() == 1 && out.dim() > 0 && given->size(0) == out.size(0) &&
                      given->device() == out.device(),
                  "philox_normal: ", name, " must be int64 with an entry for each leading index");
  keep = torch::stable::contiguous(*given);
  return static_cast<const int64_t*>(keep.const_data_ptr());
}

void philox_normal(Tensor out, int64_t seed, int64_t draw, int64_t step,
                   std::optional<Tensor> draws, std::optional<Tensor> steps) {
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  STD_TORCH_CHECK(out.scalar_type() == torch::headeronly::ScalarType::Float && out.is_contiguous(),
                  "philox_normal: the output must be contiguous float32");
  if (out.numel() == 0) return;
  Tensor keep[2];
  const Keys keys{static_cast<uint64_t>(seed), static_cast<uint64_t>(draw),
                  static_cast<uint64_t>(step), keys_of(draws, "draw", out, keep[0]),
                  keys_of(steps, "step", out, keep[1])};
  const int64_t fields = draws || steps ? out.size(0) : 1;
  const int64_t size = out.numel() / fields, threads = fields * ((size + 3) / 4);
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, 132 * 32));
  // Slices of a tensor may start anywhere: 16-byte stores want their alignment.
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  STD_TORCH_CHECK(size % 4 != 0 || reinterpret_cast<uintptr_t>(to) % 16 == 0,
                  "philox_normal: the output must be aligned to 16 bytes");
  philox_kernel<<<blocks, kThreads, 0, current_stream(out)>>>(keys, fields, size, to);
  check_launch("philox_normal");
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("philox_normal_", TORCH_BOX(&philox_normal));
}

}  // namespace
}  // namespace diffad
