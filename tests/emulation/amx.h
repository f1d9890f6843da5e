// AMX's tiles in plain C++, in place of the compiler's: by Intel's description of the instructions
// (Architecture Instruction Set Extensions Programming Reference, chapter 3).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
  int rows, row_bytes;
  uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline void tile_loadconfig(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  if (bytes[0] != 1) std::abort();
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    tiles[i] = {bytes[48 + i], row_bytes, {}};
    if (tiles[i].rows > 16 || row_bytes > 64) std::abort();
  }
  configured = true;
}
inline void tile_release() { configured = false; }

inline Tile& tile(int i) {
  if (!configured || tiles[i].rows == 0) std::abort();
  return tiles[i];
}
inline void tile_zero(int i) { std::memset(tile(i).bytes, 0, sizeof(Tile::bytes)); }
inline void tile_loadd(int i, const void* from, int64_t stride) {
  tile_zero(i);
  for (int r = 0; r < tiles[i].rows; ++r) {
    std::memcpy(tiles[i].bytes[r], static_cast<const char*>(from) + r * stride, tiles[i].row_bytes);
  }
}
inline void tile_stored(int i, void* to, int64_t stride) {
  for (int r = 0; r < tile(i).rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[i].bytes[r], tiles[i].row_bytes);
  }
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float widened(const uint8_t* p) {
  uint16_t narrow;
  std::memcpy(&narrow, p, 2);
  const uint32_t wide = uint32_t{narrow} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return flushed(x);
}
// d (m, n) += a (m, pairs) b (pairs, n), even and odd inputs in a sum of their own.
inline void tile_dpbf16ps(int d, int a, int b) {
  Tile &sums = tile(d), &left = tile(a), &right = tile(b);
  if (left.row_bytes != 4 * right.rows || sums.row_bytes != right.row_bytes ||
      sums.rows != left.rows) {
    std::abort();
  }
  for (int m = 0; m < sums.rows; ++m) {
    for (int n = 0; n < sums.row_bytes; n += 4) {
      float part[2] = {};
      for (int k = 0; k < right.rows; ++k) {
        for (int odd = 0; odd < 2; ++odd) {
          const float x = widened(&left.bytes[m][4 * k + 2 * odd]);
          part[odd] = flushed(std::fma(x, widened(&right.bytes[k][n + 2 * odd]), part[odd]));
        }
      }
      float sum;
      std::memcpy(&sum, &sums.bytes[m][n], 4);
      sum = flushed(flushed(sum) + flushed(part[0] + part[1]));
      std::memcpy(&sums.bytes[m][n], &sum, 4);
    }
  }
}

}  // namespace emulated

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_loadconfig
#undef _tile_release
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_release emulated::tile_release
