// token_mlp_loop: a tile of tokens goes through all layers of all steps without leaving the cache.
// In float32 or float64; narrower weights are widened, and inputs of products rounded to their dtype.
#include "token_mlp_loop.h"

#include "token_mlp_tile.h"

namespace diffad::DIFFAD_ISA {
namespace {

template <class C>
void run_tile(const TokenMlpArgs& a, int64_t first, void* scratch) {
  const int64_t left = a.tokens - first;
  const int64_t tokens = left < kTokenTile ? left : kTokenTile;
  if (tokens > Few<C>::kMost) return run(Panels<C>(a, first, tokens), scratch);
  run(Few<C>{a, first, tokens}, scratch);
}

}  // namespace

void token_mlp_loop(const TokenMlpArgs& args, void* scratch, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kTokenTile;
    if (args.dtype == DType::kDouble) {
      run_tile<double>(args, first, scratch);
    } else {
      run_tile<float>(args, first, scratch);
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
