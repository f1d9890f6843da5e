// A CUDA thread block on the CPU: every thread is a fiber, and they take turns.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __forceinline__ inline

struct Dim {
  unsigned x;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace {

ucontext_t scheduler;
std::vector<ucontext_t> fibers;
std::vector<std::vector<char>> stacks;
std::function<void()> body;
std::vector<bool> finished;

void yield() {
  const unsigned me = threadIdx.x;
  swapcontext(&fibers[me], &scheduler);
}

void entry() {
  body();
  finished[threadIdx.x] = true;
  yield();
}

void run_block(unsigned threads) {
  fibers.assign(threads, {});
  stacks.assign(threads, std::vector<char>(256 * 1024));
  finished.assign(threads, false);
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks[i].data();
    fibers[i].uc_stack.ss_size = stacks[i].size();
    fibers[i].uc_link = nullptr;
    makecontext(&fibers[i], entry, 0);
  }
  for (bool more = true; more;) {
    more = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (finished[i]) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i]);
      more = more || !finished[i];
    }
  }
}

template <class T>
std::vector<T> read(size_t count) {
  // Starts at a multiple of 16, as tensors do.
  std::vector<T> x(count);
  if (std::fread(x.data(), sizeof(T), count, stdin) != count) std::exit(2);
  return x;
}

}  // namespace

static float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}

[[maybe_unused]] static uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}

// All fibers take turns in order: when a fiber is back from `yield`, all others have come as far.
// A write, a yield, reads and a yield are thus an exchange without races.
static void __syncthreads() { yield(); }

// All fibers of a block must call it together.
[[maybe_unused]] static float __shfl_xor_sync(uint32_t, float x, int lanes) {
  static std::vector<float> given(1024);
  given[threadIdx.x] = x;
  yield();
  const float other = given[threadIdx.x ^ lanes];
  yield();
  return other;
}
