// The matrix units by inline PTX: bf16 products with float sums (sm_80 on), what feeds them, and the
// function of the activation. By mma.sync, which all architectures have that setup.py compiles for:
// wgmma is sm_90's alone.
//
// Lane l of a warp is (g, t) = (l / 4, l % 4). A 16 x 8 result: c0, c1 are row g, columns 2t and
// 2t + 1; c2, c3 the same of row g + 8. The left factor, 16 x 16: a0 is row g, columns 2t, 2t + 1
// (two bf16, the first in the low bits), a1 row g + 8, a2 and a3 the same 8 columns further on.
// So two neighbouring results, packed, are a left factor: products chain without leaving the lane.
#pragma once

#include <cstdint>

namespace diffad {

// This thread's lane. Volatile, so that it and all that follows from it is computed where it is used
// and does not fill registers from the beginning of a kernel to its end.
__device__ __forceinline__ int lane_of_thread() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// c += a b, with b[k][n] in b0 (k = 2t, 2t + 1) and b1 (k = 2t + 8, 2t + 9), n = g.
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of bf16. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes,
// and gets of each matrix row g, columns 2t and 2t + 1.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* shared) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes from global to shared memory in the background; zeros where not `valid`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// By one instruction, to 2^-11 of the value (PTX ISA).
__device__ __forceinline__ float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as bf16, the first in the low bits.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

}  // namespace diffad
