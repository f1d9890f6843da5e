// Which instruction set the CPU kernels use; see kernels/isa.h.
#include "kernels/isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>

namespace diffad {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

// Level -1 only asks; 0 to 2 choose one. Returns the one in use afterwards.
int64_t cpu_isa(int64_t level) {
  if (level >= 0) {
    STD_TORCH_CHECK(level <= static_cast<int64_t>(best_isa()), "cpu_isa: this processor has no ",
                    level == 2 ? "AVX-512" : "AVX2 with FMA and F16C");
    chosen() = static_cast<Isa>(level);
  }
  return static_cast<int64_t>(active_isa());
}

}  // namespace

Isa active_isa() { return chosen().load(std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

}  // namespace diffad
