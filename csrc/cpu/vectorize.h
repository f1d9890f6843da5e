// CPU features chosen at run time: the library is compiled for plain x86-64 (or any other
// processor), and loops that gain from wider vectors are compiled a second time for AVX2.
#pragma once

#include <utility>

namespace diffad {

#if defined(__x86_64__) && defined(__GNUC__)
template <class Body, class... Args>
__attribute__((target("avx2,fma,f16c"))) void run_avx2(Args... args) {
  Body::run(args...);
}

inline bool has_avx2() {
  static const bool yes = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
  return yes;
}
#endif

// Calls Body::run(args...), compiled for the best instruction set of this machine. Body::run and
// all it calls in its loops must be always_inline, or they keep the baseline's instructions. Both
// versions give the same bits: the build forbids contraction of a*b+c.
template <class Body, class... Args>
void vectorized(Args... args) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (has_avx2()) return run_avx2<Body>(args...);
#endif
  Body::run(args...);
}

}  // namespace diffad
