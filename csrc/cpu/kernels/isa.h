// Instruction sets chosen at run time.
//
// setup.py compiles every file of this folder once for each instruction set, with DIFFAD_ISA
// defined as the namespace that its kernels go to: default_ (any processor of the architecture),
// and on x86-64 avx2 and avx512 too. The files include neither torch's headers nor library code
// that would be emitted out of line: such functions have one name for all copies, and the linker
// might keep the copy with instructions that the machine does not have.
//
// A kernel is declared once, in the header that it shares with its operator,
//   DIFFAD_KERNEL(name, const Args&, int64_t begin, int64_t end)
// and defined in `namespace diffad::DIFFAD_ISA`. The operator calls name_kernel()(...), which is
// the definition for the instruction set in use.
#pragma once

#include <cstdint>

namespace diffad {

enum class Isa : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

// The instruction set in use: the best that this processor has, or the one that was asked for.
Isa active_isa();

}  // namespace diffad

#if defined(__x86_64__)
#define DIFFAD_KERNEL(name, ...)                        \
  namespace default_ {                                  \
  void name(__VA_ARGS__);                               \
  }                                                     \
  namespace avx2 {                                      \
  void name(__VA_ARGS__);                               \
  }                                                     \
  namespace avx512 {                                    \
  void name(__VA_ARGS__);                               \
  }                                                     \
  inline auto name##_kernel() -> void (*)(__VA_ARGS__) { \
    switch (active_isa()) {                             \
      case Isa::kAvx512: return avx512::name;           \
      case Isa::kAvx2: return avx2::name;               \
      default: return default_::name;                   \
    }                                                   \
  }
#else
#define DIFFAD_KERNEL(name, ...)                        \
  namespace default_ {                                  \
  void name(__VA_ARGS__);                               \
  }                                                     \
  inline auto name##_kernel() -> void (*)(__VA_ARGS__) { return default_::name; }
#endif
