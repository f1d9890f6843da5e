// The DDIM step over tiles that stay in the first-level cache. Operands of another dtype than the
// arithmetic's are converted a tile at a time, so that one inner loop serves all dtypes and memory
// is read and written once.
#include "ddim.h"

namespace diffad::DIFFAD_ISA {
namespace {

// Elements [offset, offset + n) of an operand as numbers of C: in place, or converted to `buffer`.
template <class C>
DIFFAD_SIMD const C* tile_of(const DdimOperand& operand, int64_t offset, int64_t n, C* buffer) {
  for_dtype(operand.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(operand.data) + offset;
    if constexpr (std::is_same_v<compute_t<T>, C>) {
      constexpr int lanes = kLanes<C>;
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) store(buffer + i, load(from + i));
      if (i < n) store_partial(buffer + i, load_partial(from + i, n - i), n - i);
    } else {
      for (int64_t i = 0; i < n; ++i) buffer[i] = static_cast<C>(load_one(from + i));
    }
  });
  return buffer;
}

template <class C>
struct Tile {
  const C *x, *m, *y, *z;
};

// load(), of zeros where there is no operand.
template <bool kThere, class C>
DIFFAD_SIMD Vec<C> load_if(const C* p, int64_t i) {
  if constexpr (kThere) return load(p + i);
  return Vec<C>{};
}
template <bool kThere, class C>
DIFFAD_SIMD Vec<C> load_partial_if(const C* p, int64_t i, int64_t n) {
  if constexpr (kThere) return load_partial(p + i, n);
  return Vec<C>{};
}

template <bool kGuided, bool kLimited, bool kNoisy, class T, class C>
void update(const DdimCoefficients<C>& c, const Tile<C>& in, T* out, int64_t n) {
  constexpr int lanes = kLanes<C>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    store(out + i, ddim_update<kGuided, kLimited, kNoisy>(c, load(in.x + i), load(in.m + i),
                                                          load_if<kGuided>(in.y, i),
                                                          load_if<kNoisy>(in.z, i)));
  }
  if (i < n) {
    const int64_t rest = n - i;
    const Vec<C> next = ddim_update<kGuided, kLimited, kNoisy>(
        c, load_partial(in.x + i, rest), load_partial(in.m + i, rest),
        load_partial_if<kGuided>(in.y, i, rest), load_partial_if<kNoisy>(in.z, i, rest));
    store_partial(out + i, next, rest);
  }
}

template <bool kGuided, class C>
void magnitude(const DdimCoefficients<C>& c, const Tile<C>& in, C* out, int64_t n) {
  constexpr int lanes = kLanes<C>;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    store(out + i, abs(ddim_x0<kGuided>(c, load(in.x + i), load(in.m + i),
                                        load_if<kGuided>(in.y, i))));
  }
  if (i < n) {
    const int64_t rest = n - i;
    const Vec<C> x0 =
        ddim_x0<kGuided>(c, load_partial(in.x + i, rest), load_partial(in.m + i, rest),
                         load_partial_if<kGuided>(in.y, i, rest));
    store_partial(out + i, abs(x0), rest);
  }
}

template <class C, class F>
DIFFAD_SIMD void for_tiles(const DdimArgs& args, int64_t begin, int64_t end, F&& f) {
  C buffer[4][kDdimTile];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = i / args.tiles, start = i % args.tiles * kDdimTile;
    const int64_t n = args.size - start < kDdimTile ? args.size - start : kDdimTile;
    const DdimOperand* operands[4] = {&args.x, &args.m, &args.y, &args.z};
    const C* tile[4];
    for (int k = 0; k < 4; ++k) {
      const DdimOperand& operand = *operands[k];
      const int64_t offset = (operand.shared ? 0 : sample * args.size) + start;
      constexpr DType kOwn = std::is_same_v<C, double> ? DType::kDouble : DType::kFloat;
      if (operand.data == nullptr || operand.dtype == kOwn) {
        tile[k] = static_cast<const C*>(operand.data) + offset;
      } else {
        tile[k] = tile_of(operand, offset, n, buffer[k]);
      }
    }
    const auto* c = static_cast<const DdimCoefficients<C>*>(args.coefficients);
    f(c[args.coefficients_shared ? 0 : sample], Tile<C>{tile[0], tile[1], tile[2], tile[3]},
      sample * args.size + start, n);
  }
}

template <class T, class C>
void velocity(const DdimCoefficients<C>& c, const Tile<C>& in, T* out, T* target, int64_t n) {
  constexpr int lanes = kLanes<C>;
  const auto both = [&](Vec<C> x, Vec<C> m, auto&& put) {
    put(out, ddim_update<false, false, false>(c, x, m, x, x));
    put(target, ddim_x0<false>(c, x, m, x));
  };
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    both(load(in.x + i), load(in.m + i), [&](T* to, Vec<C> y) { store(to + i, y); });
  }
  if (i < n) {
    both(load_partial(in.x + i, n - i), load_partial(in.m + i, n - i),
         [&](T* to, Vec<C> y) { store_partial(to + i, y, n - i); });
  }
}

}  // namespace

void noised_velocity(const DdimArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = compute_t<T>;
    T *out = static_cast<T*>(args.out), *target = static_cast<T*>(args.target);
    for_tiles<C>(args, begin, end, [&](const auto& c, const Tile<C>& in, int64_t at, int64_t n) {
      velocity(c, in, out + at, target + at, n);
    });
  });
}

void ddim_update(const DdimArgs& args, int64_t begin, int64_t end) {
  const bool guided = args.y.data != nullptr, noisy = args.z.data != nullptr;
  for_dtype(args.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    using C = compute_t<T>;
    T* out = static_cast<T*>(args.out);
    for_tiles<C>(args, begin, end, [&](const auto& c, const Tile<C>& in, int64_t at, int64_t n) {
      switch (guided * 4 + args.limited * 2 + noisy) {
        case 0: return update<false, false, false>(c, in, out + at, n);
        case 1: return update<false, false, true>(c, in, out + at, n);
        case 2: return update<false, true, false>(c, in, out + at, n);
        case 3: return update<false, true, true>(c, in, out + at, n);
        case 4: return update<true, false, false>(c, in, out + at, n);
        case 5: return update<true, false, true>(c, in, out + at, n);
        case 6: return update<true, true, false>(c, in, out + at, n);
        default: return update<true, true, true>(c, in, out + at, n);
      }
    });
  });
}

void ddim_magnitude(const DdimArgs& args, int64_t begin, int64_t end) {
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    C* out = static_cast<C*>(args.out);
    for_tiles<C>(args, begin, end, [&](const auto& c, const Tile<C>& in, int64_t at, int64_t n) {
      args.y.data ? magnitude<true>(c, in, out + at, n) : magnitude<false>(c, in, out + at, n);
    });
  };
  args.x.dtype == DType::kDouble ? run(double{}) : run(float{});
}

}  // namespace diffad::DIFFAD_ISA
