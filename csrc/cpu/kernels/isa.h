// Instruction sets chosen at run time.
//
// setup.py compiles every file of this folder once for each instruction set, with DIFFAD_ISA
// defined as the namespace that its kernels go to: default_ (any processor of the architecture,
// which on aarch64 has NEON), and on x86-64 avx2 and avx512 too. The files include neither torch's
// headers nor library code that would be emitted out of line: such functions have one name for all
// copies, and the linker might keep the copy with instructions that the machine does not have.
//
// A kernel is declared once, in the header that it shares with its operator,
//   DIFFAD_KERNEL(name, const Args&, int64_t begin, int64_t end)
// and defined in `namespace diffad::DIFFAD_ISA`. The operator calls name_kernel()(...), which is
// the definition for the instruction set in use.
//
// Files named *_bf16.cpp are compiled for avx512_bf16 and amx alone, which have dot products of
// bfloat16 and otherwise what avx512 has. Their kernels are declared by DIFFAD_BF16_KERNEL, and
// name_kernel() is null where the instruction set in use has none of them.
#pragma once

#include <cstdint>

namespace diffad {

enum class Isa : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

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
      case Isa::kDefault: return default_::name;        \
      case Isa::kAvx2: return avx2::name;               \
      default: return avx512::name;                     \
    }                                                   \
  }
#define DIFFAD_BF16_KERNEL(name, ...)                   \
  namespace avx512_bf16 {                               \
  void name(__VA_ARGS__);                               \
  }                                                     \
  namespace amx {                                       \
  void name(__VA_ARGS__);                               \
  }                                                     \
  inline auto name##_kernel() -> void (*)(__VA_ARGS__) { \
    switch (active_isa()) {                             \
      case Isa::kAmx: return amx::name;                 \
      case Isa::kAvx512Bf16: return avx512_bf16::name;  \
      default: return nullptr;                          \
    }                                                   \
  }
#else
#define DIFFAD_KERNEL(name, ...)                        \
  namespace default_ {                                  \
  void name(__VA_ARGS__);                               \
  }                                                     \
  inline auto name##_kernel() -> void (*)(__VA_ARGS__) { return default_::name; }
#define DIFFAD_BF16_KERNEL(name, ...) \
  inline auto name##_kernel() -> void (*)(__VA_ARGS__) { return nullptr; }
#endif
