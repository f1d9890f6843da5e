// Every operator of the library, one schema a line. The implementations register themselves from
// cpu/<operator>.cpp and cuda/<operator>.cu; shapes, fake tensors and autograd are added in
// diffad_fast/ops/<family>.py. A new operator adds its line here and its files there.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(diffad_fast, m) {
  m.def(
      "anomaly_map(Tensor x, Tensor x_hat, Tensor[] features, Tensor[] features_hat, float[] "
      "weights, int levels, Tensor[] stats, float sigma, float top, Tensor? base=None) -> (Tensor, "
      "Tensor)");
  m.def("band_energies(Tensor x, int cell, int levels) -> Tensor");
  m.def("conv3x3(Tensor x, Tensor packed, Tensor? bias, Tensor? residual) -> Tensor");
  m.def("conv3x3_pack(Tensor weight, bool turned) -> Tensor");
  m.def("conv3x3_weight_gradient(Tensor grad, Tensor x) -> Tensor");
  m.def("cpu_isa(int level) -> int");  // csrc/cpu/isa.cpp
  m.def(
      "ddim_finish(Tensor x_t, Tensor model_output, Tensor? guide, Tensor images, Tensor mean, "
      "Tensor deviation, float alpha_t, int level, int prediction, float guidance, float clip, "
      "bool clamp) -> (Tensor x0, Tensor x_hat, Tensor pixel, Tensor sub_band)");
  // CUDA alone: steps of a captured loop.
  m.def(
      "ddim_loop_step_(Tensor(a!) x_t, Tensor model_output, Tensor? guide, Tensor table, "
      "Tensor(b!) counter, Tensor(c!)? next_input, int seed, int draw, float ratio, float "
      "largest) -> ()");
  m.def(
      "ddim_step(Tensor x_t, Tensor model_output, Tensor? alpha_t, Tensor? alpha_s, Tensor? "
      "noise, Tensor? guide, float number_t, float number_s, int prediction, float eta, float "
      "guidance, float clip, float ratio, float largest, bool recompute_epsilon) -> Tensor");
  m.def(
      "ddim_table(Tensor alphas, int prediction, float eta, float guidance, float clip, bool "
      "recompute_epsilon) -> Tensor");
  m.def(
      "dwt2d(Tensor x, Tensor filters, int border, SymInt rows, SymInt columns) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? scale, Tensor? shift, bool activation) -> (Tensor y, Tensor stats)");
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, Tensor stats, int num_groups, Tensor? "
      "weight, Tensor? bias, Tensor? scale, Tensor? shift, bool activation, int needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("haar_pack(Tensor x, int level) -> Tensor");
  m.def("haar_unpack(Tensor y, int level) -> Tensor");
  m.def(
      "idwt2d(Tensor a, Tensor h, Tensor v, Tensor d, Tensor filters, int border, SymInt "
      "height, SymInt width) -> Tensor");
  m.def("log_mel(Tensor waves, Tensor window, Tensor filters, int hop) -> Tensor");
  m.def("nearest_distances(Tensor x, Tensor sample, int count) -> Tensor");
  m.def(
      "noised_velocity(Tensor x0, Tensor t, Tensor noise, Tensor alphas_cumprod, float snr_limit) "
      "-> (Tensor x_t, Tensor velocity, Tensor weight)");
  m.def(
      "philox_normal_(Tensor(a!) out, int seed, int draw, int step, Tensor? draws, Tensor? "
      "steps) -> ()");
  m.def("q_sample(Tensor x0, Tensor t, Tensor noise, Tensor alphas_cumprod) -> Tensor");
  m.def("standardised_packet(Tensor x, Tensor mean, Tensor deviation, int level) -> Tensor");
  m.def(
      "token_mlp_loop(Tensor x, Tensor W_in, Tensor b_in, Tensor W1, Tensor W2, Tensor b2, "
      "Tensor W_out, Tensor b_out, Tensor step_bias, Tensor table) -> (Tensor, Tensor)");
  m.def("token_mlp_loop_backward(Tensor grad_x, Tensor grad_stats, Tensor[] inputs) -> Tensor[]");
  m.def(
      "token_mlp_loss(Tensor x, Tensor target, Tensor weight, Tensor[] weights, Tensor "
      "step_bias, bool gradients) -> (Tensor, Tensor[])");
  m.def(
      "wavelet_attention(Tensor q, Tensor k, Tensor v, Tensor? logit_gain, Tensor? value_gain, "
      "int level, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "wavelet_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? "
      "logit_gain, Tensor? value_gain, Tensor out, Tensor lse, int level, float scale) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "wavelet_unet(Tensor x, Tensor conditioning, Tensor[] weights, int[] groups, int[] widths, "
      "int blocks, bool features) -> Tensor[]");
  m.def(
      "weighted_mse(Tensor prediction, Tensor target, Tensor weight) -> (Tensor loss, Tensor "
      "errors)");
  m.def(
      "weighted_mse_backward(Tensor grad, Tensor prediction, Tensor target, Tensor weight) -> "
      "Tensor");
}
