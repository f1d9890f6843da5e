// Runs csrc/cuda/anomaly_map_tile.h on the CPU: thread blocks of fibers. Standard input: the task as
// numbers; standard output: the map and the scores.
#include "thread_block.h"

#include "../../csrc/cuda/anomaly_map_tile.h"

using emulated::read;

namespace {

// Of a dense tensor (N, C, H, W).
diffad::Strides strides(int64_t c, int64_t h, int64_t w, bool last) {
  if (last) return {c * h * w, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

template <int kLevel>
void run_weighted(diffad::WeightedArgs<float>& args, int64_t batch, unsigned blocks) {
  const unsigned threads = diffad::weighted_grid<kLevel>(args, batch);
  emulated::launch(blocks, threads, 0, [&] { diffad::weighted_tiles<kLevel>(args); });
}

template <int kHalo = diffad::kBlurHaloStep>
void run_blur(const diffad::BlurArgs& args, int radius, unsigned blocks) {
  if constexpr (kHalo < diffad::kBlurMostRadius) {
    if (radius > kHalo) return run_blur<kHalo + diffad::kBlurHaloStep>(args, radius, blocks);
  }
  emulated::launch(blocks, diffad::kBlurThreads, diffad::blur_shared_bytes(kHalo), [&] {
    diffad::blur_tiles<kHalo>(args, reinterpret_cast<float*>(emulated::dynamic_shared));
  });
}

}  // namespace

int main() {
  // samples, channels, height, width, levels, scales, channels_last, statistics (0 none, 1 numbers,
  // 2 a position each), base, radius, top, thread blocks; then (channels, height, width) a scale
  const std::vector<int32_t> given = read<int32_t>(12);
  const auto [n, channels, height, width] = std::array<int64_t, 4>{given[0], given[1], given[2], given[3]};
  const int levels = given[4], scales = given[5], radius = given[9];
  const bool last = given[6];
  const unsigned blocks = given[11];
  const std::vector<int32_t> sizes = read<int32_t>(3 * scales);
  const auto weights = read<float>(3), taps = read<float>(radius + 1);
  const auto x = read<float>(n * channels * height * width), x_hat = read<float>(x.size());

  diffad::WeightedArgs<float> args{};
  std::vector<std::vector<float>> cosines;
  for (int s = 0; s < scales; ++s) {
    const int64_t c = sizes[3 * s], h = sizes[3 * s + 1], w = sizes[3 * s + 2];
    const auto f = read<float>(n * c * h * w), f_hat = read<float>(f.size());
    cosines.emplace_back(n * h * w, NAN);
    const auto layout = strides(c, h, w, last);
    const diffad::CosineArgs<float> scale{f.data(), f_hat.data(), layout, layout, c, w, h * w,
                                          n * h * w, cosines.back().data()};
    emulated::launch(blocks, diffad::kCosineThreads, 0, [&] {
      last ? diffad::cosine_tiles<true>(scale) : diffad::cosine_tiles<false>(scale);
    });
    args.scale[s] = diffad::map_scale(cosines.back().data(), h, w, height, width);
  }
  const int64_t pixels = height * width;
  const auto statistics = read<float>(given[7] == 0 ? 0 : given[7] == 1 ? 6 : 6 * pixels);
  const auto base = read<float>(given[8] ? n * pixels : 0);
  std::vector<float> total(n * pixels, NAN), map(n * pixels, NAN), score(n, NAN);

  args.x = x.data();
  args.x_hat = x_hat.data();
  args.stride = args.stride_hat = strides(channels, height, width, last);
  args.channels = channels;
  args.height = height;
  args.width = width;
  args.scales = scales;
  args.base = given[8] ? base.data() : nullptr;
  args.result = total.data();
  for (int i = 0; i < 3; ++i) {
    args.weight[i] = weights[i];
    for (int k = 0; k < 2; ++k) {
      args.statistic[i][k] = {nullptr, static_cast<float>(k), 0, 0};
      if (given[7] == 1 && k == 0) args.statistic[i][k] = {&statistics[2 * i], NAN, 0, 0};
      if (given[7] == 1 && k == 1) args.statistic[i][k].number = statistics[2 * i + k];
      if (given[7] == 2) {
        args.statistic[i][k] = {statistics.data() + (2 * i + k) * pixels, 0, width, 1};
      }
    }
  }
  switch (levels) {
    case 0: run_weighted<0>(args, n, blocks); break;
    case 1: run_weighted<1>(args, n, blocks); break;
    case 2: run_weighted<2>(args, n, blocks); break;
    case 3: run_weighted<3>(args, n, blocks); break;
    default: run_weighted<4>(args, n, blocks);
  }

  const int64_t parts = (pixels + diffad::kTopShare - 1) / diffad::kTopShare;
  std::vector<diffad::TopState> state(parts > 1 ? n : 0);
  std::vector<float> partial(parts > 1 ? n * parts : 0, NAN);
  if (radius == 0) {
    map = total;
  } else {
    diffad::BlurArgs blur{total.data(), map.data(), height, width};
    std::copy(taps.begin(), taps.end(), blur.taps);
    blur.state = parts > 1 ? state.data() : nullptr;
    diffad::blur_grid(blur, n);
    run_blur(blur, radius, blocks);
  }

  const diffad::TopArgs top{map.data(), pixels, given[10], parts, state.data(), partial.data(),
                            score.data()};
  const auto run_top = [&](int64_t grid, auto kernel) {
    emulated::launch(static_cast<unsigned>(grid), diffad::kTopThreads, 0, kernel);
  };
  if (parts == 1) {
    run_top(n, [&] { diffad::top_small(top); });
  } else {
    if (radius == 0) run_top(n * parts, [&] { diffad::top_digit<0>(top); });
    run_top(n * parts, [&] { diffad::top_digit<1>(top); });
    run_top(n * parts, [&] { diffad::top_digit<2>(top); });
    run_top(n, [&] { diffad::top_score(top); });
  }
  std::fwrite(map.data(), 4, map.size(), stdout);
  std::fwrite(score.data(), 4, score.size(), stdout);
}
