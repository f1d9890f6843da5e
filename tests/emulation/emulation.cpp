// What the emulation has beside the operators: a stream, and faults that it must see.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// There is one stream, and whoever launches waits.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// Two thread blocks. 0: right. 1: threads read what others of their block write, without a barrier.
// 2: blocks write to one place. 3: half of a warp waits at a barrier, the other half for the first.
extern "C" __attribute__((visibility("default"))) int emulated_fault(int which) {
  int shared_by_blocks = 0, sums[2];
  emulated::launch(2, 64, 0, [&] {
    __shared__ int values[64];
    const unsigned thread = threadIdx.x;
    values[thread] = 1;
    if (which != 1) __syncthreads();
    if (which == 2 && thread == 0) shared_by_blocks = 1;
    if (which == 3) thread < 48 ? __syncthreads() : (void)__shfl_xor_sync(~0u, 1, 1);
    if (thread == 0) sums[blockIdx.x] = values[0] + values[63];
  });
  return sums[0] + sums[1] + shared_by_blocks;
}
