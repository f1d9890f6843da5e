// Every operator of the library, one schema a line. The implementations register themselves from
// cpu/<operator>.cpp and cuda/<operator>.cu; shapes, fake tensors and autograd are added in
// diffad_fast/ops/<family>.py. A new operator adds its line here and its files there.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(diffad_fast, m) {
  m.def("cpu_isa(int level) -> int");  // csrc/cpu/isa.cpp
  m.def("haar_pack(Tensor x, int level) -> Tensor");
  m.def("haar_unpack(Tensor y, int level) -> Tensor");
  m.def(
      "wavelet_attention(Tensor q, Tensor k, Tensor v, Tensor? logit_gain, Tensor? value_gain, "
      "int level, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "wavelet_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? logit_gain, "
      "Tensor? value_gain, Tensor out, Tensor lse, int level, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}
