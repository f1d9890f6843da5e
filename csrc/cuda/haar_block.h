// haar_pack and haar_unpack where one thread holds whole R x R blocks of pixels, apart from torch: a
// test on the CPU runs this very code (tests/emulation/).
//
// A thread takes L blocks that lie side by side in memory: of one channel along x (NCHW), or of
// L channels at one place (channels_last). It reads and writes each value once, in runs of up to 16
// bytes, needs nobody else's values, and has all its loads in flight before the first sum. Its
// values, at most 64, must fit into its registers with the addresses of their runs: beyond R = 4
// they do not, and haar_kernels.h cuts blocks among threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../common/haar.h"

namespace diffad {

// Values that are read or written at once.
template <class scalar_t, int kCount>
struct alignas(sizeof(scalar_t) * kCount) HaarRun {
  scalar_t v[kCount];
};

// Writes a run at once. nvcc takes the assignment of one, as a copy by way of a vector type, apart
// into a store for each value, which writes a fourth of each 16 bytes at a time; so it is spelled out.
template <class scalar_t, int kCount>
DIFFAD_INLINE void put(scalar_t* to, const HaarRun<scalar_t, kCount>& run) {
#ifdef __CUDA_ARCH__
  constexpr int kWords = sizeof(run) / 4;
  if constexpr (kWords > 0) {
    const auto at = static_cast<uint64_t>(__cvta_generic_to_global(to));
    uint32_t w[kWords];
    memcpy(w, &run, sizeof(run));
    if constexpr (kWords == 1) {
      asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(w[0]) : "memory");
    } else if constexpr (kWords == 2) {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(w[0]), "r"(w[1]) : "memory");
    } else {
      static_assert(kWords == 4, "a run has at most 16 bytes");
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(w[0]), "r"(w[1]),
                   "r"(w[2]), "r"(w[3])
                   : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<HaarRun<scalar_t, kCount>*>(to) = run;
}

// L, and how many neighbouring values of the image a thread reads at once.
template <class scalar_t, int R, bool kLast>
struct HaarBlocks {
  static constexpr int kWide = 16 / static_cast<int>(sizeof(scalar_t));
  static constexpr int L = kLast ? std::min(kWide, 64 / (R * R)) : std::max(1, kWide / R);
  static constexpr int kImageRun = kLast ? L : std::min(kWide, R * L);
  static constexpr bool kFits = R <= 4;
};

// Threads for one sample; 0 where the geometry or the addresses do not allow it.
template <class scalar_t, int R, bool kLast>
int64_t haar_threads(const HaarGeometry& g, const void* image, const void* packed) {
  using Blocks = HaarBlocks<scalar_t, R, kLast>;
  const auto runs_of = [](const Strides& s, const int64_t (&sizes)[4], const void* start, int run) {
    const int64_t strides[4] = {s.n, s.c, s.y, s.x};
    bool good = reinterpret_cast<uintptr_t>(start) % (sizeof(scalar_t) * run) == 0;
    for (int i = 0; i < 4; ++i) {
      const bool inner = i == (kLast ? 1 : 3);
      good = good && (sizes[i] <= 1 || (inner ? strides[i] == 1 : strides[i] % run == 0));
    }
    return good;
  };
  const int64_t count = kLast ? g.channels : g.cols;
  if (count % Blocks::L != 0 ||
      !runs_of(g.image, {g.batch, g.channels, g.rows * R, g.cols * R}, image, Blocks::kImageRun) ||
      // A packet has more channels than one wherever it has bands.
      !runs_of(g.packed, {g.batch, g.channels * R * R, g.rows, g.cols}, packed, Blocks::L)) {
    return 0;
  }
  return g.channels * g.rows * g.cols / Blocks::L;
}

// What thread `i` of those of sample `n` does.
template <class scalar_t, int R, bool kLast, bool kPack>
DIFFAD_INLINE void haar_block(const HaarGeometry& g, int64_t n, uint32_t i,
                              const scalar_t* __restrict__ in, scalar_t* __restrict__ out) {
  using acc = acc_t<scalar_t>;
  using Blocks = HaarBlocks<scalar_t, R, kLast>;
  constexpr int L = Blocks::L, V = Blocks::kImageRun;
  const auto next = [&i](int64_t size) {
    const auto count = static_cast<uint32_t>(size);
    const uint32_t digit = i % count;
    i /= count;
    return static_cast<int64_t>(digit);
  };
  int64_t c, block;
  if (kLast) {
    c = next(g.channels / L) * L;
    block = next(g.cols);
  } else {
    c = 0;
    block = next(g.cols / L) * L;
  }
  const int64_t row = next(g.rows);
  if (!kLast) c = i;
  const int64_t image = n * g.image.n + c * g.image.c + row * R * g.image.y + block * R * g.image.x;
  const int64_t packed = n * g.packed.n + c * g.packed.c + row * g.packed.y + block * g.packed.x;
  const int64_t band = g.channels * g.packed.c;

  acc v[L][R][R];  // of each block, rows of pixels; or v of walsh, and in it h
  if (kPack) {
    DIFFAD_UNROLL
    for (int y = 0; y < R; ++y) {
      DIFFAD_UNROLL
      for (int k = 0; k < R * L / V; ++k) {
        const int64_t at = image + y * g.image.y + k * (kLast ? g.image.x : V);
        const auto run = *reinterpret_cast<const HaarRun<scalar_t, V>*>(in + at);
        DIFFAD_UNROLL
        for (int e = 0; e < V; ++e) {
          const int x = kLast ? k : (k * V + e) % R, l = kLast ? e : (k * V + e) / R;
          v[l][y][x] = static_cast<acc>(run.v[e]);
        }
      }
    }
  } else {
    DIFFAD_UNROLL
    for (int y = 0; y < R; ++y) {
      DIFFAD_UNROLL
      for (int x = 0; x < R; ++x) {
        const int64_t at = packed + (spread(y) + 2 * spread(x)) * band;
        const auto run = *reinterpret_cast<const HaarRun<scalar_t, L>*>(in + at);
        DIFFAD_UNROLL
        for (int l = 0; l < L; ++l) v[l][y][x] = static_cast<acc>(run.v[l]);
      }
    }
  }
  DIFFAD_UNROLL
  for (int l = 0; l < L; ++l) {
    // Along y first, then along x, or the other way round, as haar_kernels.h does: the same bits.
    DIFFAD_UNROLL
    for (int pass = 0; pass < 2; ++pass) {
      DIFFAD_UNROLL
      for (int j = 0; j < R; ++j) {
        acc line[R];
        const bool along_y = (pass == 0) == kPack;
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) line[k] = along_y ? v[l][k][j] : v[l][j][k];
        walsh(line);
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) {
          (along_y ? v[l][k][j] : v[l][j][k]) = along_y ? line[k] * (acc(1) / R) : line[k];
        }
      }
    }
  }
  if (kPack) {
    DIFFAD_UNROLL
    for (int y = 0; y < R; ++y) {
      DIFFAD_UNROLL
      for (int x = 0; x < R; ++x) {
        HaarRun<scalar_t, L> run;
        DIFFAD_UNROLL
        for (int l = 0; l < L; ++l) run.v[l] = static_cast<scalar_t>(v[l][y][x]);
        const int64_t at = packed + (spread(y) + 2 * spread(x)) * band;
        put(out + at, run);
      }
    }
  } else {
    DIFFAD_UNROLL
    for (int y = 0; y < R; ++y) {
      DIFFAD_UNROLL
      for (int k = 0; k < R * L / V; ++k) {
        HaarRun<scalar_t, V> run;
        DIFFAD_UNROLL
        for (int e = 0; e < V; ++e) {
          const int x = kLast ? k : (k * V + e) % R, l = kLast ? e : (k * V + e) / R;
          run.v[e] = static_cast<scalar_t>(v[l][y][x]);
        }
        const int64_t at = image + y * g.image.y + k * (kLast ? g.image.x : V);
        put(out + at, run);
      }
    }
  }
}

}  // namespace diffad
