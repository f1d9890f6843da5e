// In place of csrc/cuda/mma.h, from PTX's description of the instructions: lanes of a warp meet.
#pragma once

#include <cuda_runtime.h>

namespace diffad {

inline int lane_of_thread() { return threadIdx.x % emulated::kWarp; }

// As far off as it may be.
inline float tanh_approx(float x) { return std::tanh(x) * (1 + std::ldexp(1.0f, -11)); }

inline uint32_t pack_bf16(float low, float high) {
  const auto rounded = [](float x) {
    const uint32_t bits = __float_as_uint(x);
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}

// PTX ISA, mma.m16n8k16, .bf16: A element (row, k) is in lane (row % 8) * 4 + k % 8 / 2, register
// row / 8 + k / 8 * 2, half k % 2; B element (k, n) in lane n * 4 + k % 8 / 2, register k / 8, half
// k % 2; C element (row, n) in lane (row % 8) * 4 + n / 2, register row / 8 * 2 + n % 2.
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  const auto all = emulated::gather<Factors>({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto half = [](uint32_t x, int k) { return __uint_as_float(k % 2 ? x & 0xffff0000u : x << 16); };
  const int lane = lane_of_thread();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      c[i] += half(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k) *
              half(all[n * 4 + k % 8 / 2].b[k / 8], k);
    }
  }
}

// PTX ISA, ldmatrix.x4.
inline void load_matrices(uint32_t (&r)[4], const void* shared) {
  const auto rows = emulated::gather(static_cast<const uint32_t*>(shared));
  const int lane = lane_of_thread();
  for (int i = 0; i < 4; ++i) r[i] = rows[i * 8 + lane / 4][lane % 4];
}

// A copy may arrive at any time up to the wait: those of odd threads do at once, which shows where
// shared memory is overwritten too early, the others at the wait, which shows where that is missing.
inline void wait_for_copies() {
  auto& copies = emulated::this_fiber().copies;
  for (const auto& copy : copies) copy();
  copies.clear();
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    emulated::fail("a copy of 16 bytes from or to an address that is no multiple of 16");
  }
  emulated::this_fiber().copies.emplace_back([=] {
    valid ? std::memcpy(shared, global, 16) : std::memset(shared, 0, 16);
  });
  if (threadIdx.x % 2) wait_for_copies();
}

}  // namespace diffad
