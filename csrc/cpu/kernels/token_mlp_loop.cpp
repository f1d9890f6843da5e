// token_mlp_loop: a tile of tokens goes through all layers of all steps without leaving the cache.
// In float32 or float64; narrower weights are widened, and inputs of products rounded to their
// dtype.
#include "token_mlp_loop.h"

#include "token_mlp_tile.h"

namespace diffad::DIFFAD_ISA {
namespace {

template <class C>
void run_tile(const TokenMlpArgs& a, int64_t first, int64_t tokens, void* scratch) {
  // Panels take time for all of their lanes, Tokens for those there are, but more for each: the
  // last panel is full, or nearly. (Products in panels rely on more than half of it.)
  constexpr int64_t kPanel = 2 * kLanes<C>;
  const int64_t rest = tokens % kPanel;
  const int64_t in_panels = rest > 3 * kPanel / 4 ? tokens : tokens - rest;
  if (in_panels > 0) run(Panels<C>(a, first, in_panels), scratch);
  if (in_panels < tokens) run(Tokens<C>{a, first + in_panels, tokens - in_panels}, scratch);
}

}  // namespace

void token_mlp_loop(const TokenMlpArgs& args, void* scratch, int64_t begin, int64_t end) {
  for_tiles(args, begin, end, [&](int64_t first, int64_t tokens) {
    args.dtype == DType::kDouble ? run_tile<double>(args, first, tokens, scratch)
                                 : run_tile<float>(args, first, tokens, scratch);
  });
}

}  // namespace diffad::DIFFAD_ISA
