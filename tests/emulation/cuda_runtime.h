// In place of CUDA's header: kernels run on the CPU, for tests, on thread blocks whose threads are
// fibers. __init__.py makes of kernel<<<grid, threads, bytes, stream>>>(arguments) a call of
// emulated::launch, which returns when the kernel has run.
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

#include <setjmp.h>
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
#include <mutex>
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
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
// A block is run by one thread, so that its variables are its own.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y;
  dim3(unsigned x, unsigned y = 1) : x(x), y(y) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulated {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
constexpr size_t kStack = 128 * 1024;

// Where a fiber, or who lets it go on, has stopped.
struct Context {
  ucontext_t start;
  jmp_buf stop;
  bool stopped = false;
};

UNSEEN inline void change(Context& from, Context& to) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.start, &to.start);  // which sanitizers know
#else
  // In a twentieth of the time: swapcontext calls the kernel for the signals that are blocked.
  if (_setjmp(from.stop)) return;
  from.stopped = true;
  if (to.stopped) _longjmp(to.stop, 1);
  setcontext(&to.start);
#endif
}

enum class State { kRuns, kMeetsWarp, kMeetsBlock, kFinished };

struct Fiber {
  Context context;
  State state = State::kRuns;
  unsigned barriers = 0;
  unsigned exchanges = 0;
  char given[2][32];  // to the other lanes, in turn: some give the next before all have read this one
  std::vector<std::function<void()>> copies;   // on their way
  void* known;                                 // to the sanitizer
};

// Of the block that this thread runs.
inline thread_local std::vector<Fiber> fibers;
inline thread_local std::unique_ptr<char[]> stacks;
inline thread_local unsigned current;
inline thread_local Context scheduler;
inline thread_local void* known_scheduler;
inline thread_local char barrier[2];  // in turn: some reach the next before all have left this one
inline thread_local char end;
inline thread_local char* dynamic_shared;
inline thread_local std::vector<void*>* ended;  // fibers known to the sanitizer
// Of all blocks.
inline std::function<void()> kernel;
inline char fence;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "%s\n", why);
  std::_Exit(3);
}

UNSEEN inline unsigned thread_index() { return current; }
UNSEEN inline Fiber& this_fiber() { return fibers[current]; }
UNSEEN inline char* next_barrier() { return &barrier[this_fiber().barriers++ % 2]; }

UNSEEN inline void wait(State state) {
  Fiber& me = this_fiber();
  me.state = state;
  TELL(__tsan_switch_to_fiber(known_scheduler, __tsan_switch_to_fiber_no_sync);)
  change(me.context, scheduler);
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
  if (!stacks) stacks.reset(new char[kMostThreads * kStack]);
  fibers = std::vector<Fiber>(threads);
  TELL(known_scheduler = __tsan_get_current_fiber();)
  for (unsigned i = 0; i < threads; ++i) {
    ucontext_t& context = fibers[i].context.start;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.get() + i * kStack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, run_fiber, 0);
    TELL(fibers[i].known = __tsan_create_fiber(0);)
  }
  for (bool some = true; some;) {
    for (current = 0; current < threads; ++current) {
      if (fibers[current].state != State::kRuns) continue;
      TELL(__tsan_switch_to_fiber(fibers[current].known, __tsan_switch_to_fiber_no_sync);)
      change(scheduler, fibers[current].context);
    }
    some = wake(0, threads, State::kMeetsBlock);
    for (unsigned i = 0; i < threads; i += kWarp) {
      some |= wake(i, std::min(i + kWarp, threads), State::kMeetsWarp);
    }
  }
  TELL(__tsan_acquire(&end);)
  for (Fiber& fiber : fibers) {
    if (fiber.state != State::kFinished) fail("threads of a block wait for others that do not come");
    TELL(ended->push_back(fiber.known);)
  }
}

// What each lane of the warp gives; all of them must come.
template <class T>
UNSEEN std::array<T, kWarp> gather(T value) {
  static_assert(sizeof(T) <= sizeof(Fiber::given[0]));
  const unsigned turn = this_fiber().exchanges++ % 2;
  std::memcpy(this_fiber().given[turn], &value, sizeof(T));
  wait(State::kMeetsWarp);
  std::array<T, kWarp> all;
  const size_t first = current / kWarp * kWarp;
  for (size_t lane = 0; lane < kWarp && first + lane < fibers.size(); ++lane) {
    std::memcpy(&all[lane], fibers[first + lane].given[turn], sizeof(T));
  }
  return all;
}

}  // namespace emulated

// The threads of a block have one variable for all of them: their index is not kept in it.
struct ThreadIndex {
  struct {
    operator unsigned() const { return emulated::thread_index(); }
  } x;
};
inline ThreadIndex threadIdx;
inline thread_local dim3 blockIdx = 0;
inline dim3 blockDim = 0, gridDim = 0;

namespace emulated {

UNSEEN inline void run_blocks(unsigned first, unsigned end, unsigned step, size_t bytes,
                              std::vector<void*>* fibers_that_end) {
  ended = fibers_that_end;
  // Exactly so large, for AddressSanitizer, and of bits that make NaN.
  void* shared = nullptr;
  if (posix_memalign(&shared, 1024, bytes)) fail("no memory");
  dynamic_shared = static_cast<char*>(shared);
  for (unsigned i = first; i < end; i += step) {
    std::memset(shared, 0xff, bytes);
    blockIdx = {i % gridDim.x, i / gridDim.x};
    run_block(blockDim.x);
  }
  std::free(shared);
}

template <class Kernel>
void launch(dim3 grid, unsigned threads, size_t bytes, Kernel&& code) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const bool fits = threads > 0 && threads <= kMostThreads && grid.x > 0 && grid.x < 1u << 31 &&
                    grid.y > 0 && grid.y < 1u << 16;
  if (!fits) fail("a launch that CUDA would refuse");
  kernel = code;
  blockDim = threads;
  gridDim = grid;
  const unsigned blocks = grid.x * grid.y;
  unsigned side_by_side = 2, each = blocks;
  // To ThreadSanitizer blocks that follow each other in a thread would be in order, and so would be
  // fibers of which one begins when another has been given up; every fiber is one of the threads
  // that it can have.
  TELL(side_by_side = 4096 / threads; each = side_by_side;)
  for (unsigned first = 0; first < blocks; first += each) {
    const unsigned end = std::min(first + each, blocks);
    std::vector<std::thread> runners;
    std::vector<std::vector<void*>> fibers_that_end(side_by_side);
    for (unsigned i = first; i < std::min(first + side_by_side, end); ++i) {
      runners.emplace_back(run_blocks, i, end, side_by_side, bytes, &fibers_that_end[i - first]);
    }
    for (std::thread& runner : runners) runner.join();
    for (auto& block : fibers_that_end) {
      for ([[maybe_unused]] void* fiber : block) {
        TELL(__tsan_destroy_fiber(fiber);)
      }
    }
  }
}

}  // namespace emulated

// ----------------------------------------------------------------- device functions

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
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

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

// ------------------------------------------------------------------ of the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  std::memset(at, value, bytes);
  return cudaSuccess;
}
// So few that thread blocks take several turns.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
