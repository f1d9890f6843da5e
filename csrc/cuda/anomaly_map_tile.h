// The kernels of anomaly_map, apart from torch: a test on the CPU runs this very code, thread by
// thread (tests/emulation/). diffad_fast/reference/maps.py defines the map.
//
//   cosine_tile     1 - cosine of the features at their own resolution, one scale a launch;
//   weighted_tile   the residual's magnitude and sub-bands, the cosines between their four nearest,
//                   all standardised, weighted and added;
//   blur_tile       the Gaussian along both axes at once, counting the first digits of its values;
//   top_digit, top_score   the mean of the largest values; top_small that of small images.
//
// Inputs are read once; the sum of the maps is written and read once between the second and the
// third, and stays in a GPU's second-level cache for what people score at a time. Every sum is taken
// in an order that the sizes alone decide, so that results repeat bit for bit.
#pragma once

#include <cstdint>

#include "../common/divide.h"
#include "../common/haar.h"
#include "sub_bands.h"

#ifdef __CUDACC__
#define DIFFAD_UNROLL4 _Pragma("unroll 4")
#else
#define DIFFAD_UNROLL4 _Pragma("GCC unroll 4")
#endif

namespace diffad {

// ------------------------------------------------------------------------- features

constexpr int kCosineThreads = 256;
constexpr float kCosineEps = 1e-8f;

template <class T>
struct CosineArgs {
  const T *f, *f_hat;
  Strides stride, stride_hat;
  int64_t channels, width, pixels, count;  // pixels of a sample, and of all
  float* result;                           // (N, pixels)
};

// Some threads share a pixel's channels. In channels_last these lie together, and threads of a pixel
// read neighbours; elsewhere pixels lie together, and each thread of a row of threads has its own.
template <bool kLast>
constexpr int kCosinePixels = kCosineThreads / (kLast ? 16 : 4);

template <bool kLast, class T>
__device__ __forceinline__ void cosine_tile(const CosineArgs<T>& a) {
  constexpr int kPixels = kCosinePixels<kLast>, kLanes = kCosineThreads / kPixels;
  __shared__ float sums[3][kCosineThreads];
  const int thread = threadIdx.x;
  const int lane = kLast ? thread % kLanes : thread / kPixels;
  const int pixel = kLast ? thread / kLanes : thread % kPixels;
  float dot = 0, square = 0, square_hat = 0;
  const int64_t first = int64_t{blockIdx.x} * kPixels, i = first + pixel;
  if (i < a.count) {
    const int64_t n = quotient(i, a.pixels), p = i - n * a.pixels;
    const int64_t y = quotient(p, a.width), x = p - y * a.width;
    const T* f = a.f + n * a.stride.n + y * a.stride.y + x * a.stride.x;
    const T* f_hat = a.f_hat + n * a.stride_hat.n + y * a.stride_hat.y + x * a.stride_hat.x;
    DIFFAD_UNROLL4
    for (int64_t c = lane; c < a.channels; c += kLanes) {
      const float u = static_cast<float>(f[c * a.stride.c]);
      const float v = static_cast<float>(f_hat[c * a.stride_hat.c]);
      dot += u * v;
      square += u * u;
      square_hat += v * v;
    }
  }
  const int slot = lane * kPixels + pixel;
  sums[0][slot] = dot;
  sums[1][slot] = square;
  sums[2][slot] = square_hat;
  __syncthreads();
  const int64_t mine = first + thread;
  if (thread < kPixels && mine < a.count) {
    float sum[3] = {};
    for (int l = 0; l < kLanes; ++l) {
      DIFFAD_UNROLL
      for (int k = 0; k < 3; ++k) sum[k] += sums[k][l * kPixels + thread];
    }
    const float norm = ::fmaxf(::sqrtf(sum[1]), kCosineEps);
    const float norm_hat = ::fmaxf(::sqrtf(sum[2]), kCosineEps);
    a.result[mine] = 1.0f - sum[0] / norm / norm_hat;
  }
}

// ------------------------------------------------------------------------- sum of the maps

constexpr int kMostScales = 8;

// A mean or deviation: a number, or one a position.
struct MapStatistic {
  const float* data;  // null: the number
  float number;
  int64_t y, x;  // both 0: one for all, wherever it lies
};

struct MapScale {
  const float* cosines;  // (N, height, width)
  int height, width;
  int64_t pixels;
  double down, across;  // rows and columns a row and a column of the map
};

inline MapScale map_scale(const float* cosines, int64_t height, int64_t width, int64_t map_height,
                          int64_t map_width) {
  return {cosines, static_cast<int>(height), static_cast<int>(width), height * width,
          static_cast<double>(height) / static_cast<double>(map_height),
          static_cast<double>(width) / static_cast<double>(map_width)};
}

template <class T>
struct WeightedArgs {
  const T *x, *x_hat;
  Strides stride, stride_hat;
  int64_t channels, height, width;
  float weight[3];               // pixel, feature and sub-band map; 0 leaves one out
  MapStatistic statistic[3][2];  // mean and deviation
  MapScale scale[kMostScales];
  int scales;
  const float* base;  // (N, H, W), or null
  float* result;      // (N, H, W)
  int64_t strips, across, count;  // of an image, tiles of a strip, all tiles
};

// A thread has so many pixels below each other: whole blocks of the coarsest level, and enough of
// them for what is worked out once a column.
template <int kLevel>
constexpr int kStripRows = kLevel < 3 ? 8 : 1 << kLevel;
constexpr int kWeightedThreads = 256;

// Sets the tiles; returns the threads of a block.
template <int kLevel, class T>
inline unsigned weighted_grid(WeightedArgs<T>& a, int64_t batch) {
  a.strips = (a.height + kStripRows<kLevel> - 1) / kStripRows<kLevel>;
  a.across = (a.width + kWeightedThreads - 1) / kWeightedThreads;
  a.count = batch * a.strips * a.across;
  return static_cast<unsigned>(a.across > 1 ? kWeightedThreads : (a.width + 31) / 32 * 32);
}

// Where pixel i lies among values of which there are `ratio` a pixel, bilinear, align_corners=False:
// the value before it and the share of the one after. In double, so that no float can tell.
__device__ __forceinline__ int before_pixel(int64_t i, double ratio, float& share) {
  const double place = (static_cast<double>(i) + 0.5) * ratio - 0.5;
  const int left = place > 0 ? static_cast<int>(place) : 0;
  share = place > 0 ? static_cast<float>(place - static_cast<double>(left)) : 0.0f;
  return left;
}

// Of the first `rows` of R pixels below each other, from (y, x) on.
template <int R>
__device__ __forceinline__ void read(const MapStatistic& statistic, int64_t y, int64_t x, int rows,
                                     float (&value)[R]) {
  const float* data = statistic.data + y * statistic.y + x * statistic.x;
  DIFFAD_UNROLL
  for (int k = 0; k < R; ++k) {
    value[k] = statistic.data && k < rows ? data[k * statistic.y] : statistic.number;
  }
}

// total += weight (value - mean) / deviation, of R pixels below each other. Numbers, the usual case,
// take one division for all of them: a division is a dozen instructions, and these bound the kernel.
template <int R>
__device__ __forceinline__ void add_standardised(const float (&value)[R], float weight,
                                                 const MapStatistic (&statistic)[2], int64_t y,
                                                 int64_t x, int rows, float (&total)[R]) {
  const MapStatistic &mean = statistic[0], &deviation = statistic[1];
  if (mean.y == 0 && mean.x == 0 && deviation.y == 0 && deviation.x == 0) {
    const float subtracted = mean.data ? *mean.data : mean.number;
    const float factor = weight / (deviation.data ? *deviation.data : deviation.number);
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) total[k] += (value[k] - subtracted) * factor;
    return;
  }
  float means[R], deviations[R];
  read(mean, y, x, rows, means);
  read(deviation, y, x, rows, deviations);
  DIFFAD_UNROLL
  for (int k = 0; k < R; ++k) total[k] += weight * ((value[k] - means[k]) / deviations[k]);
}

template <int kLevel, class T>
__device__ __forceinline__ void weighted_tile(const WeightedArgs<T>& a) {
  constexpr int R = kStripRows<kLevel>;
  // Of the strip's rows in each scale: the row before, and the share of the one after.
  __shared__ int above[kMostScales][R];
  __shared__ float share_below[kMostScales][R];

  const int64_t i = blockIdx.x;
  const int64_t line = quotient(i, a.across), n = quotient(line, a.strips);
  const int64_t top = (line - n * a.strips) * R;
  const int64_t column = (i - line * a.across) * kWeightedThreads + threadIdx.x;
  // Of this thread. Blocks of the last levels fill their strips.
  const int rows = column >= a.width ? 0 : a.height - top < R ? static_cast<int>(a.height - top) : R;
  const auto there = [&](int k) { return 1 << kLevel == R ? rows > 0 : k < rows; };
  for (int k = threadIdx.x; k < a.scales * R; k += blockDim.x) {
    const int s = k / R, row = k % R;
    const int64_t y = top + row < a.height ? top + row : a.height - 1;
    above[s][row] = before_pixel(y, a.scale[s].down, share_below[s][row]);
  }

  float magnitude[R] = {};
  SubBands<R, kLevel> sub_bands;
  const T* x = a.x + n * a.stride.n + top * a.stride.y + column * a.stride.x;
  const T* x_hat =
      a.x_hat + n * a.stride_hat.n + top * a.stride_hat.y + column * a.stride_hat.x;
  for (int64_t c = 0; c < a.channels; ++c, x += a.stride.c, x_hat += a.stride_hat.c) {
    float residual[R];
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) {
      residual[k] = there(k) ? static_cast<float>(x[k * a.stride.y]) -
                                   static_cast<float>(x_hat[k * a.stride_hat.y])
                             : 0.0f;
    }
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) magnitude[k] += ::fabsf(residual[k]);
    sub_bands.add(residual);
  }
  __syncthreads();  // the scales' rows are there
  if (rows > 0) {
    const float share = 1.0f / static_cast<float>(a.channels);
    const int64_t place = (n * a.height + top) * a.width + column;
    float total[R], map[R];
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) {
      total[k] = a.base && there(k) ? a.base[place + k * a.width] : 0.0f;
    }
    if (a.weight[0] != 0) {
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) map[k] = magnitude[k] * share;
      add_standardised(map, a.weight[0], a.statistic[0], top, column, rows, total);
    }
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) map[k] = 0;
    for (int s = 0; s < a.scales; ++s) {
      const MapScale& scale = a.scale[s];
      float u;
      const int left = before_pixel(column, scale.across, u);
      const float* at_left = scale.cosines + n * scale.pixels + left;
      const float* at_right = left + 1 < scale.width ? at_left + 1 : at_left;
      const auto across = [&](int row) {
        const int at = row * scale.width;
        return at_left[at] + u * (at_right[at] - at_left[at]);
      };
      // Many rows of pixels lie between the same two of the scale.
      float upper = 0, slope = 0;
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        const int y = above[s][k];
        if (k == 0 || y != above[s][k - 1]) {  // the same for all threads
          upper = across(y);
          slope = across(y + 1 < scale.height ? y + 1 : y) - upper;
        }
        map[k] += upper + share_below[s][k] * slope;
      }
    }
    if (a.scales > 0) {
      add_standardised(map, a.weight[1], a.statistic[1], top, column, rows, total);
    }
    if (kLevel > 0) {
      sub_bands.sum(map);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) map[k] *= share;
      add_standardised(map, a.weight[2], a.statistic[2], top, column, rows, total);
    }
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) {
      if (there(k)) a.result[place + k * a.width] = total[k];
    }
  }
}

// ------------------------------------------------------------------------- order of the values

// The `top` largest values of an image are those above some value T of it, and as many T as are
// missing. T is found digit by digit, of 10, 11 and 11 bits of an order-preserving integer: all
// blocks of an image count the values of each digit among those whose digits before are T's, and
// whoever comes next takes T's digit from the counts. Counting is exact in any order.
constexpr int kDigits = 3, kMostDigit = 2048;
DIFFAD_INLINE constexpr int digit_bits(int digit) { return digit == 0 ? 10 : 11; }
DIFFAD_INLINE constexpr int digit_shift(int digit) { return digit == 0 ? 22 : digit == 1 ? 11 : 0; }

// T's digits so far as one number, and how many of the values that share them are among the largest.
struct TopChoice {
  uint32_t prefix, missing;
};

struct TopState {
  uint32_t counts[kDigits][kMostDigit];  // zeros at first
  TopChoice choice[kDigits - 1];
};

// Ordered as the numbers are, a NaN above all, as PyTorch's topk has it.
__device__ __forceinline__ uint32_t ordered(float value) {
  if (value != value) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// Its inverse; 0xffffffff gives a NaN.
__device__ __forceinline__ float unordered(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Adds a thread block's counts of a digit, which all threads have made.
__device__ __forceinline__ void add_counts(const uint32_t* counts, int digit, TopState& state) {
  for (int k = threadIdx.x; k < 1 << digit_bits(digit); k += blockDim.x) {
    if (counts[k]) atomicAdd(&state.counts[digit][k], counts[k]);
  }
}

// ------------------------------------------------------------------------- Gaussian

// A thread block takes a square of outputs with as many pixels around it as the radius asks for into
// shared memory, smooths its rows in place and then its columns. A thread has a run of neighbouring
// outputs, and each value that it reads goes into all of them; the taps lie where the kernel's
// arguments do, in the constant memory that a product reads for nothing. So arithmetic alone sets the
// pace. That asks for a kernel a halo: the radius rounded up, with weights 0 beyond it (an infinity
// there gives a NaN, as it would not in the reference).
constexpr int kBlurSide = 64, kBlurRun = 8, kBlurThreads = 256, kBlurHaloStep = 4;
constexpr int kBlurBand = kBlurThreads / (kBlurSide / kBlurRun);  // rows that take their turn
// The first as the 99 KiB of the smallest GPUs allow, the second as the 163 KiB of data centres'.
constexpr int kBlurSmallRadius = 44, kBlurMostRadius = 64;
static_assert(kBlurMostRadius % kBlurHaloStep == 0 && kBlurThreads % kBlurSide == 0);

struct BlurArgs {
  const float* x;
  float* result;  // both (N, H, W)
  int64_t height, width, down, across, count;
  float taps[kBlurMostRadius + 1];  // from the middle outwards, 0 beyond the radius
  TopState* state;                  // (N), or null: the counts are dropped
};

inline void blur_grid(BlurArgs& a, int64_t batch) {
  a.down = (a.height + kBlurSide - 1) / kBlurSide;
  a.across = (a.width + kBlurSide - 1) / kBlurSide;
  a.count = batch * a.down * a.across;
}

DIFFAD_INLINE constexpr int blur_extent(int halo) { return kBlurSide + 2 * halo; }
// An odd multiple of 16 bytes: eight rows that are read at once, 16 bytes each, hit different banks.
DIFFAD_INLINE constexpr int blur_pitch(int halo) { return blur_extent(halo) + 4; }
DIFFAD_INLINE constexpr int blur_shared_bytes(int halo) {
  return 4 * (blur_extent(halo) * (blur_pitch(halo) + 2) + (1 << digit_bits(0)));
}
static_assert(blur_extent(kBlurHaloStep) % 8 == 0 &&
              blur_shared_bytes(kBlurSmallRadius) <= 99 * 1024 &&
              blur_shared_bytes(kBlurMostRadius) <= 163 * 1024);

// Place of sample i of a signal that is mirrored at its ends, d c b a | a b c d | d c b a.
__device__ __forceinline__ int64_t reflected(int64_t i, int64_t size) {
  if (i < 0 || i >= size) {
    i %= 2 * size;
    if (i < 0) i += 2 * size;
    if (i >= size) i = 2 * size - 1 - i;
  }
  return i;
}

struct alignas(16) FourValues {
  float v[4];
};

// kBlurRun neighbouring outputs along a line, of which four(q) reads the values from q on.
template <int kHalo, class F>
__device__ __forceinline__ void blurred_run(const float (&taps)[kBlurMostRadius + 1], F&& four,
                                            float (&sum)[kBlurRun]) {
  DIFFAD_UNROLL
  for (int p = 0; p < kBlurRun; ++p) sum[p] = 0;
  DIFFAD_UNROLL
  for (int q = 0; q < kBlurRun + 2 * kHalo; q += 4) {
    const FourValues values = four(q);
    DIFFAD_UNROLL
    for (int j = 0; j < 4; ++j) {
      DIFFAD_UNROLL
      for (int p = 0; p < kBlurRun; ++p) {
        const int distance = q + j - p > kHalo ? q + j - p - kHalo : kHalo - (q + j - p);
        if (distance <= kHalo) sum[p] += taps[distance] * values.v[j];
      }
    }
  }
}

// `shared`: blur_shared_bytes(kHalo), at a multiple of 16.
template <int kHalo>
__device__ __forceinline__ void blur_tile(const BlurArgs& a, float* shared) {
  constexpr int extent = blur_extent(kHalo), pitch = blur_pitch(kHalo);
  const int thread = threadIdx.x;
  float* values = shared;
  int* places = reinterpret_cast<int*>(values + extent * pitch);  // rows, then columns
  auto* counts = reinterpret_cast<uint32_t*>(places + 2 * extent);
  const int64_t i = blockIdx.x;
  const int64_t line = quotient(i, a.across), n = quotient(line, a.down);
  const int64_t top = (line - n * a.down) * kBlurSide, left = (i - line * a.across) * kBlurSide;
  for (int k = thread; k < 2 * extent; k += kBlurThreads) {
    const bool row = k < extent;
    const int64_t at = (row ? top + k : left + k - extent) - kHalo;
    places[k] = static_cast<int>(reflected(at, row ? a.height : a.width));
  }
  if (a.state) {
    for (int k = thread; k < 1 << digit_bits(0); k += kBlurThreads) counts[k] = 0;
  }
  __syncthreads();
  constexpr int kColumns = (extent + 31) / 32;  // of a lane
  int column[kColumns];
  DIFFAD_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    column[k] = places[extent + (thread % 32 + 32 * k < extent ? thread % 32 + 32 * k : 0)];
  }
  const float* x = a.x + n * a.height * a.width;
  const int width = static_cast<int>(a.width);
  constexpr int kWarps = kBlurThreads / 32;
  static_assert(extent % kWarps == 0);
  DIFFAD_UNROLL4
  for (int j = 0; j < extent / kWarps; ++j) {
    const int y = thread / 32 + j * kWarps;
    const float* from = x + static_cast<int64_t>(places[y]) * width;
    DIFFAD_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      if (thread % 32 + 32 * k < extent) values[y * pitch + thread % 32 + 32 * k] = from[column[k]];
    }
  }
  float sum[kBlurRun];
  for (int band = 0; band < extent; band += kBlurBand) {
    // A warp has one run of 32 rows.
    const int y = band + thread % kBlurBand, first = thread / kBlurBand * kBlurRun;
    auto* run = reinterpret_cast<FourValues*>(values + y * pitch + first);
    __syncthreads();  // the values are there
    if (y < extent) blurred_run<kHalo>(a.taps, [&](int q) { return run[q / 4]; }, sum);
    __syncthreads();  // all have read the rows of this band
    if (y < extent) {
      run[0] = {sum[0], sum[1], sum[2], sum[3]};
      run[1] = {sum[4], sum[5], sum[6], sum[7]};
    }
  }
  __syncthreads();
  for (int k = thread; k < kBlurSide * kBlurSide / kBlurRun; k += kBlurThreads) {
    const int x = k % kBlurSide, first = k / kBlurSide * kBlurRun;
    if (left + x >= a.width || top + first >= a.height) continue;
    const float* run = values + first * pitch + x;
    blurred_run<kHalo>(a.taps, [&](int q) {
      const float* at = run + q * pitch;
      return FourValues{at[0], at[pitch], at[2 * pitch], at[3 * pitch]};
    }, sum);
    float* to = a.result + (n * a.height + top + first) * a.width + left + x;
    const int64_t below = a.height - top - first;
    const int rows = below < kBlurRun ? static_cast<int>(below) : kBlurRun;
    DIFFAD_UNROLL
    for (int p = 0; p < kBlurRun; ++p, to += a.width) {
      const uint32_t digit = ordered(sum[p]) >> digit_shift(0);
      if (p < rows) {
        *to = sum[p];
        atomicAdd(&counts[digit], 1u);
      }
    }
  }
  if (a.state) {
    __syncthreads();  // all are counted
    add_counts(counts, 0, a.state[n]);
  }
}

// ------------------------------------------------------------------------- score

constexpr int kTopThreads = 512;
constexpr int64_t kTopShare = 32 * kTopThreads;  // pixels of a block

struct TopArgs {
  const float* map;  // (N, pixels)
  int64_t pixels, top, blocks;  // blocks of an image; state and partial are for more than one
  TopState* state;              // (N)
  float* partial;               // (N, blocks)
  float* score;                 // (N)
};

// For a whole thread block: the choice by the counts of a digit, given that of the digits before.
template <int kDigit>
__device__ __forceinline__ TopChoice choose(const uint32_t* counts, TopChoice before) {
  __shared__ uint32_t above[kTopThreads];
  __shared__ TopChoice choice;
  constexpr int each = (1 << digit_bits(kDigit)) / kTopThreads;
  const int thread = threadIdx.x;
  counts += thread * each;
  uint32_t own = 0;
  for (int k = 0; k < each; ++k) own += counts[k];
  above[thread] = own;  // values from a thread's digits on
  for (int step = 1; step < kTopThreads; step *= 2) {
    __syncthreads();
    const uint32_t more = thread + step < kTopThreads ? above[thread + step] : 0;
    __syncthreads();
    above[thread] += more;
  }
  uint32_t higher = above[thread] - own;
  if (higher < before.missing && before.missing <= above[thread]) {  // one thread of all
    int k = each - 1;
    for (; higher + counts[k] < before.missing; --k) higher += counts[k];
    choice = {before.prefix << digit_bits(kDigit) | static_cast<uint32_t>(thread * each + k),
              before.missing - higher};
  }
  __syncthreads();
  return choice;
}

// For a whole thread block; what its first thread gets is the sum.
__device__ __forceinline__ float sum_of_block(float value) {
  __shared__ float sums[kTopThreads];
  const int thread = threadIdx.x;
  sums[thread] = value;
  for (int half = kTopThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  return sums[thread];
}

// Counts a digit of the values from `first` to `end` whose digits before are T's. Returns the sum of
// those of this thread that are above T whatever that is; for the last digit it is of use.
template <int kDigit>
__device__ __forceinline__ float count_digit(const float* map, int64_t first, int64_t end,
                                             TopChoice before, uint32_t* counts) {
  constexpr int shift = digit_shift(kDigit), bits = digit_bits(kDigit);
  for (int k = threadIdx.x; k < 1 << bits; k += kTopThreads) counts[k] = 0;
  __syncthreads();
  float sum = 0;
  DIFFAD_UNROLL4
  for (int64_t p = first + threadIdx.x; p < end; p += kTopThreads) {
    const float value = map[p];
    const uint32_t key = ordered(value);
    const uint32_t prefix = key >> shift >> bits;  // 0 of the first: a shift by 32 is undefined
    if (prefix == before.prefix) atomicAdd(&counts[key >> shift & ((1u << bits) - 1)], 1u);
    if (kDigit == kDigits - 1 && prefix > before.prefix) sum += value;
  }
  __syncthreads();
  return sum;
}

// For a whole thread block: the score, given what the threads have of the sum of the values whose
// digits before the last are above T's, the counts of the last, and T.
__device__ __forceinline__ void write_score(const TopArgs& a, int64_t n, float sum,
                                            const uint32_t* counts, TopChoice chosen) {
  // Values that differ from T in the last digit alone are as many as were counted.
  constexpr uint32_t digits = 1u << digit_bits(kDigits - 1);
  const uint32_t rest = chosen.prefix & ~(digits - 1);
  for (uint32_t k = (chosen.prefix & (digits - 1)) + 1 + threadIdx.x; k < digits; k += kTopThreads) {
    if (counts[k]) sum += static_cast<float>(counts[k]) * unordered(rest | k);
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) {
    const float equal = static_cast<float>(chosen.missing) * unordered(chosen.prefix);
    a.score[n] = (sum + equal) / static_cast<float>(a.top);
  }
}

// A share of an image's values a thread block.
template <int kDigit>
__device__ __forceinline__ void top_digit(const TopArgs& a) {
  __shared__ uint32_t counts[1 << digit_bits(kDigit)];
  const int64_t n = quotient(blockIdx.x, a.blocks), block = blockIdx.x - n * a.blocks;
  TopState& state = a.state[n];
  TopChoice before = {0, static_cast<uint32_t>(a.top)};
  if constexpr (kDigit > 0) {
    if constexpr (kDigit > 1) before = state.choice[kDigit - 2];
    before = choose<kDigit - 1>(state.counts[kDigit - 1], before);
    if (block == 0 && threadIdx.x == 0) state.choice[kDigit - 1] = before;
  }
  const int64_t first = block * kTopShare, last = first + kTopShare;
  const int64_t end = last < a.pixels ? last : a.pixels;
  float sum = count_digit<kDigit>(a.map + n * a.pixels, first, end, before, counts);
  add_counts(counts, kDigit, state);
  if (kDigit == kDigits - 1) {
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
  }
}

// A thread block an image, once all digits are counted.
__device__ __forceinline__ void top_score(const TopArgs& a) {
  const int64_t n = blockIdx.x;
  const TopState& state = a.state[n];
  const TopChoice chosen = choose<2>(state.counts[2], state.choice[1]);
  float sum = 0;
  for (int64_t k = threadIdx.x; k < a.blocks; k += kTopThreads) sum += a.partial[n * a.blocks + k];
  write_score(a, n, sum, state.counts[2], chosen);
}

// A thread block an image of at most kTopShare pixels: all of it.
__device__ __forceinline__ void top_small(const TopArgs& a) {
  __shared__ uint32_t counts[kMostDigit];
  const int64_t n = blockIdx.x;
  const float* map = a.map + n * a.pixels;
  TopChoice chosen = {0, static_cast<uint32_t>(a.top)};
  count_digit<0>(map, 0, a.pixels, chosen, counts);
  chosen = choose<0>(counts, chosen);
  count_digit<1>(map, 0, a.pixels, chosen, counts);
  chosen = choose<1>(counts, chosen);
  const float sum = count_digit<2>(map, 0, a.pixels, chosen, counts);
  chosen = choose<2>(counts, chosen);
  write_score(a, n, sum, counts, chosen);
}

}  // namespace diffad
