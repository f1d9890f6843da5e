// philox_normal: each vector of 32-bit lanes takes as many blocks of four numbers. The words of
// even and of odd blocks are computed in two vectors of 64-bit lanes (common/philox.h) and put
// together for the transform to normal numbers.
#include "philox_normal.h"

#include "../../common/philox.h"

namespace diffad::DIFFAD_ISA {
namespace {

constexpr int kBlocks = kLanes<float>;
constexpr int kGroup = 4 * kBlocks;  // numbers at a time

DIFFAD_SIMD VecU64 words(uint64_t value) { return value - VecU64{}; }

DIFFAD_SIMD void group_of_normals(const PhiloxArgs& args, uint64_t block, uint64_t draw,
                                  uint64_t step, float* out) {
  VecU32 w[4];
  VecU64 parity[2][4];
  VecU64 even = {};
#pragma GCC unroll 8
  for (int i = 0; i < kBlocks / 2; ++i) even[i] = 2 * i;
#pragma GCC unroll 2
  for (int odd = 0; odd < 2; ++odd) {
    VecU64(&counter)[4] = parity[odd];
    counter[0] = even + words(block + odd);
    counter[1] = words(draw & 0xffffffffu);
    counter[2] = words(step);
    counter[3] = words(draw >> 32);
    philox4x32(counter, static_cast<uint32_t>(args.seed), static_cast<uint32_t>(args.seed >> 32));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    w[i] = bits<VecU32>((parity[0][i] & 0xffffffffu) | (parity[1][i] << 32));
  }
  Vec<float> z[4];
  box_muller(w[0], w[1], z[0], z[1]);
  box_muller(w[2], w[3], z[2], z[3]);
  // z[j] has number j of every block: from columns to rows.
  Vec<float> a, b, c, d, quarter[4];
  interleave(z[0], z[2], a, c);
  interleave(z[1], z[3], b, d);
  interleave(a, b, quarter[0], quarter[1]);
  interleave(c, d, quarter[2], quarter[3]);
  for (int i = 0; i < 4; ++i) store(out + i * kBlocks, quarter[i]);
}

}  // namespace

void philox_normal(const PhiloxArgs& args, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t field = tile / args.tiles;
    int64_t i = tile % args.tiles * kPhiloxTile;
    const int64_t stop = i + kPhiloxTile < args.size ? i + kPhiloxTile : args.size;
    const uint64_t draw = args.draws ? args.draws[field] : args.draw;
    const uint64_t step = args.steps ? args.steps[field] : args.step;
    float* out = args.out + field * args.size;
    for (; i + kGroup <= stop; i += kGroup) group_of_normals(args, i / 4, draw, step, out + i);
    if (i < stop) {
      float rest[kGroup];
      group_of_normals(args, i / 4, draw, step, rest);
      std::memcpy(out + i, rest, (stop - i) * sizeof(float));
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
