// q_sample and ddim_step on CUDA, and the step of a captured loop. See common/diffusion.h for the
// maths.
//
// One pass: a thread reads eight neighbouring elements of x_t and of the network's output with
// 16-byte accesses, computes in float (double for double), and writes x_s and, in a loop, the
// network's next input. Absent operands count as 0, so that one kernel serves every option: the few
// products more are nothing beside the memory traffic. Noise of eta > 0 is drawn in the kernel; of
// four neighbours in the order of (C, H, W) one Philox block gives the numbers: a contiguous
// tensor needs a quarter of a block an element and a channels_last one a whole block.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/diffusion_tensor.h"
#include "../common/divide.h"
#include "../common/haar.h"
#include "../common/philox.h"
#include "launch.h"
#include "step_table.h"

namespace diffad {
namespace {

using torch::headeronly::ScalarType;

constexpr int kThreads = 256;
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
__global__ void __launch_bounds__(kThreads) step_kernel(const StepArgs<C, X, M> args) {
  const int64_t groups = args.size / N;
  int32_t step = 0;
  if (args.counter) {
    step = args.counter->step;
    advance(args.counter, args.steps);
  }
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < args.samples * groups;
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
    DIFFAD_UNROLL
    for (int j = 0; j < N; ++j) {
      next[j] = one::ddim_update<true, true, true>(c, x[j], m[j], y[j], z[j]);
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
__global__ void __launch_bounds__(1024)
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
      __syncthreads();
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
    __syncthreads();
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
__global__ void __launch_bounds__(kThreads)
coefficients_kernel(Alpha a, Alpha b, DdimOptions options, double limit, int64_t samples,
                    DdimCoefficients<C>* out) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < samples;
       i += int64_t{gridDim.x} * kThreads) {
    DdimCoefficients<double> c = ddim_coefficients(a[i], b[i], options);
    c.limit = limit;
    out[i] = c.as<C>();
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
noising_kernel(const int64_t* t, const double* table, int64_t length, int64_t samples,
               DdimCoefficients<C>* out) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < samples;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t k = t[i] < 0 ? t[i] + length : t[i];
    // The host cannot look without waiting: beyond the table the sample becomes NaN.
    const double a = 0 <= k && k < length ? table[k] : ::nan("");
    DdimCoefficients<C> c{};
    c.s_x = static_cast<C>(::sqrt(a));
    c.s_m = static_cast<C>(::sqrt(1 - a));
    out[i] = c;
  }
}

// ---------------------------------------------------------------------- launches

unsigned blocks_for(int64_t work) {
  // Some waves of a large GPU; the kernels loop over the rest.
  return static_cast<unsigned>(std::clamp<int64_t>((work + kThreads - 1) / kThreads, 1, 132 * 32));
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class C, class X, class M>
void launch(StepArgs<C, X, M> args, double ratio, double largest, C* limits, cudaStream_t stream) {
  if (limits) {
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(args.samples, 65535));
    threshold_kernel<<<blocks, 1024, 0, stream>>>(args, ratio, static_cast<C>(largest), limits);
    check_launch("ddim_step: threshold");
    args.limits = limits;
  }
  if (!args.coefficients && !limits && !args.m_shared && !args.y_shared && !args.z_shared &&
      args.one.s_z == 0) {
    args.size *= args.samples;  // nothing tells the samples apart
    args.samples = 1;
  }
  const bool packed = args.size % kPack == 0 && aligned(args.x) && aligned(args.m) &&
                      aligned(args.y) && aligned(args.z) && aligned(args.out) &&
                      aligned(args.input);
  const int64_t work = args.samples * args.size / (packed ? kPack : 1);
  if (packed) {
    step_kernel<kPack><<<blocks_for(work), kThreads, 0, stream>>>(args);
  } else {
    step_kernel<1><<<blocks_for(work), kThreads, 0, stream>>>(args);
  }
  check_launch("ddim_step");
}

// Calls f(C{}, X{}, M{}) for the dtypes of x and of the network's output that have a kernel: equal
// ones, or a narrow output beside float.
template <class F>
void for_step_dtypes(const Tensor& x, const Tensor& m, F&& f) {
  using torch::headeronly::BFloat16;
  using torch::headeronly::Half;
  if (x.scalar_type() == ScalarType::Float && m.scalar_type() == ScalarType::BFloat16) {
    return f(float{}, float{}, BFloat16{});
  }
  if (x.scalar_type() == ScalarType::Float && m.scalar_type() == ScalarType::Half) {
    return f(float{}, float{}, Half{});
  }
  STD_TORCH_CHECK(x.scalar_type() == m.scalar_type(), "ddim_step: no kernel for ", x.scalar_type(),
                  " beside ", m.scalar_type());
  for_floating_dtype(x, "ddim_step", [&](auto zero) {
    f(acc_t<decltype(zero)>{}, zero, zero);
  });
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

// `given` in the layout of x and in `dtype`, one sample where it is the same for all.
struct Operand {
  Operand(const Tensor& given, const Tensor& x, ScalarType dtype)
      : shared(x.size(0) > 1 && (given.size(0) == 1 || given.stride(0) == 0)),
        tensor(in_layout_of(
            x, given.scalar_type() == dtype ? given : torch::stable::to(given, dtype), shared)) {}
  bool shared;
  Tensor tensor;
};

ScalarType output_dtype(const Tensor& x, const Tensor& m) {
  const bool narrow =
      m.scalar_type() == ScalarType::BFloat16 || m.scalar_type() == ScalarType::Half;
  return x.scalar_type() == ScalarType::Float && narrow ? m.scalar_type() : x.scalar_type();
}

Tensor doubles(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, ScalarType::Double));
}

// One value on the host, of a tensor () of the CPU, which torch lets meet tensors of any device.
bool on_host(const std::optional<Tensor>& x) { return x && x->is_cpu(); }

// Room for `count` values of T on x's device.
template <class T>
Tensor room(const Tensor& x, int64_t count) {
  const int64_t size = count * static_cast<int64_t>(sizeof(T));
  return torch::stable::new_empty(x, {&size, 1}, ScalarType::Byte);
}

Tensor ddim_step(const Tensor& x_t, const Tensor& model_output, std::optional<Tensor> alpha_t,
                 std::optional<Tensor> alpha_s, std::optional<Tensor> noise,
                 std::optional<Tensor> guide, double number_t, double number_s, int64_t prediction,
                 double eta, double guidance, double clip, double ratio, double largest,
                 bool recompute_epsilon) {
  const torch::stable::accelerator::DeviceGuard guard(x_t.get_device_index());
  check_step(x_t, model_output, noise, guide, prediction, eta);
  if (x_t.numel() == 0) return torch::stable::empty_like(x_t);
  const cudaStream_t stream = current_stream(x_t);
  const Tensor x = dense_samples(x_t);
  const Tensor out = torch::stable::empty_like(x);
  const Operand m(model_output, x, output_dtype(x, model_output));
  std::optional<Operand> y, z;
  if (guide) y.emplace(*guide, x, x.scalar_type());
  if (eta > 0) z.emplace(*noise, x, x.scalar_type());

  const int64_t samples = x.size(0);
  const bool threshold = ratio >= 0;
  const DdimOptions options{static_cast<Prediction>(prediction), guide.has_value(),
                            threshold || clip < INFINITY, recompute_epsilon, guidance, eta};
  Tensor keep[2];
  const auto alpha = [&](const std::optional<Tensor>& given, double number, Tensor& kept) -> Alpha {
    if (!given) return {nullptr, number, 0};
    STD_TORCH_CHECK(given->dim() == 0 || (given->dim() == 1 && given->size(0) == samples),
                    "ddim_step: an alpha tensor must have one entry, or one a sample");
    kept = doubles(*given);
    if (on_host(given)) {
      STD_TORCH_CHECK(given->dim() == 0, "ddim_step: an alpha tensor is on another device");
      return {nullptr, *data<double>(kept), 0};
    }
    return {data<double>(kept), 0, given->dim()};
  };
  const Alpha a = alpha(alpha_t, number_t, keep[0]), b = alpha(alpha_s, number_s, keep[1]);

  for_step_dtypes(x, m.tensor, [&](auto compute, auto x_type, auto m_type) {
    using C = decltype(compute);
    using X = decltype(x_type);
    using M = decltype(m_type);
    StepArgs<C, X, M> args{};
    args.samples = samples;
    args.size = x.numel() / samples;
    args.x = data<X>(x);
    args.m = data<M>(m.tensor), args.m_shared = m.shared;
    if (y) args.y = data<X>(y->tensor), args.y_shared = y->shared;
    if (z) args.z = data<X>(z->tensor), args.z_shared = z->shared;
    args.out = static_cast<X*>(out.mutable_data_ptr());
    Tensor many, limits;
    if (a.data || b.data) {
      many = room<DdimCoefficients<C>>(x, samples);
      auto* target = static_cast<DdimCoefficients<C>*>(many.mutable_data_ptr());
      coefficients_kernel<C><<<blocks_for(samples), kThreads, 0, stream>>>(a, b, options, clip,
                                                                           samples, target);
      check_launch("ddim_step: coefficients");
      args.coefficients = target;
    } else {
      DdimCoefficients<double> c = ddim_coefficients(a.number, b.number, options);
      c.limit = clip;
      args.one = c.as<C>();
    }
    if (threshold) limits = room<C>(x, samples);
    launch(args, ratio, largest, threshold ? static_cast<C*>(limits.mutable_data_ptr()) : nullptr,
           stream);
  });
  return out;
}

Tensor q_sample(const Tensor& x0, const Tensor& t, const Tensor& noise, const Tensor& table) {
  const torch::stable::accelerator::DeviceGuard guard(x0.get_device_index());
  check_operand(noise, x0, true, "q_sample: noise");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == x0.size(0) &&
                      t.device() == x0.device(),
                  "q_sample: t must be int64, one a sample, on the device of x0");
  STD_TORCH_CHECK(table.dim() == 1 && table.device() == x0.device(),
                  "q_sample: the table must have one axis, on the device of x0");
  if (x0.numel() == 0) return torch::stable::empty_like(x0);
  const cudaStream_t stream = current_stream(x0);
  const Tensor x = dense_samples(x0);
  const Tensor out = torch::stable::empty_like(x);
  const Operand m(noise, x, output_dtype(x, noise));
  const Tensor times = torch::stable::contiguous(t), alphas = doubles(table);
  const int64_t samples = x.size(0);
  for_step_dtypes(x, m.tensor, [&](auto compute, auto x_type, auto m_type) {
    using C = decltype(compute);
    StepArgs<C, decltype(x_type), decltype(m_type)> args{};
    args.samples = samples;
    args.size = x.numel() / samples;
    args.x = data<decltype(x_type)>(x);
    args.m = data<decltype(m_type)>(m.tensor), args.m_shared = m.shared;
    args.out = static_cast<decltype(x_type)*>(out.mutable_data_ptr());
    const Tensor many = room<DdimCoefficients<C>>(x, samples);
    auto* target = static_cast<DdimCoefficients<C>*>(many.mutable_data_ptr());
    noising_kernel<C><<<blocks_for(samples), kThreads, 0, stream>>>(
        data<int64_t>(times), data<double>(alphas), table.size(0), samples, target);
    check_launch("q_sample: coefficients");
    args.coefficients = target;
    launch(args, -1, 1, static_cast<C*>(nullptr), stream);
  });
  return out;
}

// x_t becomes x_s; `next_input` gets the same numbers in the network's dtype.
void ddim_loop_step(Tensor x, const Tensor& model_output, std::optional<Tensor> guide,
                    const Tensor& table, Tensor counter, std::optional<Tensor> next_input,
                    int64_t seed, int64_t draw, double ratio, double largest) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_operand(model_output, x, false, "ddim_loop_step_: model_output");
  const bool inside = x.dim() == 4 && is_channels_last(x);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.numel() > 0 && has_dense_samples(x) &&
                      (inside || x.is_contiguous()),
                  "ddim_loop_step_: the state must be contiguous or channels_last float32");
  check_table(table, counter, x);
  if (guide) check_operand(*guide, x, false, "ddim_loop_step_: guide");
  const cudaStream_t stream = current_stream(x);
  const Operand m(model_output, x, output_dtype(x, model_output));
  std::optional<Operand> y;
  if (guide) y.emplace(*guide, x, x.scalar_type());
  if (next_input) {
    check_operand(*next_input, x, false, "ddim_loop_step_: next_input");
    STD_TORCH_CHECK(next_input->scalar_type() == m.tensor.scalar_type() &&
                        has_layout_of(x, *next_input, false),
                    "ddim_loop_step_: next_input must have the output's dtype and x_t's layout");
  }
  for_step_dtypes(x, m.tensor, [&](auto compute, auto x_type, auto m_type) {
    using X = decltype(x_type);
    using M = decltype(m_type);
    if constexpr (std::is_same_v<X, float>) {
      StepArgs<float, float, M> args{};
      args.samples = x.size(0);
      args.size = x.numel() / args.samples;
      args.x = data<float>(x);
      args.out = static_cast<float*>(x.mutable_data_ptr());
      args.m = data<M>(m.tensor), args.m_shared = m.shared;
      if (y) args.y = data<float>(y->tensor), args.y_shared = y->shared;
      if (next_input) args.input = static_cast<M*>(next_input->mutable_data_ptr());
      args.coefficients = reinterpret_cast<const StepCoefficients*>(data<float>(table));
      args.counter = reinterpret_cast<StepCounter*>(counter.mutable_data_ptr());
      args.steps = static_cast<int32_t>(table.size(0));
      const int64_t channels = inside ? x.size(1) : 1;
      args.noise = {static_cast<uint64_t>(seed), static_cast<uint64_t>(draw),
                    {channels, args.size / channels, inside}};
      Tensor limits;
      if (ratio >= 0) limits = room<float>(x, args.samples);
      launch(args, ratio, largest,
             ratio >= 0 ? static_cast<float*>(limits.mutable_data_ptr()) : nullptr, stream);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CUDA, m) {
  m.impl("q_sample", TORCH_BOX(&q_sample));
  m.impl("ddim_step", TORCH_BOX(&ddim_step));
  m.impl("ddim_loop_step_", TORCH_BOX(&ddim_loop_step));
}

}  // namespace
}  // namespace diffad
