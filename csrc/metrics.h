// What the metrics do once a pixel; diffad_fast/metrics.py makes curves of it.
#pragma once

#include <pybind11/pybind11.h>

namespace diffad {

// Adds to the module what diffad_fast/reference/metrics.py defines in NumPy, under the same names.
void register_metrics(pybind11::module_& m);

}  // namespace diffad
