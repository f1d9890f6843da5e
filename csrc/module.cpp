// diffad_fast._host: what speaks NumPy and plain Python objects, not tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "build_info.h"  // written by setup.py: constexpr char kBuildInfo[], a JSON object
#include "metrics.h"

namespace py = pybind11;

namespace {

py::object build_info() { return py::module_::import("json").attr("loads")(kBuildInfo); }

std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  // __builtin_cpu_supports takes literals only.
  const std::pair<const char*, int> known[] = {
      {"sse4.2", __builtin_cpu_supports("sse4.2")},     {"avx", __builtin_cpu_supports("avx")},
      {"avx2", __builtin_cpu_supports("avx2")},         {"fma", __builtin_cpu_supports("fma")},
      {"avx512f", __builtin_cpu_supports("avx512f")},   {"avx512bw", __builtin_cpu_supports("avx512bw")},
      {"avx512vl", __builtin_cpu_supports("avx512vl")},
      {"avx512vnni", __builtin_cpu_supports("avx512vnni")},
      {"avx512bf16", __builtin_cpu_supports("avx512bf16")},
  };
  for (const auto& [name, here] : known) {
    if (here) found.emplace_back(name);
  }
#elif defined(__aarch64__)
  found.emplace_back("neon");  // a part of the architecture
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build_info", &build_info,
        "What was built: a dict with sources, compiler, flags, torch, cuda, cuda_archs and nvcc.");
  m.def("cpu_features", &cpu_features,
        "Names of the vector instruction sets that this processor has, of those worth knowing.");
  diffad::register_metrics(m);
}
