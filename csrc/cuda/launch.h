// What every CUDA operator needs around its kernel: the current stream and error checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

// Lives in torch's CUDA library and is missing from a CPU-only torch. A weak reference lets one
// build load beside both; it is null where it is missing.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);

namespace diffad {

// The stream that PyTorch uses now on the device of `x`.
inline cudaStream_t current_stream(const torch::stable::Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "diffad_fast: this torch was built without CUDA, its streams cannot be used; "
                  "install a CUDA build of torch");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == 0,
                  "diffad_fast: no current CUDA stream on device ", x.get_device_index());
  return static_cast<cudaStream_t>(stream);
}

// Call right after a launch: a bad configuration or a missing architecture shows only here.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

}  // namespace diffad
