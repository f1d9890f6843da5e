// Tiles of the training loss and of its gradient.
#include "weighted_mse.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

// f(prediction, target, start, n) with pointers of their types, for each task's tile.
template <class F>
DIFFAD_SIMD void for_tiles(const MseArgs& args, int64_t begin, int64_t end, F&& f) {
  for_dtype(args.dtype, [&](auto of_prediction) {
    using T = decltype(of_prediction);
    const auto go = [&](auto of_target) {
      using U = decltype(of_target);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / args.tiles, first = task % args.tiles * kMseTile;
        const int64_t n = args.size - first < kMseTile ? args.size - first : kMseTile;
        const int64_t at = sample * args.size + first;
        f(static_cast<const T*>(args.prediction) + at, static_cast<const U*>(args.target) + at,
          task, at, n);
      }
    };
    args.target_dtype == args.dtype ? go(T{}) : go(compute_t<T>{});
  });
}

}  // namespace

void square_sums(const MseArgs& args, int64_t begin, int64_t end) {
  for_tiles(args, begin, end, [&](const auto* p, const auto* t, int64_t task, int64_t, int64_t n) {
    using V = decltype(load(p));
    using C = lane_t<V>;
    constexpr int lanes = kLanes<C>;
    // Additions to one sum wait for each other: four run side by side.
    V sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const V error = load(p + i + k * lanes) - load(t + i + k * lanes);
        sum[k] = fma(error, error, sum[k]);
      }
    }
    for (; i < n; i += lanes) {
      const bool whole = i + lanes <= n;
      const V error = whole ? load(p + i) - load(t + i)
                            : load_partial(p + i, n - i) - load_partial(t + i, n - i);
      sum[0] = fma(error, error, sum[0]);
    }
    static_cast<C*>(args.sums)[task] = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
  });
}

void mse_gradient(const MseArgs& args, int64_t begin, int64_t end) {
  for_tiles(args, begin, end,
            [&](const auto* p, const auto* t, int64_t task, int64_t at, int64_t n) {
    using V = decltype(load(p));
    using C = lane_t<V>;
    using T = std::remove_const_t<std::remove_pointer_t<decltype(p)>>;
    constexpr int lanes = kLanes<C>;
    const V factor = splat(static_cast<const C*>(args.factors)[task / args.tiles]);
    T* out = static_cast<T*>(args.gradient) + at;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) store(out + i, factor * (load(p + i) - load(t + i)));
    if (i < n) {
      const V error = load_partial(p + i, n - i) - load_partial(t + i, n - i);
      store_partial(out + i, factor * error, n - i);
    }
  });
}

}  // namespace diffad::DIFFAD_ISA
