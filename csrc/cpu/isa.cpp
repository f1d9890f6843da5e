// Which instruction set the CPU kernels use; see kernels/isa.h.
#include "kernels/isa.h"

#include <torch/csrc/stable/library.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>

namespace diffad {
namespace {

#if defined(__x86_64__)
// Has the processor AMX with bfloat16, and may we use it? Tiles are 8 KiB of state a thread, which
// Linux saves for processes that have asked for it: for all of their threads, and more than once does
// no harm.
bool has_amx() {
  // Not every compiler that has the instructions knows their names in __builtin_cpu_supports.
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kBf16)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, since Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = __builtin_cpu_supports("avx512bf16");
  if (avx2 && avx512 && bf16 && has_amx()) return Isa::kAmx;
  if (avx2 && avx512 && bf16) return Isa::kAvx512Bf16;
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kDefault;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

constexpr const char* kNames[] = {"x86-64", "AVX2 with FMA and F16C", "AVX-512",
                                  "AVX-512 with bfloat16", "AMX with bfloat16"};

// Level -1 only asks; the others choose one. Returns the one in use afterwards.
int64_t cpu_isa(int64_t level) {
  if (level >= 0) {
    STD_TORCH_CHECK(level <= static_cast<int64_t>(Isa::kAmx), "cpu_isa: there is no level ", level);
    STD_TORCH_CHECK(level <= static_cast<int64_t>(best_isa()), "cpu_isa: this processor has no ",
                    kNames[level]);
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
