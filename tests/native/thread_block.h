// CUDA kernels on the CPU, for tests: thread blocks whose threads are fibers.
//
// A fiber runs until it meets the others of its warp or of its block. Where some wait for others that
// never come, the program says so and ends. Lanes meet to exchange numbers; that orders no memory.
// Blocks are threads and know nothing of each other.
//
// Compiled with -fsanitize=thread, two accesses to one address without a barrier between them are
// reported whatever the order of turns here: each fiber is a thread to the sanitizer, which is told
// of the barriers and not of the turns. So what fibers share in this file is touched only by functions
// that are not instrumented (UNSEEN).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define UNSEEN __attribute__((no_sanitize_thread, noinline))
#define TELL(...) __VA_ARGS__
#else
#define UNSEEN
#define TELL(...)
#endif

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// A block is a thread, so that its variables are its own.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 * 1024;

enum class State { kRuns, kMeetsWarp, kMeetsBlock, kFinished };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kRuns;
  unsigned barriers = 0;
  char given[32];  // to the other lanes
  void* known;     // to the sanitizer
};

// Of the block that this thread runs.
inline thread_local std::vector<Fiber> fibers;
inline thread_local unsigned current;
inline thread_local ucontext_t scheduler;
inline thread_local void* known_scheduler;
inline thread_local char barrier[2];  // in turn: some reach the next before all have left this one
inline thread_local char end;
inline thread_local char* dynamic_shared;
// Of all blocks.
inline std::function<void()> kernel;
inline char fence;

UNSEEN inline unsigned thread_index() { return current; }
UNSEEN inline char* next_barrier() { return &barrier[fibers[current].barriers++ % 2]; }

UNSEEN inline void wait(State state) {
  Fiber& me = fibers[current];
  me.state = state;
  TELL(__tsan_switch_to_fiber(known_scheduler, __tsan_switch_to_fiber_no_sync);)
  swapcontext(&me.context, &scheduler);
}

UNSEEN inline void run_fiber() {
  kernel();
  TELL(__tsan_release(&end);)
  wait(State::kFinished);
}

// Lets fibers go on that wait alike, if all do. A barrier does not count threads that have ended; an
// exchange names all lanes of a warp.
UNSEEN inline bool wake(size_t first, size_t last, State state) {
  size_t waiting = 0;
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state == state) {
      ++waiting;
    } else if (state == State::kMeetsWarp || fibers[i].state != State::kFinished) {
      return false;
    }
  }
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::kRuns;
  }
  return waiting > 0;
}

UNSEEN inline void run_block(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  TELL(known_scheduler = __tsan_get_current_fiber();)
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    TELL(fiber.known = __tsan_create_fiber(0);)
  }
  for (bool some = true; some;) {
    for (current = 0; current < threads; ++current) {
      if (fibers[current].state != State::kRuns) continue;
      TELL(__tsan_switch_to_fiber(fibers[current].known, __tsan_switch_to_fiber_no_sync);)
      swapcontext(&scheduler, &fibers[current].context);
    }
    some = wake(0, threads, State::kMeetsBlock);
    for (unsigned i = 0; i < threads; i += kWarp) {
      some |= wake(i, std::min(i + kWarp, threads), State::kMeetsWarp);
    }
  }
  TELL(__tsan_acquire(&end);)
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::kFinished) {
      std::fprintf(stderr, "threads of a block wait for others that do not come\n");
      std::_Exit(3);
    }
    TELL(__tsan_destroy_fiber(fiber.known);)
  }
}

// What each lane of the warp gives; all of them must come.
template <class T>
UNSEEN std::array<T, kWarp> gather(T value) {
  static_assert(sizeof(T) <= sizeof(Fiber::given));
  std::memcpy(fibers[current].given, &value, sizeof(T));
  wait(State::kMeetsWarp);
  std::array<T, kWarp> all;
  const size_t first = current / kWarp * kWarp;
  for (size_t lane = 0; lane < kWarp && first + lane < fibers.size(); ++lane) {
    std::memcpy(&all[lane], fibers[first + lane].given, sizeof(T));
  }
  wait(State::kMeetsWarp);
  return all;
}

// Starts at a multiple of 16, as tensors do.
template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> x(count);
  if (count > 0 && std::fread(x.data(), sizeof(T), count, stdin) != count) std::exit(2);
  return x;
}

}  // namespace emulated

// The threads of a block have one variable for all of them: their index is not kept in it.
struct {
  struct {
    operator unsigned() const { return emulated::thread_index(); }
  } x;
} static threadIdx;
static thread_local dim3 blockIdx = 0;
static dim3 blockDim = 0, gridDim = 0;

namespace emulated {

// kernel<<<grid, threads, bytes>>>(): all bits of the shared memory are 1, NaN.
template <class Kernel>
void launch(dim3 grid, unsigned threads, size_t bytes, Kernel&& code) {
  kernel = code;
  blockDim = threads;
  gridDim = grid;
  std::vector<std::unique_ptr<void, decltype(&std::free)>> shared;
  std::vector<std::thread> blocks;
  for (unsigned i = 0; i < grid.x * grid.y; ++i) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes)) std::abort();
    shared.emplace_back(std::memset(memory, 0xff, bytes), std::free);
    blocks.emplace_back([=] {
      blockIdx = {i % grid.x, i / grid.x};
      dynamic_shared = static_cast<char*>(memory);
      run_block(threads);
    });
  }
  for (std::thread& block : blocks) block.join();
}

}  // namespace emulated

inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline long long __double_as_longlong(double x) {
  long long y;
  std::memcpy(&y, &x, 8);
  return y;
}
inline double __longlong_as_double(long long x) {
  double y;
  std::memcpy(&y, &x, 8);
  return y;
}

inline void __syncthreads() {
  [[maybe_unused]] char* const barrier = emulated::next_barrier();
  TELL(__tsan_release(barrier);)
  emulated::wait(emulated::State::kMeetsBlock);
  TELL(__tsan_acquire(barrier);)
}

template <class T>
T __shfl_xor_sync(uint32_t, T x, int lanes) {
  return emulated::gather(x)[threadIdx.x % emulated::kWarp ^ lanes];
}

// What is before one fence is before what is after the next, whether or not they meet in an atomic.
inline void __threadfence() {
  TELL(__tsan_acquire(&emulated::fence);)
  TELL(__tsan_release(&emulated::fence);)
}

// Orders nothing.
template <class T>
T atomicAdd(T* at, T more) {
  return __atomic_fetch_add(at, more, __ATOMIC_RELAXED);
}
