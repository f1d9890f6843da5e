// The kernel of token_mlp_loop, apart from the instructions (mma.h) and from torch: a test on the
// CPU runs this very code, lane by lane (tests/emulation/).
//
// A warp owns 16 kTiles tokens. Of them it keeps h, in the results' layout of the matrix units
// (mma.h), and the input of the present product, as left factors, in registers through all layers.
// A block's hidden layer is never there as a whole: 16 of its units are computed, activated and
// multiplied into h at once. LayerNorm and the statistics are sums over a lane's own numbers and
// over the four lanes that share a row. The state x lies in x_end, which the L2 holds; a lane reads
// only what it wrote itself, so that D may be anything.
//
// The weights stream from L2 through shared memory, stage by stage, each stage while the one before
// it is used; all warps of a thread block use the same stages. A stage is 16 KiB of rows and 16 KiB
// of columns. With N = 8192 / W:
//   in        columns [N i, N i + N) of W_in
//   block     rows [N i, N i + N) of W1 and columns [N i, N i + N) of W2
//   out       rows [N i, N i + N) of W_out
// Both lie as (outputs, inputs), as the weights themselves do. The 16-byte units of a row are
// permuted so that the eight rows that load_matrices reads at once hit different banks.
//
// The weights are never kept in shared memory instead: at width 128 a block's two matrices are
// 64 KiB, and from four blocks on exceed the 227 KiB that sm_90 has for a thread block (sm_80: 163).
// One way serves any number of blocks.
#pragma once

#include <cstdint>

namespace diffad {

struct TokenMlpTask {
  int tokens;
  int size, pitch;  // D, and D rounded up to 8: the row length of w_in
  int blocks, steps;
  const uint16_t *w_in, *b_in, *w1, *w2, *b2, *w_out, *b_out;  // bf16
  const float *step_bias, *table;
  const float* x;  // (M, D) as x_end
  float *x_end, *stats;
};

constexpr int kStageHalf = 16384;                // bytes
constexpr int kTokenMlpShared = 4 * kStageHalf;  // two stages of two halves

// Where unit `unit` (16 bytes) of a row lies, in rows of kUnits units.
template <int kUnits>
__device__ __forceinline__ int unit_at(int row, int unit) {
  static_assert(kUnits == 4 || kUnits % 8 == 0, "eight rows must cover the 32 banks");
  const int permuted = kUnits == 4 ? unit ^ ((row >> 1) & 3) : unit ^ (row & 7);
  return (row * kUnits + permuted) * 16;
}

__device__ __forceinline__ float bf16_to_float(uint16_t x) {
  return __uint_as_float(static_cast<uint32_t>(x) << 16);
}

// x / (1 + exp(-x)) = h + h tanh(h) of h = x / 2: with one instruction of the slow unit instead of
// two. tanh_approx is off by 2^-11 of its value, this by 2^-12 of |x|, and what follows rounds to 2^-9.
__device__ __forceinline__ float silu_of_twice(float h) { return h + h * tanh_approx(h); }

// W: width. kTiles: groups of 16 tokens of a warp. kWarps: of a thread block.
template <int W, int kTiles, int kWarps>
struct TokenMlp {
  static constexpr int N = kStageHalf / 2 / W;
  // Of the right factors of into_h, so many are loaded ahead of their products. All 16 of width 256
  // would push h out of the registers.
  static constexpr int kAhead = W == 256 ? 8 : W;
  static constexpr int kSteps = W / 16;  // steps of 16 along a product's inputs
  // Copies that are asked for in one go: as many as there are registers for.
  static constexpr int kFetched = W == 128 && kTiles == 1 ? W : 2;
  static_assert(W % N == 0 && N % 16 == 0, "stages cut the width evenly");

  const TokenMlpTask& task;
  char* shared;
  // Worked out anew where they are needed: registers are full.
  __device__ int in_stages() const { return (task.size + N - 1) / N; }
  int parity = 0;  // of the two stages in shared memory, the one that comes next

  float h[kTiles][W / 8][4];
  uint32_t a[kTiles][kSteps][4];

  __device__ TokenMlp(const TokenMlpTask& task, char* shared) : task(task), shared(shared) {}

  // ------------------------------------------------------------------ weights

  // kRows rows of kUnits units, `pitch` numbers apart, the first at `from`; where not all of them are
  // there, zeros beyond `rows` and `columns`. A thread's units lie below each other, so that little
  // is to be worked out for each: a warp that copies does not multiply.
  template <int kRows, int kUnits, bool kWhole>
  __device__ void fetch_half(char* half, const uint16_t* from, int pitch, int rows,
                             int columns) const {
    constexpr int kStep = 32 * kWarps / kUnits;
    static_assert(kStep > 0 && kRows % kStep == 0, "every thread has as many units");
    const int unit = threadIdx.x % kUnits, first = threadIdx.x / kUnits;
    if (!kWhole && unit * 8 >= columns) rows = 0;
    const uint16_t* at = from + static_cast<int64_t>(first) * pitch + unit * 8;
    char* const top = half + unit_at<kUnits>(first, unit);
#pragma unroll kFetched
    for (int r = 0; r < kRows; r += kStep) {
      const bool there = kWhole || first + r < rows;
      // Every eighth row is permuted alike.
      char* to = kStep % 8 ? half + unit_at<kUnits>(first + r, unit) : top + r * kUnits * 16;
      copy_async(to, there ? at + r * pitch : from, there);
    }
  }
  __device__ void fetch(int stage, char* buffer) const {
    const int block_stages = task.blocks * (W / N);
    if (stage < in_stages()) {
      fetch_half<W, N / 8, false>(buffer + kStageHalf, task.w_in + stage * N, task.pitch, W,
                                  task.pitch - stage * N);
    } else if (stage < in_stages() + block_stages) {
      const int64_t matrix = static_cast<int64_t>((stage - in_stages()) / (W / N)) * W * W;
      const int i = (stage - in_stages()) % (W / N);
      fetch_half<N, W / 8, true>(buffer, task.w1 + matrix + i * N * W, W, N, W);
      fetch_half<W, N / 8, true>(buffer + kStageHalf, task.w2 + matrix + i * N, W, W, N);
    } else {
      const int row = (stage - in_stages() - block_stages) * N;
      fetch_half<N, W / 8, false>(buffer, task.w_out + static_cast<int64_t>(row) * W, W,
                                  task.size - row, W);
    }
  }

  // Right factors of two products, outputs n to n + 15 and inputs k to k + 15 (multiples of 16) of
  // a half stage `half` bytes into the shared memory: of the first the first two registers. This is
  // unit_at(n + the lane's row, k / 8 + the lane's unit), taken apart so that all lies in a
  // register and constants.
  template <int kRowLength>
  __device__ void weights(uint32_t (&b)[4], int lane, int half, int n, int k) const {
    constexpr int kUnits = kRowLength / 8;
    const int start = unit_at<kUnits>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    load_matrices(b, shared + (start ^ k / 8 % 8 * 16) + (half + n * kUnits * 16 + k / 64 * 128));
  }

  // ----------------------------------------------------------------- one warp

  // h += columns . factor, whose inputs are k to k + 15 of the stage.
  __device__ void into_h(int columns, int k, const uint32_t (&factor)[kTiles][4]) {
    const int lane = lane_of_thread();
#pragma unroll
    for (int n = 0; n < W / 16; ++n) {
      // Never true. Nothing else keeps ptxas from moving loads up: it does so across a __syncwarp.
      if (n % kAhead == kAhead - 1 && task.size == 0) return;
      uint32_t b[4];
      weights<N>(b, lane, columns, n * 16, k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma(h[m][2 * n], factor[m], b[0], b[1]);
        mma(h[m][2 * n + 1], factor[m], b[2], b[3]);
      }
    }
  }

  // 16 outputs from row n of the stage on, of the product with a.
  __device__ void from_a(int rows, int n, float (&sum)[kTiles][2][4]) const {
    const int lane = lane_of_thread();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[m][i / 4][i % 4] = 0;
    }
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t b[4];
      weights<W>(b, lane, rows, n, k * 16);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma(sum[m][0], a[m][k], b[0], b[1]);
        mma(sum[m][1], a[m][k], b[2], b[3]);
      }
    }
  }

  // h (+)= a bias of W numbers.
  template <bool kAdd>
  __device__ void bias_to_h(const uint16_t* bias) {
    const int t = lane_of_thread() % 4;
#pragma unroll
    for (int n = 0; n < W / 8; ++n) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(bias + n * 8 + 2 * t);
      const float b[2] = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) h[m][n][i] = kAdd ? h[m][n][i] + b[i % 2] : b[i % 2];
      }
    }
  }

  // a = LN(h), or SiLU(LN(h)), as left factors.
  template <bool kSilu>
  __device__ void normalise() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < W / 8; ++n) sum += h[m][n][2 * row] + h[m][n][2 * row + 1];
        const float mean = over_row(sum) / W;
        sum = 0;
#pragma unroll
        for (int n = 0; n < W / 8; ++n) {
          const float u = h[m][n][2 * row] - mean, v = h[m][n][2 * row + 1] - mean;
          sum += u * u + v * v;
        }
        float scale = rsqrtf(over_row(sum) / W + 1e-5f);
        if (kSilu) scale *= 0.5f;
#pragma unroll
        for (int n = 0; n < W / 8; ++n) {
          float u = (h[m][n][2 * row] - mean) * scale, v = (h[m][n][2 * row + 1] - mean) * scale;
          if (kSilu) {
            u = silu_of_twice(u);
            v = silu_of_twice(v);
          }
          a[m][n / 2][n % 2 * 2 + row] = pack_bf16(u, v);
        }
      }
    }
  }
  // Sum over the four lanes of a row.
  __device__ static float over_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // -------------------------------------------------------------------- stages

  // The token of row g (`lower` 0) or g + 8 (1) of the warp's tile m.
  __device__ int token(int first, int m, int lower) const {
    return first + m * 16 + lower * 8 + lane_of_thread() / 4;
  }
  // Of a token's columns from `column` on the four that the lane has in a fragment: 0, 1, 8 and 9.
  __device__ bool is_there(int token, int column, int i) const {
    return token < task.tokens && column + offset(i) < task.size;
  }
  __device__ static constexpr int offset(int i) { return i / 2 * 8 + i % 2; }
  __device__ int64_t place(int token, int column) const {
    return static_cast<int64_t>(token) * task.size + column;
  }
  __device__ void load_state(const float* x, int token, int column, float (&four)[4]) const {
    const float* from = x + place(token, column);
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = is_there(token, column, i) ? from[offset(i)] : 0.0f;
  }

  __device__ const float* state_of(int step) const { return step == 0 ? task.x : task.x_end; }
  __device__ const float* row_of(int step) const { return task.table + step * 5; }

  __device__ void in_stage(int i, int columns, int first, int step) {
    const float* x = state_of(step);
    const float c_in = row_of(step)[0];
    const int end = task.size - i * N < N ? task.size - i * N : N;
    float next[kTiles][2][4];  // on its way while what came before is multiplied
    const auto load = [&](int k) {
      const int column = i * N + k + lane_of_thread() % 4 * 2;
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        load_state(x, token(first, j / 2, j % 2), column, next[j / 2][j % 2]);
      }
    };
    load(0);
    if (i == 0) bias_to_h<false>(task.b_in);
#pragma unroll 1
    for (int k = 0; k < end; k += 16) {
      uint32_t factor[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float(&four)[4] = next[m][r % 2];
          factor[m][r] = pack_bf16(c_in * four[r / 2 * 2], c_in * four[r / 2 * 2 + 1]);
        }
      }
      if (k + 16 < end) load(k + 16);
      into_h(columns, k, factor);
    }
  }

  __device__ void block_stage(int i, int rows, int columns, const float* bias,
                              const uint16_t* b2) {
    if (i == 0) normalise<false>();
#pragma unroll 1
    for (int n = 0; n < N; n += 16) {
      float sum[kTiles][2][4];
      uint32_t hidden[kTiles][4];
      from_a(rows, n, sum);
      const int t = lane_of_thread() % 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* e = bias + i * N + n + half * 8 + 2 * t;
        const float e0 = 0.5f * e[0], e1 = 0.5f * e[1];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          const float(&s)[4] = sum[m][half];
          hidden[m][2 * half] =
              pack_bf16(silu_of_twice(0.5f * s[0] + e0), silu_of_twice(0.5f * s[1] + e1));
          hidden[m][2 * half + 1] =
              pack_bf16(silu_of_twice(0.5f * s[2] + e0), silu_of_twice(0.5f * s[3] + e1));
        }
      }
      into_h(columns, n, hidden);
    }
    if (i == W / N - 1) bias_to_h<true>(b2);
  }

  __device__ void out_stage(int i, int rows, int first, int step, float (&squares)[kTiles][2]) {
    const float* x = state_of(step);
    float row[5];
    for (int k = 1; k < 5; ++k) row[k] = row_of(step)[k];
    if (i == 0) normalise<true>();
#pragma unroll 1
    for (int n = 0; n < N && i * N + n < task.size; n += 16) {
      const int column = i * N + n + lane_of_thread() % 4 * 2;
      // All loads before the first store, which the compiler must not move them across, and before
      // the product, during which they come.
      float now[kTiles][2][4], bias[4], sum[kTiles][2][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool there = column + offset(k) < task.size;
        bias[k] = there ? bf16_to_float(task.b_out[column + offset(k)]) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        load_state(x, token(first, j / 2, j % 2), column, now[j / 2][j % 2]);
      }
      from_a(rows, n, sum);
#pragma unroll
      for (int j = 0; j < 2 * kTiles; ++j) {
        const int m = j / 2, lower = j % 2, at = token(first, m, lower);
        float* to = task.x_end + place(at, column);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          // Behind the end of a row both are 0, and the statistics of no token go nowhere.
          const float old = now[m][lower][k], y = sum[m][k / 2][lower * 2 + k % 2] + bias[k];
          const float residual = row[3] * old + row[4] * y;
          squares[m][lower] += residual * residual;
          if (is_there(at, column, k)) to[offset(k)] = row[1] * old + row[2] * y;
        }
      }
    }
  }

  // Waits for the stage before `next`, starts to fetch that one, unless it is -1, and returns where
  // the rows lie.
  __device__ int arrive(int next) {
    wait_for_copies();
    __syncthreads();  // the stage has come, and nobody uses the one before it any more
    const int rows = parity * 2 * kStageHalf;
    parity ^= 1;
    if (next >= 0) fetch(next, shared + parity * 2 * kStageHalf);
    return rows;
  }

  // One step of the tokens from `first` on; `more` stages follow it. Few counters live through the
  // middle loop: registers are full.
  __device__ void one_step(int step, int first, bool more) {
    for (int i = 0; i < in_stages(); ++i) {
      in_stage(i, arrive(i + 1) + kStageHalf, first, step);
    }
    for (int i = 0; i < task.blocks * (W / N); ++i) {
      const int rows = arrive(in_stages() + i + 1), block = i / (W / N);
      block_stage(i % (W / N), rows, rows + kStageHalf,
                  task.step_bias + static_cast<int64_t>(step * task.blocks + block) * W,
                  task.b2 + static_cast<int64_t>(block) * W);
    }
    float squares[kTiles][2] = {};
    for (int i = 0; i < in_stages(); ++i) {
      const bool last = i + 1 == in_stages();
      const int next = in_stages() + task.blocks * (W / N) + i + 1;
      out_stage(i, arrive(!last ? next : more ? 0 : -1), first, step, squares);
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const float mean = over_row(squares[m][lower]) / static_cast<float>(task.size);
        const int at = token(first, m, lower);
        if (lane_of_thread() % 4 == 0 && at < task.tokens) {
          task.stats[static_cast<int64_t>(at) * task.steps + step] = mean;
        }
      }
    }
  }

  __device__ void run() {
    constexpr int per_block = kWarps * 16 * kTiles;
    const int stride = gridDim.x * per_block;
    int first = blockIdx.x * per_block;  // of the thread block
    if (first < task.tokens) fetch(0, shared);
    for (; first < task.tokens; first += stride) {
      for (int step = 0; step < task.steps; ++step) {
        one_step(step, first + threadIdx.x / 32 * (16 * kTiles),
                 step + 1 < task.steps || first + stride < task.tokens);
      }
    }
  }
};

}  // namespace diffad
