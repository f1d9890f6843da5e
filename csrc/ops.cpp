// Every operator of the library, one schema a line. The implementations register themselves from
// cpu/<operator>.cpp and cuda/<operator>.cu; shapes, fake tensors and autograd are added in
// diffad_fast/ops/<family>.py. A new operator adds its line here and its files there.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(diffad_fast, m) {
  m.def("cpu_isa(int level) -> int");  // csrc/cpu/isa.cpp
  m.def(
      "anomaly_map(Tensor x, Tensor x_hat, Tensor[] features, Tensor[] features_hat, "
      "float[] weights, int levels, Tensor[] stats, float sigma, float top) -> (Tensor, Tensor)");
  m.def("haar_pack(Tensor x, int level) -> Tensor");
  m.def("haar_unpack(Tensor y, int level) -> Tensor");
}
