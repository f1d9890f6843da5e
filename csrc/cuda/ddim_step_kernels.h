// The kernels of q_sample and ddim_step, apart from torch: a test on the CPU runs this very code,
// thread by thread (tests/emulation/). See common/diffusion.h for the maths.
//
// One pass: a thread reads eight neighbouring elements of x_t and of the network's output with
// 16-byte accesses, computes in float (double for double), and writes x_s and, in a loop, the
// network's next input. Absent operands count as 0, so that one kernel serves every option: the few
// products more are nothing beside the memory traffic. Noise of eta > 0 is drawn in the kernel; of
// four neighbours in the order of (C, H, W) one Philox block gives the numbers: a contiguous
// tensor needs a quarter of a block an element and a channels_last one a whole block.
#pragma once

#include <cmath>
#include <cstdint>

#include "../common/diffusion.h"
#include "../common/divide.h"
#include "../common/haar.h"
#include "../common/philox.h"
#include "step_table.h"

namespace diffad {

constexpr int kStepThreads = 256;
constexpr int kThresholdThreads = 1024;
constexpr int kPack = 8;

// Which number of a sample's noise belongs to an element: samples are (channels, pixels), one of
// both lying inside.
struct NoiseOrder {
  int64_t channels, pixels;
  bool channels_inside;

  __device__ int64_t index(int64_t element) const {
    if (!channels_inside) return element;
    return element % channels * pixels + element / channels;
  }
};

// The Philox stream of a loop's noise; the step is that of the counter, plus 1.
struct NoiseKey {
  uint64_t seed, draw;
  NoiseOrder order;
};

template <class C, class X, class M>
struct StepArgs {
  int64_t samples, size;  // elements of a sample
  const X *x, *y, *z;     // y, z: null where there is none
  const M* m;
  bool m_shared, y_shared, z_shared;  // one sample for all
  X* out;
  M* input;  // the network's next input, or null
  // One for all samples where `coefficients` is null, else one a sample or, with a counter, one a
  // step of the table.
  DdimCoefficients<C> one;
  const DdimCoefficients<C>* coefficients;
  const C* limits;  // dynamic thresholds, one a sample, or null
  StepCounter* counter;
  int32_t steps;
  NoiseKey noise;
};

template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T value[N];
};

template <int N, class C, class T>
__device__ __forceinline__ void load(const T* from, C (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
  DIFFAD_UNROLL
  for (int i = 0; i < N; ++i) to[i] = static_cast<C>(pack.value[i]);
}

template <int N, class C, class T>
__device__ __forceinline__ void store(T* to, const C (&from)[N]) {
  Pack<T, N> pack;
  DIFFAD_UNROLL
  for (int i = 0; i < N; ++i) pack.value[i] = static_cast<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

__device__ __forceinline__ void normal_block(const NoiseKey& key, uint32_t step, int64_t block,
                                             float (&z)[4]) {
  uint64_t counter[4] = {static_cast<uint64_t>(block), key.draw & 0xffffffffu, step,
                         key.draw >> 32};
  one::philox4x32(counter, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
  one::box_muller(static_cast<uint32_t>(counter[0]), static_cast<uint32_t>(counter[1]), z[0], z[1]);
  one::box_muller(static_cast<uint32_t>(counter[2]), static_cast<uint32_t>(counter[3]), z[2], z[3]);
}

// The noise of N elements from `element` on.
template <int N, class C>
__device__ __forceinline__ void draw(const NoiseKey& key, uint32_t step, int64_t element,
                                     C (&z)[N]) {
  float four[4];
  if constexpr (N % 4 == 0) {
    if (!key.order.channels_inside) {
      DIFFAD_UNROLL
      for (int i = 0; i < N / 4; ++i) {
        normal_block(key, step, element / 4 + i, four);
        DIFFAD_UNROLL
        for (int j = 0; j < 4; ++j) z[4 * i + j] = four[j];
      }
      return;
    }
  }
  DIFFAD_UNROLL
  for (int i = 0; i < N; ++i) {
    const int64_t index = key.order.index(element + i);
    normal_block(key, step, index / 4, four);
    const int j = static_cast<int>(index % 4);
    z[i] = j == 0 ? four[0] : j == 1 ? four[1] : j == 2 ? four[2] : four[3];
  }
}

template <int N, class C, class X, class M>
__global__ void __launch_bounds__(kStepThreads) step_kernel(const StepArgs<C, X, M> args) {
  const int64_t groups = args.size / N;
  int32_t step = 0;
  if (args.counter) {
    step = args.counter->step;
    advance(args.counter, args.steps);
  }
  const int64_t stride = int64_t{gridDim.x} * kStepThreads;
  for (int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x; i < args.samples * groups;
       i += stride) {
    const int64_t sample = args.samples == 1 ? 0 : quotient(i, groups);
    const int64_t in_sample = (i - sample * groups) * N, at = sample * args.size + in_sample;
    DdimCoefficients<C> c = args.one;
    if (args.coefficients) c = args.coefficients[args.counter ? step : sample];
    if (args.limits) set_threshold(c, args.limits[sample]);
    C x[N], m[N], y[N] = {}, z[N] = {}, next[N];
    load(args.x + at, x);
    load(args.m + (args.m_shared ? in_sample : at), m);
    if (args.y) load(args.y + (args.y_shared ? in_sample : at), y);
    if (args.z) {
      load(args.z + (args.z_shared ? in_sample : at), z);
    } else if (c.s_z != 0) {
      draw(args.noise, static_cast<uint32_t>(step) + 1, in_sample, z);
    }
    // Where no limited x0 takes part, an infinite one must not make a NaN of its weight of 0.
    if (c.s_x0 != 0) {
      DIFFAD_UNROLL
      for (int j = 0; j < N; ++j) {
        next[j] = one::ddim_update<true, true, true>(c, x[j], m[j], y[j], z[j]);
      }
    } else {
      DIFFAD_UNROLL
      for (int j = 0; j < N; ++j) {
        next[j] = one::ddim_update<true, false, true>(c, x[j], m[j], y[j], z[j]);
      }
    }
    store(args.out + at, next);
    if (args.input) store(args.input + at, next);
  }
}

// ------------------------------------------------------------- dynamic threshold

// A number that is not negative as an unsigned integer of the same order, NaN the largest.
__device__ __forceinline__ uint32_t key_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint64_t key_of(double x) {
  return static_cast<uint64_t>(__double_as_longlong(x));
}
__device__ __forceinline__ float number_of(uint32_t key) { return __uint_as_float(key); }
__device__ __forceinline__ double number_of(uint64_t key) {
  return __longlong_as_double(static_cast<long long>(key));
}

// The quantile of |x0| over each sample, exact: radix selection, a byte a pass from the top, by one
// block a sample. x0 is computed again in every pass, which takes no memory.
template <class C, class X, class M>
__global__ void __launch_bounds__(kThresholdThreads)
threshold_kernel(const StepArgs<C, X, M> args, double ratio, C largest, C* limits) {
  using Key = decltype(key_of(C{}));
  constexpr int kBits = sizeof(Key) * 8;
  // A column of counters for each lane of a warp: most values share their first byte, and equal ones
  // of a warp do not collide. A lane counts less than 2^32 as long as a sample has less than 2^37.
  constexpr int kLanes = 32;
  __shared__ uint32_t counts[256 * kLanes];
  __shared__ int64_t histogram[256];
  __shared__ Key chosen;
  __shared__ int64_t left, equal;
  __shared__ Key next_key[32];

  const int32_t step = args.counter ? args.counter->step : 0;  // the step kernel moves it on
  for (int64_t sample = blockIdx.x; sample < args.samples; sample += gridDim.x) {
    DdimCoefficients<C> c = args.one;
    if (args.coefficients) c = args.coefficients[args.counter ? step : sample];
    const int64_t at = sample * args.size;
    const auto key_at = [&](int64_t i) {
      const C y = args.y ? static_cast<C>(args.y[args.y_shared ? i : at + i]) : C(0);
      const C m = static_cast<C>(args.m[args.m_shared ? i : at + i]);
      const C x0 = one::ddim_x0<true>(c, static_cast<C>(args.x[at + i]), m, y);
      return key_of(x0 < 0 ? -x0 : x0) & (~Key{0} >> 1);
    };
    const double position = ratio * static_cast<double>(args.size - 1);
    int64_t rank = static_cast<int64_t>(position);
    const C weight = static_cast<C>(position - static_cast<double>(rank));
    Key prefix = 0;
    int64_t same = 0;  // elements equal to the one of rank `rank` in the end
    for (int shift = kBits - 8; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < 256 * kLanes; i += blockDim.x) counts[i] = 0;
      __syncthreads();
      const Key above = shift + 8 == kBits ? Key{0} : ~Key{0} << (shift + 8);
      for (int64_t i = threadIdx.x; i < args.size; i += blockDim.x) {
        const Key key = key_at(i);
        if ((key & above) == prefix) {
          atomicAdd(&counts[(key >> shift & 255) * kLanes + threadIdx.x % kLanes], 1u);
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < 256; i += blockDim.x) {
        int64_t sum = 0;
        for (int k = 0; k < kLanes; ++k) sum += counts[i * kLanes + (k + i) % kLanes];
        histogram[i] = sum;
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        int64_t r = rank;
        int bin = 0;
        while (bin < 255 && r >= histogram[bin]) r -= histogram[bin++];
        chosen = prefix | static_cast<Key>(bin) << shift;
        left = r;
        equal = histogram[bin];
      }
      __syncthreads();
      prefix = chosen, rank = left, same = equal;
    }
    // The next larger: another of the same value, or the smallest beyond it.
    Key next = ~Key{0};
    if (rank + 1 >= same) {
      for (int64_t i = threadIdx.x; i < args.size; i += blockDim.x) {
        const Key key = key_at(i);
        if (key > prefix && key < next) next = key;
      }
      for (int lane = 16; lane > 0; lane /= 2) {
        const Key other = __shfl_xor_sync(0xffffffffu, next, lane);
        next = other < next ? other : next;
      }
      if (threadIdx.x % 32 == 0) next_key[threadIdx.x / 32] = next;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const C below = number_of(prefix);
      C above = below;
      if (rank + 1 >= same) {
        Key least = ~Key{0};
        for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) {
          least = next_key[i] < least ? next_key[i] : least;
        }
        if (least != ~Key{0}) above = number_of(least);
      }
      const C s = weight < C(0.5) ? below + weight * (above - below)
                                  : above - (above - below) * (1 - weight);
      limits[sample] = s < 1 ? C(1) : s > largest ? largest : s;
    }
  }
}

// --------------------------------------------------------- coefficients a sample

// Alphas in double, a number where there is no tensor.
struct Alpha {
  const double* data;
  double number;
  int64_t stride;
  __device__ double operator[](int64_t i) const { return data ? data[i * stride] : number; }
};

template <class C>
__global__ void __launch_bounds__(kStepThreads)
coefficients_kernel(Alpha a, Alpha b, DdimOptions options, double limit, int64_t samples,
                    DdimCoefficients<C>* out) {
  for (int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x; i < samples;
       i += int64_t{gridDim.x} * kStepThreads) {
    DdimCoefficients<double> c = ddim_coefficients(a[i], b[i], options);
    c.limit = limit;
    out[i] = c.as<C>();
  }
}

template <class C>
__global__ void __launch_bounds__(kStepThreads)
noising_kernel(const int64_t* t, const double* table, int64_t length, int64_t samples,
               DdimCoefficients<C>* out) {
  for (int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x; i < samples;
       i += int64_t{gridDim.x} * kStepThreads) {
    const int64_t k = t[i] < 0 ? t[i] + length : t[i];
    // The host cannot look without waiting: beyond the table the sample becomes NaN.
    const double a = 0 <= k && k < length ? table[k] : ::nan("");
    DdimCoefficients<C> c{};
    c.s_x = static_cast<C>(::sqrt(a));
    c.s_m = static_cast<C>(::sqrt(1 - a));
    out[i] = c;
  }
}

}  // namespace diffad
