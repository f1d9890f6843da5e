// The inner loop of matrix products: a block of outputs that stays in registers.
#pragma once

#include "simd.h"

namespace diffad::DIFFAD_ISA {

// The block of outputs is chosen by the registers: R rows times V vectors need R V accumulators,
// V vectors of the one operand and one broadcast number of the other.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPairRows = 12;  // 24 of 32 registers
#else
constexpr int kPairRows = 6;  // 12 of 16, enough to keep two units of latency 4 busy
#endif

// sum[r][v] += sum over k < count of rows[r * row + k * row_step] times the vector at
// panel[v * vector + k * panel_step]: for each lane one chain of fma over k in its order. What lies
// `ahead` of the panel, where that is not 0, is asked for on the way: the panel of the next call.
template <class C, int R, int V>
DIFFAD_SIMD void multiply_add(const C* rows, int64_t row, int64_t row_step, const C* panel,
                              int64_t vector, int64_t panel_step, int64_t count,
                              Vec<C> (&sum)[R][V], int64_t ahead = 0) {
  for (int64_t k = 0; k < count; ++k) {
    Vec<C> x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const C* from = panel + k * panel_step + v * vector;
      x[v] = load(from);
      // Two short vectors share a line of the cache.
      if (ahead != 0 && (v == 0 || kVectorBytes == 64)) __builtin_prefetch(from + ahead);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<C> number = splat(rows[r * row + k * row_step]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[r][v] = fma(number, x[v], sum[r][v]);
    }
  }
}

// Calls f with a constant: `rows` <= R.
template <int R, class F>
DIFFAD_SIMD void with_rows(int64_t rows, F&& f) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, f);
  }
  f(std::integral_constant<int, R>());
}

// Calls f(first, how many) for blocks of [0, count) of at most `most`, of equal size give or take
// one: a short last block would leave units without work.
template <class F>
DIFFAD_SIMD void for_even_blocks(int64_t count, int64_t most, F&& f) {
  const int64_t blocks = (count + most - 1) / most;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * count / blocks;
    f(first, (block + 1) * count / blocks - first);
  }
}

}  // namespace diffad::DIFFAD_ISA
