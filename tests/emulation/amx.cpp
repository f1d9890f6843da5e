// What the operator chooses its kernels by: AMX, and of the kernels without it those for AVX-512.
#include "kernels/token_mlp_loop.h"

#include <cstdlib>

namespace diffad {

Isa active_isa() { return Isa::kAmx; }

namespace default_ {
void token_mlp_loop(const TokenMlpArgs&, void*, int64_t, int64_t) { std::abort(); }
}  // namespace default_
namespace avx2 {
void token_mlp_loop(const TokenMlpArgs&, void*, int64_t, int64_t) { std::abort(); }
}  // namespace avx2
namespace avx512_bf16 {
void token_mlp_loop_bf16(const TokenMlpArgs&, void*, int64_t, int64_t) { std::abort(); }
}  // namespace avx512_bf16

}  // namespace diffad
