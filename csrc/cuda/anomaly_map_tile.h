// The kernels of anomaly_map, apart from torch: a test on the CPU runs this very code, thread by
// thread (tests/native/). diffad_fast/reference/maps.py defines the map.
//
//   cosine_tiles     1 - cosine of the features at their own resolution, one scale a launch;
//   weighted_tiles   the residual's magnitude and sub-bands, the cosines between their four nearest,
//                    all standardised, weighted and added;
//   blur_tiles       the Gaussian along both axes at once;
//   top_digit, top_sum   the mean of the largest values.
//
// Inputs are read once; the sum of the maps is written and read once between the second and the
// third, and stays in a GPU's second-level cache for what people score at a time. Every sum is taken
// in an order that the sizes alone decide, so that results repeat bit for bit.
#pragma once

#include <cstdint>

#include "../common/divide.h"
#include "../common/haar.h"
#include "sub_band_tile.h"

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
__device__ __forceinline__ void cosine_tiles(const CosineArgs<T>& a) {
  constexpr int kPixels = kCosinePixels<kLast>, kLanes = kCosineThreads / kPixels;
  __shared__ float sums[3][kCosineThreads];
  const int thread = threadIdx.x;
  const int lane = kLast ? thread % kLanes : thread / kPixels;
  const int pixel = kLast ? thread / kLanes : thread % kPixels;
  const int64_t tiles = (a.count + kPixels - 1) / kPixels;

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float dot = 0, square = 0, square_hat = 0;
    const int64_t i = tile * kPixels + pixel;
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
    const int64_t mine = tile * kPixels + thread;
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
    __syncthreads();  // the next tile writes the sums
  }
}

// ------------------------------------------------------------------------- sum of the maps

constexpr int kMostScales = 8;

// A mean or deviation: a number, or one a position.
struct MapStatistic {
  const float* data;  // null: the number
  float number;
  int64_t y, x;
};

struct MapScale {
  const float* cosines;  // (N, height, width)
  int64_t height, width;
};

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
  int columns;        // of a tile, fewer at the right edge
  int64_t strips, across, count;  // of R rows in an image, tiles in a strip, all tiles
};

// Sets the tiles of strips of R rows; returns the threads of a block.
template <class T>
inline unsigned weighted_grid(WeightedArgs<T>& a, int64_t batch, int r) {
  a.columns = static_cast<int>(a.width < kTileColumns ? a.width : kTileColumns);
  a.strips = a.height / r;
  a.across = (a.width + kTileColumns - 1) / kTileColumns;
  a.count = batch * a.strips * a.across;
  return static_cast<unsigned>((a.columns + 31) / 32 * 32);
}

// Where pixel i of `size` lies among `source` values, bilinear, align_corners=False: the value before
// it and the share of the one after, (i + 1/2) source / size - 1/2 as a fraction of integers.
__device__ __forceinline__ int64_t before_pixel(int64_t i, int64_t size, int64_t source,
                                                float& share) {
  const int64_t place = (2 * i + 1) * source - size;
  if (place <= 0) {
    share = 0;
    return 0;
  }
  const int64_t left = quotient(place, 2 * size);
  share = static_cast<float>(place - left * 2 * size) / static_cast<float>(2 * size);
  return left;
}

// Of R pixels below each other, from (y, x) on.
template <int R>
__device__ __forceinline__ void read(const MapStatistic& statistic, int64_t y, int64_t x,
                                     float (&value)[R]) {
  const float* data = statistic.data + y * statistic.y + x * statistic.x;
  DIFFAD_UNROLL
  for (int k = 0; k < R; ++k) value[k] = statistic.data ? data[k * statistic.y] : statistic.number;
}

// total += weight (value - mean) / deviation, of R pixels below each other. Numbers, the usual case,
// take one division for all of them: a division is a dozen instructions, and these bound the kernel.
template <int R>
__device__ __forceinline__ void add_standardised(const float (&value)[R], float weight,
                                                 const MapStatistic (&statistic)[2], int64_t y,
                                                 int64_t x, float (&total)[R]) {
  const MapStatistic &mean = statistic[0], &deviation = statistic[1];
  if (!mean.data && !deviation.data) {
    const float factor = weight / deviation.number;
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) total[k] += (value[k] - mean.number) * factor;
    return;
  }
  float means[R], deviations[R];
  read(mean, y, x, means);
  read(deviation, y, x, deviations);
  DIFFAD_UNROLL
  for (int k = 0; k < R; ++k) total[k] += weight * ((value[k] - means[k]) / deviations[k]);
}

template <int R, int kLevel, class T>
__device__ __forceinline__ void weighted_tiles(const WeightedArgs<T>& a) {
  constexpr int kPitch = SubBandTile<R, kLevel>::kPitch;
  __shared__ SubBandTile<R, kLevel> tile;
  // Of the strip's rows in each scale: where the row above and the one below begin, and its share.
  __shared__ int64_t above[kMostScales][R], below[kMostScales][R];
  __shared__ float share_y[kMostScales][R];
  const int thread = threadIdx.x;

  for (int64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
    const int64_t line = quotient(i, a.across), n = quotient(line, a.strips);
    const int64_t top = (line - n * a.strips) * R;
    const int64_t column = (i - line * a.across) * kTileColumns + thread;
    const bool active = thread < a.columns && column < a.width;
    if (kLevel > 0) tile.clear();
    for (int k = thread; k < a.scales * R; k += blockDim.x) {
      const int s = k / R, row = k % R;
      const MapScale& scale = a.scale[s];
      const int64_t y = before_pixel(top + row, a.height, scale.height, share_y[s][row]);
      above[s][row] = y * scale.width;
      below[s][row] = (y + 1 < scale.height ? y + 1 : y) * scale.width;
    }

    float magnitude[R] = {};
    for (int64_t c = 0; c < a.channels; ++c) {
      if (kLevel > 0) __syncthreads();  // the tile is clear, the last channel is done with it
      float* own = tile.column(thread);
      if (active) {
        const T* x = a.x + n * a.stride.n + c * a.stride.c + top * a.stride.y + column * a.stride.x;
        const T* x_hat = a.x_hat + n * a.stride_hat.n + c * a.stride_hat.c +
                         top * a.stride_hat.y + column * a.stride_hat.x;
        float residual[R];
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) {
          residual[k] = static_cast<float>(x[k * a.stride.y]) -
                        static_cast<float>(x_hat[k * a.stride_hat.y]);
        }
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) {
          magnitude[k] += ::fabsf(residual[k]);
          if (kLevel > 0) own[k * kPitch] = residual[k];
        }
      } else if (kLevel > 0 && thread < a.columns) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) own[k * kPitch] = 0;
      }
      if (kLevel > 0) tile.add(a.columns);
    }
    __syncthreads();
    if (active) {
      const float share = 1.0f / static_cast<float>(a.channels);
      const int64_t place = (n * a.height + top) * a.width + column;
      float total[R], map[R];
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) total[k] = a.base ? a.base[place + k * a.width] : 0.0f;
      if (a.weight[0] != 0) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) map[k] = magnitude[k] * share;
        add_standardised(map, a.weight[0], a.statistic[0], top, column, total);
      }
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) map[k] = 0;
      for (int s = 0; s < a.scales; ++s) {
        const MapScale& scale = a.scale[s];
        float u;
        const int64_t left = before_pixel(column, a.width, scale.width, u);
        const float* cosines = scale.cosines + n * scale.height * scale.width + left;
        const int64_t right = left + 1 < scale.width ? 1 : 0;
        const auto across = [&](int64_t row) {
          return cosines[row] * (1 - u) + cosines[row + right] * u;
        };
        // Many rows of pixels lie between the same two of the scale: these are read once.
        int64_t first = -1, second = -1;
        float upper = 0, lower = 0;
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) {
          if (above[s][k] != first) {  // the same for all threads
            first = above[s][k];
            upper = first == second ? lower : across(first);
            second = below[s][k];
            lower = second == first ? upper : across(second);
          }
          const float v = share_y[s][k];
          map[k] += upper * (1 - v) + lower * v;
        }
      }
      if (a.scales > 0) {
        add_standardised(map, a.weight[1], a.statistic[1], top, column, total);
      }
      if (kLevel > 0) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) map[k] = tile.sum(k, thread) * share;
        add_standardised(map, a.weight[2], a.statistic[2], top, column, total);
      }
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) a.result[place + k * a.width] = total[k];
    }
    __syncthreads();  // the next tile clears the details and writes the shares
  }
}

// ------------------------------------------------------------------------- Gaussian

// A thread block takes a square of outputs with as many pixels around it as the radius asks for into
// shared memory, smooths its rows in place and then its columns. A thread has a run of neighbouring
// outputs: each value that it reads goes into all of them, so that arithmetic and not shared memory
// sets the pace. Runs see the radius rounded up, with weights 0 there.
constexpr int kBlurSide = 64, kBlurRun = 8, kBlurThreads = 256;
constexpr int kBlurBand = kBlurThreads / (kBlurSide / kBlurRun);  // rows that take their turn
// As the 99 KiB of the smallest GPUs allow.
constexpr int kBlurMostRadius = 44;
static_assert(kBlurMostRadius % (kBlurRun / 2) == 0 && kBlurThreads % kBlurSide == 0);

struct BlurArgs {
  const float* x;
  float* result;  // both (N, H, W)
  int64_t height, width, down, across, count;
  int halo;                         // at least the radius, a multiple of kBlurRun / 2
  float taps[kBlurMostRadius + 1];  // from the middle outwards, up to the halo
};

inline void blur_grid(BlurArgs& a, int64_t batch, int radius) {
  a.halo = (radius + kBlurRun / 2 - 1) / (kBlurRun / 2) * (kBlurRun / 2);
  a.down = (a.height + kBlurSide - 1) / kBlurSide;
  a.across = (a.width + kBlurSide - 1) / kBlurSide;
  a.count = batch * a.down * a.across;
}

DIFFAD_INLINE constexpr int blur_extent(int halo) { return kBlurSide + 2 * halo; }
// Odd: neighbouring rows start in different banks.
DIFFAD_INLINE constexpr int blur_pitch(int halo) { return blur_extent(halo) + 1; }
DIFFAD_INLINE constexpr int blur_taps(int halo) { return kBlurRun + 2 * halo; }
DIFFAD_INLINE constexpr int blur_shared_bytes(int halo) {
  return 4 * (blur_taps(halo) + blur_extent(halo) * (blur_pitch(halo) + 2));
}
static_assert(blur_shared_bytes(kBlurMostRadius) <= 99 * 1024);

// Place of sample i of a signal that is mirrored at its ends, d c b a | a b c d | d c b a.
__device__ __forceinline__ int64_t reflected(int64_t i, int64_t size) {
  if (i < 0 || i >= size) {
    i %= 2 * size;
    if (i < 0) i += 2 * size;
    if (i >= size) i = 2 * size - 1 - i;
  }
  return i;
}

struct alignas(16) FourTaps {
  float v[4];
};

// kBlurRun neighbouring outputs along a line: sum over q of taps[q - p] line[q stride].
__device__ __forceinline__ void blurred_run(const float* taps, const float* line, int stride,
                                            int halo, float (&sum)[kBlurRun]) {
  float window[2 * kBlurRun - 1] = {};  // taps q + j - p, of the values q + j and the outputs p
  DIFFAD_UNROLL
  for (int p = 0; p < kBlurRun; ++p) sum[p] = 0;
  for (int q = 0; q < blur_taps(halo); q += kBlurRun) {
    DIFFAD_UNROLL
    for (int k = 0; k < kBlurRun - 1; ++k) window[k] = window[k + kBlurRun];
    DIFFAD_UNROLL
    for (int k = 0; k < kBlurRun; k += 4) {
      const auto four = *reinterpret_cast<const FourTaps*>(taps + q + k);
      DIFFAD_UNROLL
      for (int e = 0; e < 4; ++e) window[kBlurRun - 1 + k + e] = four.v[e];
    }
    DIFFAD_UNROLL
    for (int j = 0; j < kBlurRun; ++j) {
      const float value = line[(q + j) * stride];
      DIFFAD_UNROLL
      for (int p = 0; p < kBlurRun; ++p) sum[p] += window[kBlurRun - 1 + j - p] * value;
    }
  }
}

// `shared`: blur_shared_bytes(halo), at a multiple of 16.
__device__ __forceinline__ void blur_tiles(const BlurArgs& a, float* shared) {
  const int extent = blur_extent(a.halo), pitch = blur_pitch(a.halo), thread = threadIdx.x;
  float *taps = shared, *values = taps + blur_taps(a.halo);
  int* places = reinterpret_cast<int*>(values + extent * pitch);  // rows, then columns
  for (int k = thread; k < blur_taps(a.halo); k += kBlurThreads) {
    const int distance = k < a.halo ? a.halo - k : k - a.halo;
    taps[k] = distance <= a.halo ? a.taps[distance] : 0.0f;
  }
  for (int64_t i = blockIdx.x; i < a.count; i += gridDim.x) {
    const int64_t line = quotient(i, a.across), n = quotient(line, a.down);
    const int64_t top = (line - n * a.down) * kBlurSide, left = (i - line * a.across) * kBlurSide;
    __syncthreads();  // the last tile is done with the shared memory
    for (int k = thread; k < 2 * extent; k += kBlurThreads) {
      const bool row = k < extent;
      const int64_t at = (row ? top + k : left + k - extent) - a.halo;
      places[k] = static_cast<int>(reflected(at, row ? a.height : a.width));
    }
    __syncthreads();
    const float* x = a.x + n * a.height * a.width;
    for (int y = thread / 32; y < extent; y += kBlurThreads / 32) {
      const float* from = x + places[y] * a.width;
      DIFFAD_UNROLL4
      for (int k = thread % 32; k < extent; k += 32) {
        values[y * pitch + k] = from[places[extent + k]];
      }
    }
    float sum[kBlurRun];
    for (int band = 0; band < extent; band += kBlurBand) {
      // A warp has one run of 32 rows.
      const int y = band + thread % kBlurBand, first = thread / kBlurBand * kBlurRun;
      __syncthreads();  // the values are there
      if (y < extent) blurred_run(taps, values + y * pitch + first, 1, a.halo, sum);
      __syncthreads();  // all have read the rows of this band
      if (y < extent) {
        DIFFAD_UNROLL
        for (int p = 0; p < kBlurRun; ++p) values[y * pitch + first + p] = sum[p];
      }
    }
    __syncthreads();
    float* result = a.result + n * a.height * a.width;
    for (int k = thread; k < kBlurSide * kBlurSide / kBlurRun; k += kBlurThreads) {
      const int column = k % kBlurSide, first = k / kBlurSide * kBlurRun;
      if (left + column >= a.width || top + first >= a.height) continue;
      blurred_run(taps, values + first * pitch + column, pitch, a.halo, sum);
      DIFFAD_UNROLL
      for (int p = 0; p < kBlurRun; ++p) {
        const int64_t y = top + first + p;
        if (y < a.height) result[y * a.width + left + column] = sum[p];
      }
    }
  }
}

// ------------------------------------------------------------------------- score

// The `top` largest values of an image are those above some value T of it, and as many T as are
// missing. T is found digit by digit, 8 bits of an order-preserving integer at a time: all blocks
// of an image count their digits, and the last one to be done chooses. Counting is exact in any
// order; the sum above T goes block by block.
constexpr int kTopThreads = 512, kTopDigits = 256, kTopLanes = 32;
constexpr int64_t kTopShare = 64 * kTopThreads;  // pixels of a block

struct TopState {
  uint32_t counts[kTopDigits];
  uint32_t prefix, done;  // digits of T so far; blocks that are done
  int64_t missing;        // of the values whose digits so far are T's, how many belong to the largest
};

struct TopArgs {
  const float* map;  // (N, pixels)
  int64_t pixels, top, blocks;  // blocks of an image
  TopState* state;              // (N), zeros at first
  float* partial;               // (N, blocks)
  float* score;                 // (N)
};

// Ordered as the numbers are, a NaN above all, as PyTorch's topk has it.
__device__ __forceinline__ uint32_t ordered(float value) {
  if (value != value) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Its inverse; 0xffffffff gives a NaN.
__device__ __forceinline__ float unordered(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// Is this the last of the image's blocks? What the others wrote before is there then.
__device__ __forceinline__ bool last_to_finish(TopState& state, int64_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&state.done, 1u) == static_cast<uint32_t>(blocks - 1);
    if (last) state.done = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Digit 0, 1, 2 or 3 of T, from the highest.
__device__ __forceinline__ void top_digit(const TopArgs& a, int digit) {
  // Columns of counters, a bank and a lane each: equal digits of a warp's values do not collide.
  __shared__ uint32_t counts[kTopDigits * kTopLanes];
  const int thread = threadIdx.x, shift = 24 - 8 * digit;
  const int64_t n = quotient(blockIdx.x, a.blocks), block = blockIdx.x - n * a.blocks;
  TopState& state = a.state[n];
  for (int k = thread; k < kTopDigits * kTopLanes; k += kTopThreads) counts[k] = 0;
  const uint32_t prefix = state.prefix;
  __syncthreads();
  const float* map = a.map + n * a.pixels;
  const int64_t first = block * kTopShare, last = first + kTopShare;
  const int64_t end = last < a.pixels ? last : a.pixels;
  DIFFAD_UNROLL4
  for (int64_t p = first + thread; p < end; p += kTopThreads) {
    const uint32_t key = ordered(map[p]);
    // A shift by 32 is undefined: the first digit has nothing before it.
    if (digit == 0 || key >> shift >> 8 == prefix) {
      atomicAdd(&counts[(key >> shift & 255) * kTopLanes + thread % kTopLanes], 1u);
    }
  }
  __syncthreads();
  if (thread < kTopDigits) {
    uint32_t sum = 0;
    for (int k = 0; k < kTopLanes; ++k) sum += counts[thread * kTopLanes + (k + thread) % kTopLanes];
    if (sum) atomicAdd(&state.counts[thread], sum);
  }
  if (!last_to_finish(state, a.blocks)) return;

  // above[d]: values of digits from d on.
  uint32_t* above = counts;
  const uint32_t own = thread < kTopDigits ? atomicExch(&state.counts[thread], 0u) : 0;
  if (thread < kTopDigits) above[thread] = own;
  for (int step = 1; step < kTopDigits; step *= 2) {
    __syncthreads();
    const uint32_t more = thread + step < kTopDigits ? above[thread + step] : 0;
    __syncthreads();
    if (thread < kTopDigits) above[thread] += more;
  }
  const int64_t missing = digit == 0 ? a.top : state.missing;
  __syncthreads();  // all have read it
  if (thread < kTopDigits) {
    const int64_t higher = above[thread] - own;
    if (higher < missing && missing <= above[thread]) {
      state.prefix = prefix << 8 | static_cast<uint32_t>(thread);
      state.missing = missing - higher;
    }
  }
}

// The score, once T is known.
__device__ __forceinline__ void top_sum(const TopArgs& a) {
  __shared__ float sums[kTopThreads];
  const int thread = threadIdx.x;
  const int64_t n = quotient(blockIdx.x, a.blocks), block = blockIdx.x - n * a.blocks;
  TopState& state = a.state[n];
  const uint32_t threshold = state.prefix;
  const float* map = a.map + n * a.pixels;
  const int64_t first = block * kTopShare, last = first + kTopShare;
  const int64_t end = last < a.pixels ? last : a.pixels;
  float sum = 0;
  DIFFAD_UNROLL4
  for (int64_t p = first + thread; p < end; p += kTopThreads) {
    const float value = map[p];
    if (ordered(value) > threshold) sum += value;
  }
  const auto total = [&](float value) {
    sums[thread] = value;
    for (int half = kTopThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) sums[thread] += sums[thread + half];
    }
    __syncthreads();
    return sums[0];
  };
  sum = total(sum);
  if (thread == 0) a.partial[blockIdx.x] = sum;
  if (!last_to_finish(state, a.blocks)) return;

  const volatile float* partial = a.partial + n * a.blocks;  // other blocks wrote it
  sum = 0;
  for (int64_t k = thread; k < a.blocks; k += kTopThreads) sum += partial[k];
  sum = total(sum);
  if (thread == 0) {
    const float equal = static_cast<float>(state.missing) * unordered(threshold);
    a.score[n] = (sum + equal) / static_cast<float>(a.top);
  }
}

}  // namespace diffad
