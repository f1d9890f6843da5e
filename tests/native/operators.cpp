// Calls every operator of the library that has a kernel for the CPU through PyTorch's dispatcher:
// in each instruction set that the machine has, in every dtype, with odd sizes, both layouts and
// all options. Built with AddressSanitizer (tests/asan.sh), where every tensor lies between
// forbidden bytes. Checks that outputs are finite, the same with one thread and with two, that
// operators which are inverse or adjoint to each other agree, and that a wrong argument in the place
// of any tensor does no more than throw. An operator without a case here is an error.
//
// Usage: operators LIBRARY
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

using at::Tensor;
using c10::IValue;
using Values = std::vector<IValue>;
using Tensors = std::vector<Tensor>;

namespace {

const IValue kNone;
at::ScalarType dtype = at::kFloat;
int failures = 0;

void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

at::ScalarType wide() { return dtype == at::kDouble ? at::kDouble : at::kFloat; }
Tensor random(at::IntArrayRef shape) { return at::randn(shape, at::kDouble).to(dtype); }
Tensor random_wide(at::IntArrayRef shape) { return at::randn(shape, at::kDouble).to(wide()); }
Tensor last(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }
IValue list(const Tensors& tensors) { return c10::List<Tensor>(tensors); }

void collect(const IValue& value, Tensors& found) {
  if (value.isTensor()) {
    found.push_back(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& x : value.toTensorVector()) found.push_back(x);
  }
}

Tensors raw(const std::string& name, Values stack) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(
      ("diffad_fast::" + name).c_str(), "");
  // What lies between takes the tensors out of a list: it gets one of its own.
  for (IValue& value : stack) {
    if (value.isTensorList()) value = list(value.toTensorVector());
  }
  op.schema().checkAndNormalizeInputs(stack);  // nobody counts the arguments later on
  op.callBoxed(&stack);
  Tensors found;
  for (const IValue& value : stack) collect(value, found);
  return found;
}

// With wrong tensors, one after the other: may throw, and nothing else.
void spoil(const std::string& name, const Values& arguments) {
  const Tensors wrong = {at::empty({0}), at::ones({2, 3, 1, 2, 5}), at::ones({1, 1, 3, 3}, at::kLong),
                         at::ones({}, at::kDouble)};
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (!arguments[i].isTensor() && !arguments[i].isTensorList()) continue;
    for (const Tensor& x : wrong) {
      Values changed = arguments;
      if (arguments[i].isTensor()) {
        changed[i] = x;
      } else {
        Tensors items = arguments[i].toTensorVector();
        if (!items.empty()) items.back() = x;
        changed[i] = list(items);
      }
      try {
        raw(name, changed);
      } catch (const std::exception&) {
      }
    }
  }
}

// The operator with these arguments; its results are examined.
Tensors call(const std::string& name, const Values& arguments) {
  at::set_num_threads(1);
  const Tensors one = raw(name, arguments);
  at::set_num_threads(2);
  const Tensors two = raw(name, arguments);
  for (size_t i = 0; i < one.size(); ++i) {
    if (!at::isfinite(one[i]).all().item<bool>()) fail(name + ": not finite");
    if (!at::equal(one[i], two[i])) fail(name + ": another result with two threads");
  }
  spoil(name, arguments);
  return one;
}

void expect(const Tensor& a, const Tensor& b, double tolerance, const std::string& what) {
  if (!at::allclose(a.to(at::kDouble), b.to(at::kDouble), tolerance, tolerance)) fail(what);
}

double rounding() {
  return dtype == at::kDouble ? 1e-12 : dtype == at::kFloat ? 1e-5 : dtype == at::kHalf ? 5e-3 : 4e-2;
}

void haar() {
  for (int64_t level = 1; level <= 4; ++level) {
    for (const auto& [channels, rows, columns] :
         std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {1, 2, 19}, {3, 3, 17}, {9, 2, 5}}) {
      const Tensor x = random({2, channels, rows << level, columns << level});
      // One channel has the bytes of both layouts, and the strides of the other by hand alone.
      const int64_t width = columns << level, size = (rows << level) * width;
      const Tensor turned =
          channels == 1 ? x.as_strided(x.sizes(), {size, 1, width, 1}) : last(x);
      for (const Tensor& image : {x, turned, x.transpose(2, 3), x.slice(3, 0, 1 << level)}) {
        const Tensor y = call("haar_pack", {image, level})[0];
        expect(call("haar_unpack", {y, level})[0], image, rounding(), "haar_unpack: not inverse");
      }
      if (channels == 9) continue;
      const Tensor mean = random_wide({channels << 2 * level}), deviation = mean.abs() + 0.5;
      const Tensor y = call("standardised_packet", {turned, mean, deviation, level})[0];
      const auto by_channel = [&](const Tensor& t) { return t.unsqueeze(1).unsqueeze(2); };
      const Tensor packet = y.to(wide()) * by_channel(deviation) + by_channel(mean);
      expect(call("haar_pack", {turned, level})[0], packet, 10 * rounding(),
             "standardised_packet: not haar_pack");
    }
  }
}

void dwt() {
  constexpr int64_t periodization = 5, reflect = 6, antireflect = 8, borders = 10;
  for (const int64_t length : {2, 4, 6, 8, 5, 18}) {
    const Tensor filters = at::randn({2, length}, at::kDouble) / length;
    for (int64_t border = 0; border < borders; ++border) {
      for (const auto& [h, w] :
           std::vector<std::array<int64_t, 2>>{{12, 10}, {7, 70}, {2, 3}, {1, 1}, {23, 5}}) {
        if (h == 1 && (border == reflect || border == antireflect)) continue;
        const bool halves = border == periodization || border == borders - 1;
        const int64_t rows = halves ? (h + 1) / 2 : (h + length - 1) / 2;
        const int64_t columns = halves ? (w + 1) / 2 : (w + length - 1) / 2;
        const Tensor x = random({1, 3, h, w});
        for (const Tensor& image : {x, last(x)}) {
          Tensors bands = call("dwt2d", {image, filters, border, rows, columns});
          const Tensor back = call("idwt2d", {bands[0], bands[1], bands[2], bands[3], filters,
                                              border, h, w})[0];
          // The two are adjoint: <M x, M x> = <x, M^T M x>.
          double left = 0;
          for (const Tensor& b : bands) left += b.to(at::kDouble).square().sum().item<double>();
          const double right = (image.to(at::kDouble) * back.to(at::kDouble)).sum().item<double>();
          if (!(std::abs(left - right) <= 10 * rounding() * (left + 1))) fail("idwt2d: not adjoint");
        }
      }
    }
  }
}

void norm() {
  for (const auto& [channels, groups] : std::vector<std::array<int64_t, 2>>{{12, 3}, {5, 5}, {40, 1}}) {
    const Tensor weight = random({channels}), bias = random({channels});
    const Tensor scale = random({2, channels}), shift = random({2, channels});
    const Tensor plain = random({2, channels, 5, 7});
    for (const Tensor& x : {plain, last(plain)}) {
      for (const bool activation : {false, true}) {
        for (const bool all : {false, true}) {
          const auto given = [&](const Tensor& t) { return all ? IValue(t) : kNone; };
          const Tensors y = call("group_norm_silu", {x, groups, given(weight), given(bias), 1e-5,
                                                     given(scale), given(shift), activation});
          call("group_norm_silu_backward",
               {y[0], x, y[1], groups, given(weight), given(bias), given(scale), given(shift),
                activation, int64_t{all ? 31 : 1}});
        }
      }
    }
  }
}

void attention() {
  for (const int64_t level : {1, 2}) {
    for (const int64_t d : {1, 5, 16, 32}) {
      const auto make = [&] { return random({1, 2, 8, 12, d}); };
      const Tensor q = make(), k = make(), v = make();
      for (const bool gains : {false, true}) {
        const auto gain = [&] {
          return gains ? IValue(at::rand({2, 1 + 3 * level}, wide())) : kNone;
        };
        const IValue logit = gain(), value = gain();
        const Tensors out = call("wavelet_attention", {q, k, v, logit, value, level, 0.2});
        call("wavelet_attention_backward",
             {v, q, k, v, logit, value, out[0], out[1], level, 0.2});
      }
    }
  }
}

void diffusion() {
  const double inf = std::numeric_limits<double>::infinity();
  const Tensor table = at::linspace(0.999, 0.001, 50, wide());
  for (const int64_t columns : {1, 7, 301}) {
    const Tensor plain = random({3, 2, 4, columns});
    for (const Tensor& x : {plain, last(plain), plain.transpose(2, 3)}) {
      const Tensor noise = random(x.sizes());
      call("q_sample", {x, at::tensor({0, 49, -1}, at::kLong), noise, table});
      call("noised_velocity", {x, at::tensor({0, 49, -1}, at::kLong), noise, table, 5.0});
      for (int64_t prediction = 0; prediction < 3; ++prediction) {
        for (const double eta : {0.0, 0.5}) {
          for (const bool own : {false, true}) {
            const IValue t = own ? IValue(at::tensor({0.2, 0.5, 0.7}, wide())) : kNone;
            const IValue s = own ? IValue(at::tensor({0.3, 0.6, 0.9}, wide())) : kNone;
            const double ratio = own ? 0.9 : -1.0;
            call("ddim_step", {x, noise, t, s, eta > 0 ? IValue(noise) : kNone,
                               own ? IValue(x) : kNone, 0.4, 0.6, prediction, eta,
                               own ? 0.3 : 0.0, own ? inf : 1.0, ratio, 3.0, own});
          }
        }
      }
    }
  }
  for (const auto& [samples, size] :
       std::vector<std::array<int64_t, 2>>{{1, 1}, {3, 67}, {2, 9001}}) {
    const Tensor x = random({samples, size}), y = random({samples, size}), w = at::rand({samples});
    for (const Tensor& target : {y, random_wide({samples, size})}) {
      call("weighted_mse", {x, target, w});
      call("weighted_mse_backward", {at::ones({}), x, target, w});
    }
  }
  call("ddim_table", {at::rand({4, 2}, at::kDouble) * 0.5 + 0.1, int64_t{2}, 0.0, 0.5, 1.0, true});
}

void finish() {
  if (dtype != at::kFloat && dtype != at::kDouble) return;
  for (int64_t level = 0; level <= 4; ++level) {
    for (const auto& [channels, rows, columns] :
         std::vector<std::array<int64_t, 3>>{{1, 1, 1}, {3, 2, 5}}) {
      const int64_t all = channels << 2 * level;
      const Tensor images = random({2, channels, rows << level, columns << level});
      const Tensor plain = random({2, all, rows, columns});
      for (const Tensor& x : {plain, last(plain)}) {
        for (const IValue& guide : {kNone, IValue(random(x.sizes()))}) {
          call("ddim_finish", {x, random(x.sizes()), guide, images, random({all}),
                               random({all}).abs(), 0.4, level, int64_t{2}, 0.3, 1.0, true});
        }
      }
    }
  }
}

void noise() {
  for (const int64_t size : {1, 5, 1001, 20000}) {
    const Tensor out = at::full({2, size}, NAN), keys = at::tensor({3, 9}, at::kLong);
    for (const IValue& draws : {kNone, IValue(keys)}) {
      raw("philox_normal_", {out, int64_t{1}, int64_t{2}, int64_t{3}, draws, draws});
      if (!at::isfinite(out).all().item<bool>()) fail("philox_normal_: not fully written");
    }
    spoil("philox_normal_", {out, int64_t{1}, int64_t{2}, int64_t{3}, keys, keys});
  }
}

void token_mlp() {
  for (const auto& [m, d, w, b] :
       std::vector<std::array<int64_t, 4>>{{1, 5, 16, 1}, {2, 9, 24, 2}, {37, 33, 32, 2}}) {
    const auto weight = [](at::IntArrayRef shape) { return random(shape) * 0.2; };
    const Tensors weights = {weight({w, d}), weight({w}),    weight({b, w, w}), weight({b, w, w}),
                             weight({b, w}), weight({d, w}), weight({d})};
    Values arguments = {random({m, d})};
    arguments.insert(arguments.end(), weights.begin(), weights.end());
    arguments.push_back(random_wide({3, b, w}));
    arguments.push_back(random_wide({3, 5}) * 0.3);
    call("token_mlp_loop", arguments);
    if (dtype == at::kFloat && w % 16 == 0) {
      for (const int64_t rows : {m, 400 * m}) {  // of each level
        for (const bool gradients : {false, true}) {
          call("token_mlp_loss", {random({3 * rows, d}), random({3 * rows, d}), at::rand({3 * rows}),
                                  list(weights), random({3, b, w}), gradients});
        }
      }
    }
  }
}

void maps() {
  for (const auto& [h, w, levels] :
       std::vector<std::array<int64_t, 3>>{{16, 24, 3}, {7, 5, 0}, {1, 33, 0}, {64, 8, 2}}) {
    const Tensor plain = random({2, 3, h, w});
    for (const Tensor& x : {plain, last(plain)}) {
      const Tensors f = {random({2, 5, 4, 3}), random({2, 1, 1, 1}), last(random({2, 17, 9, 9}))};
      const Tensors g = {random({2, 5, 4, 3}), random({2, 1, 1, 1}), last(random({2, 17, 9, 9}))};
      Tensors stats;
      for (int i = 0; i < 3; ++i) {
        stats.push_back(random_wide({h, w}));
        stats.push_back(at::full({}, 2.0, wide()).expand({h, w}));
      }
      for (const double sigma : {0.0, 1.5, 9.0}) {
        const c10::List<double> weights({1.0, 0.5, 2.0});
        for (const IValue& base : {kNone, IValue(random_wide({2, h, w}))}) {
          call("anomaly_map", {x, random(x.sizes()), list(f), list(g), weights, levels,
                               list(stats), sigma, 0.03, base});
        }
      }
    }
  }
}

void energies() {
  for (const auto& [h, w, cell, levels] : std::vector<std::array<int64_t, 4>>{
           {2, 2, 1, 1}, {33, 35, 1, 5}, {24, 36, 12, 3}, {300, 10, 10, 1}, {14, 49, 7, 4}}) {
    const Tensor x = random({2, 3, h, w});
    for (const Tensor& image : {x, last(x), x.slice(1, 1, 2)}) {
      const Tensor found = call("band_energies", {image, cell, levels})[0];
      const Tensor means = at::avg_pool2d(image.to(wide()), {cell, cell});
      expect(found.slice(1, -image.size(1)), means, rounding(), "band_energies: wrong means");
    }
  }
}

void spectrograms() {
  for (const auto& [clips, n_fft, hop, samples] : std::vector<std::array<int64_t, 4>>{
           {1, 16, 5, 16}, {3, 64, 64, 333}, {2, 512, 100, 4000}, {1, 2048, 300, 5000}}) {
    const Tensor all = random({clips, 2 * samples}), window = at::randn({n_fft}, at::kDouble);
    const Tensor filters = at::rand({5, n_fft / 2 + 1}, at::kDouble);
    for (const Tensor& waves : {all.slice(1, 0, samples), all.slice(1, 0, 2 * samples, 2)}) {
      const Tensor bins = at::eye(n_fft / 2 + 1, at::kDouble);
      const Tensor found = call("log_mel", {waves, window, bins, hop})[0];
      call("log_mel", {waves, window, filters, hop});
      // Parseval: each bin but the first and the last stands for two.
      const Tensor frames = waves.to(at::kDouble).unfold(1, n_fft, hop) * window;
      const Tensor power = at::pow(10, found.to(at::kDouble) / 10);
      const Tensor energy = 2 * power.sum(1) - power.select(1, 0) - power.select(1, n_fft / 2);
      expect(energy / n_fft, frames.square().sum(2), rounding(), "log_mel: energy is lost");
    }
  }
}

void neighbours() {
  for (const auto& [rows, size, samples, count] : std::vector<std::array<int64_t, 4>>{
           {1, 1, 1, 1}, {50, 17, 33, 5}, {13, 40, 7, 7}, {97, 3, 200, 64}}) {
    const Tensor x = random({rows, 2 * size}), sample = random({samples, size});
    for (const Tensor& some : {x.slice(1, 0, size), x.slice(1, 0, 2 * size, 2)}) {
      const Tensor found = call("nearest_distances", {some, sample, count})[0];
      const Tensor all = (some.to(at::kDouble).unsqueeze(1) - sample.to(at::kDouble)).norm(2, 2);
      const Tensor expected = std::get<0>(all.sort(1)).slice(1, 0, count);
      expect(found, expected, 1e-12, "nearest_distances: wrong");
    }
  }
}

void convolution() {
  if (dtype != at::kFloat) return;  // it is written for that alone
  for (const auto& [n, inputs, outputs, height, width] : std::vector<std::array<int64_t, 5>>{
           {1, 16, 48, 8, 8}, {3, 32, 16, 13, 9}, {2, 48, 80, 4, 21}, {1, 16, 16, 1, 1}}) {
    const Tensor x = random({n, inputs, height, width}), bias = random({outputs});
    const Tensor weight = random({outputs, inputs, 3, 3}) / std::sqrt(9.0 * inputs);
    const Tensor grad = random({n, outputs, height, width});
    const Tensor packed = call("conv3x3_pack", {weight, false})[0];
    const Tensor turned = call("conv3x3_pack", {last(weight), true})[0];
    const Tensor wider = last(random({n, inputs + 5, height, width}));
    for (const Tensor& image : {x, last(x), wider.slice(1, 3, 3 + inputs)}) {
      const Tensor y = call("conv3x3", {image, packed, bias, grad})[0];
      expect(y, at::conv2d(image, weight, bias, 1, 1) + grad, rounding(), "conv3x3: wrong");
      call("conv3x3", {image, packed, kNone, kNone});
      const auto [dx, dweight, dbias] = at::convolution_backward(
          grad, image, weight, {}, {1, 1}, {1, 1}, {1, 1}, false, {0, 0}, 1, {true, true, false});
      const Tensor found = call("conv3x3_weight_gradient", {grad, image})[0];
      expect(found, dweight, 1e-4, "conv3x3_weight_gradient: wrong");
      expect(call("conv3x3", {last(grad), turned, kNone, kNone})[0], dx, rounding(),
             "conv3x3: wrong gradient of the input");
    }
  }
}

void unet() {
  if (dtype != at::kFloat) return;
  const int64_t blocks = 2, inputs = 16, n = 2, heads = 2;
  const std::vector<int64_t> widths = {16, 32};
  Tensors weights;
  std::vector<int64_t> groups;
  int64_t numbers = 0;
  const auto conv = [&](int64_t in, int64_t out) {
    const Tensor weight = random({out, in, 3, 3}) / std::sqrt(9.0 * in);
    for (const Tensor& x : {call("conv3x3_pack", {weight, false})[0], random({out})}) {
      weights.push_back(x);
    }
  };
  const auto linear = [&](int64_t in, int64_t out) {
    weights.push_back(random({out, in}) / std::sqrt(1.0 * in));
    weights.push_back(random({out}));
  };
  const auto norm = [&](int64_t channels) {
    weights.push_back(random({channels}));
    weights.push_back(random({channels}));
    groups.push_back(channels / 16);
  };
  const auto stage = [&](int64_t in, int64_t width, bool attends) {
    norm(in), conv(in, width);
    if (in != width) linear(in, width);
    norm(width), conv(width, width);
    numbers += 2 * width;
    if (!attends) return;
    norm(width), linear(width, 3 * width);
    for (int i = 0; i < 2; ++i) weights.push_back(random({heads, 4}));
    linear(width, width);
  };
  conv(inputs, 16);
  stage(16, 16, false), stage(16, 16, false), linear(64, 16);
  stage(16, 32, true), stage(32, 32, true);
  stage(32, 32, true);
  stage(64, 32, true), stage(64, 32, true), linear(32, 128);
  stage(48, 16, false), stage(32, 16, false);
  norm(16), conv(16, inputs);
  const Tensor x = last(random({n, inputs, 12, 20})), conditioning = random({n, numbers});
  for (const bool features : {false, true}) {
    const Tensors found =
        call("wavelet_unet", {x, conditioning, list(weights), groups, widths, blocks, features});
    const std::vector<int64_t> expected = {n, features ? 16 : inputs, 12, 20};
    if (found[0].sizes() != expected || found.size() != (features ? 2 : 1)) fail("wavelet_unet: wrong shape");
  }
  for (const size_t wrong : {size_t{0}, size_t{13}, size_t{21}, weights.size() - 4}) {
    Tensors fewer = weights;
    fewer[wrong] = at::ones({1});
    try {
      raw("wavelet_unet", {x, conditioning, list(fewer), groups, widths, blocks, false});
      fail("wavelet_unet takes wrong weights");
    } catch (const std::exception&) {
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || !dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::printf("usage: operators LIBRARY (%s)\n", argc == 2 ? dlerror() : "no library given");
    return 2;
  }
  at::manual_seed(0);
  const std::map<std::string, std::function<void()>> cases = {
      {"haar_pack haar_unpack standardised_packet", haar},
      {"dwt2d idwt2d", dwt},
      {"group_norm_silu group_norm_silu_backward", norm},
      {"wavelet_attention wavelet_attention_backward", attention},
      {"q_sample noised_velocity ddim_step ddim_table weighted_mse weighted_mse_backward", diffusion},
      {"ddim_finish", finish},
      {"philox_normal_", noise},
      {"token_mlp_loop token_mlp_loss", token_mlp},
      {"anomaly_map", maps},
      {"band_energies", energies},
      {"log_mel", spectrograms},
      {"nearest_distances", neighbours},
      {"conv3x3 conv3x3_pack conv3x3_weight_gradient", convolution},
      {"wavelet_unet", unet},
  };
  std::string covered = " cpu_isa ";
  for (const auto& [names, run] : cases) covered += names + " ";
  for (const c10::OperatorName& op : c10::Dispatcher::singleton().getAllOpNames()) {
    if (op.name.rfind("diffad_fast::", 0) != 0) continue;
    const auto handle = c10::Dispatcher::singleton().findOp(op);
    const std::string name = op.name.substr(13);
    if (handle && handle->hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
        covered.find(" " + name + " ") == std::string::npos) {
      fail(name + " has no case in tests/native/operators.cpp");
    }
  }
  for (int64_t isa = 0; isa < 5; ++isa) {
    auto choose = c10::Dispatcher::singleton().findSchemaOrThrow("diffad_fast::cpu_isa", "");
    torch::jit::Stack stack = {isa};
    try {
      choose.callBoxed(&stack);
    } catch (const std::exception&) {
      std::printf("instruction set %d is not on this machine\n", static_cast<int>(isa));
      continue;
    }
    for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
      dtype = type;
      for (const auto& [names, run] : cases) {
        try {
          run();
        } catch (const std::exception& error) {
          fail(names + ": " + error.what());
        }
      }
    }
  }
  if (!failures) std::printf("operators: all passed\n");
  return failures ? 1 : 0;
}
