// Runs csrc/cuda/ddim_step_kernels.h on the CPU. Standard input: the task as numbers; standard output:
// the result, the dynamic thresholds, and of a loop the network's next input and the counter.
#include "thread_block.h"

#include "../../csrc/cuda/ddim_step_kernels.h"

using emulated::read;

namespace {

// The upper half of a float.
struct Bfloat16 {
  uint16_t bits;
  Bfloat16() = default;
  explicit Bfloat16(float x) {
    const uint32_t all = __float_as_uint(x);
    bits = static_cast<uint16_t>((all + 0x7fffu + (all >> 16 & 1u)) >> 16);
  }
  operator float() const { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
};

struct Task {
  int32_t doubles, bfloat16, packed, loop;  // which types, accesses of eight, a loop or one step
  int32_t samples, size, blocks;
  int32_t guided, noisy, threshold, m_shared, y_shared, z_shared;
  int32_t prediction, recompute_epsilon;
  int32_t steps, channels, channels_inside;  // of a loop
};

template <class T>
void write(const std::vector<T>& x) {
  if (!x.empty()) std::fwrite(x.data(), sizeof(T), x.size(), stdout);
}

template <class C, class X, class M>
void run(const Task& task) {
  const auto numbers = read<double>(5);  // guidance, eta, clip, ratio, largest
  const size_t all = static_cast<size_t>(task.samples) * task.size;
  const auto size = [&](bool shared) { return shared ? task.size : all; };
  auto x = read<X>(all);
  const auto m = read<M>(size(task.m_shared));
  const auto y = read<X>(task.guided ? size(task.y_shared) : 0);
  const auto z = read<X>(task.noisy ? size(task.z_shared) : 0);
  std::vector<X> out(all, X(NAN));
  std::vector<M> input(task.loop ? all : 0, M(NAN));
  std::vector<C> limits(task.threshold ? task.samples : 0, C(NAN));
  diffad::StepCounter counter{};

  diffad::StepArgs<C, X, M> args{};
  args.samples = task.samples;
  args.size = task.size;
  args.x = x.data();
  args.out = out.data();
  args.m = m.data(), args.m_shared = task.m_shared;
  if (task.guided) args.y = y.data(), args.y_shared = task.y_shared;
  if (task.noisy) args.z = z.data(), args.z_shared = task.z_shared;

  const auto step = [&] {
    if (task.threshold) {
      emulated::launch(std::min(task.samples, task.blocks), diffad::kThresholdThreads, 0, [&] {
        diffad::threshold_kernel(args, numbers[3], static_cast<C>(numbers[4]), limits.data());
      });
      args.limits = limits.data();
    }
    emulated::launch(task.blocks, diffad::kStepThreads, 0, [&] {
      task.packed ? diffad::step_kernel<diffad::kPack>(args) : diffad::step_kernel<1>(args);
    });
  };
  if (task.loop) {
    const auto table = read<C>(task.steps * 9);
    const auto key = read<uint64_t>(2);  // seed, draw
    args.out = x.data();
    args.input = input.data();
    args.coefficients = reinterpret_cast<const diffad::DdimCoefficients<C>*>(table.data());
    args.counter = &counter;
    args.steps = task.steps;
    args.noise = {key[0], key[1], {task.channels, task.size / task.channels,
                                   static_cast<bool>(task.channels_inside)}};
    for (int i = 0; i < task.steps; ++i) step();
    write(x);
  } else {
    const auto alpha = read<double>(2 * task.samples);  // of all t, of all s
    const diffad::DdimOptions options{
        static_cast<diffad::Prediction>(task.prediction), static_cast<bool>(task.guided),
        task.threshold || numbers[2] < INFINITY, static_cast<bool>(task.recompute_epsilon),
        numbers[0], numbers[1]};
    std::vector<diffad::DdimCoefficients<C>> coefficients(task.samples);
    emulated::launch(task.blocks, diffad::kStepThreads, 0, [&] {
      diffad::coefficients_kernel<C>({alpha.data(), NAN, 1}, {alpha.data() + task.samples, NAN, 1},
                                     options, numbers[2], task.samples, coefficients.data());
    });
    args.coefficients = coefficients.data();
    step();
    write(out);
  }
  write(limits);
  write(input);
  std::fwrite(&counter, sizeof(counter), 1, stdout);
}

}  // namespace

int main() {
  Task task;
  if (std::fread(&task, sizeof(task), 1, stdin) != 1) return 2;
  if (task.doubles) {
    run<double, double, double>(task);
  } else if (task.bfloat16) {
    run<float, float, Bfloat16>(task);
  } else {
    run<float, float, float>(task);
  }
}
