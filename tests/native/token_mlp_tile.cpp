// Runs csrc/cuda/token_mlp_tile.h on the CPU: a thread block of fibers, in which the instructions of
// mma.h, written here from PTX's description of their fragments, let the fibers of a warp meet.
// Standard input: the task as numbers; standard output: x_end and stats.
#include "thread_block.h"

using emulated::read;

namespace {

float from_bf16(uint32_t bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
uint32_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

struct Copy {
  char* shared;
  const void* global;
  bool valid;
};
thread_local std::vector<Copy> pending[256];  // of a block's threads

}  // namespace

static float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace diffad {

static int lane_of_thread() { return threadIdx.x % 32; }

// As far off as it may be.
static float tanh_approx(float x) { return std::tanh(x) * (1 + std::ldexp(1.0f, -11)); }

static uint32_t pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }

// PTX ISA, mma.m16n8k16, .bf16: A element (row, k) is in lane (row % 8) * 4 + k % 8 / 2, register
// row / 8 + k / 8 * 2, half k % 2; B element (k, n) in lane n * 4 + k % 8 / 2, register k / 8, half
// k % 2; C element (row, n) in lane (row % 8) * 4 + n / 2, register row / 8 * 2 + n % 2.
static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Factors {
    uint32_t a[4], b[2];
  };
  const auto all = emulated::gather<Factors>({{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = lane_of_thread();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t y = all[n * 4 + k % 8 / 2].b[k / 8];
      c[i] += from_bf16(x >> k % 2 * 16 & 0xffffu) * from_bf16(y >> k % 2 * 16 & 0xffffu);
    }
  }
}

// PTX ISA, ldmatrix.x4.
static void load_matrices(uint32_t (&r)[4], const void* shared) {
  const auto rows = emulated::gather(static_cast<const uint32_t*>(shared));
  const int lane = lane_of_thread();
  for (int i = 0; i < 4; ++i) r[i] = rows[i * 8 + lane / 4][lane % 4];
}

// A copy may arrive at any time up to the wait: those of odd threads do at once, which shows where
// shared memory is overwritten too early, the others at the wait, which shows where that is missing.
static void wait_for_copies() {
  for (const Copy& copy : pending[threadIdx.x]) {
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::memset(copy.shared, 0, 16);
    }
  }
  pending[threadIdx.x].clear();
}

static void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    std::fprintf(stderr, "a copy of 16 bytes from or to an address that is no multiple of 16\n");
    std::exit(1);
  }
  pending[threadIdx.x].push_back({static_cast<char*>(shared), global, valid});
  if (threadIdx.x % 2) wait_for_copies();
}
}  // namespace diffad

#include "../../csrc/cuda/token_mlp_tile.h"

template <int kWidth, int kTiles, int kWarps>
struct Launch {
  static constexpr int width = kWidth, tiles = kTiles, warps = kWarps;
  void operator()(const diffad::TokenMlpTask& task, unsigned blocks) const {
    emulated::launch(blocks, 32 * kWarps, diffad::kTokenMlpShared, [&] {
      diffad::TokenMlp<kWidth, kTiles, kWarps>(task, emulated::dynamic_shared).run();
    });
  }
};

int main() {
  // width, tiles of a warp, warps, thread blocks; tokens, size, blocks, steps
  const std::vector<int32_t> n = read<int32_t>(8);
  const size_t w = n[0], tokens = n[4], size = n[5], blocks = n[6], steps = n[7];
  const size_t pitch = (size + 7) / 8 * 8;
  const auto w_in = read<uint16_t>(w * pitch), b_in = read<uint16_t>(w);
  const auto w1 = read<uint16_t>(blocks * w * w), w2 = read<uint16_t>(blocks * w * w);
  const auto b2 = read<uint16_t>(blocks * w), w_out = read<uint16_t>(size * w);
  const auto b_out = read<uint16_t>(size);
  const auto step_bias = read<float>(steps * blocks * w), table = read<float>(steps * 5);
  const auto x = read<float>(tokens * size);
  std::vector<float> x_end(tokens * size, NAN), stats(tokens * steps, NAN);

  diffad::TokenMlpTask task{};
  task.tokens = tokens;
  task.size = size;
  task.pitch = pitch;
  task.blocks = blocks;
  task.steps = steps;
  task.w_in = w_in.data();
  task.b_in = b_in.data();
  task.w1 = w1.data();
  task.w2 = w2.data();
  task.b2 = b2.data();
  task.w_out = w_out.data();
  task.b_out = b_out.data();
  task.step_bias = step_bias.data();
  task.table = table.data();
  task.x = x.data();
  task.x_end = x_end.data();
  task.stats = stats.data();

  const auto run = [&](auto launch) {
    if (n[0] == launch.width && n[1] == launch.tiles && n[2] == launch.warps) launch(task, n[3]);
  };
  run(Launch<128, 1, 4>());
  run(Launch<128, 2, 8>());
  run(Launch<256, 1, 4>());
  run(Launch<256, 1, 8>());
  run(Launch<128, 1, 1>());
  std::fwrite(x_end.data(), 4, x_end.size(), stdout);
  std::fwrite(stats.data(), 4, stats.size(), stdout);
}
