// Analysis and synthesis of planes by a pair of filters; see ../dwt2d.cpp for the equations.
#pragma once

#include "../../common/haar.h"
#include "dtype.h"
#include "isa.h"

namespace diffad {

struct DwtTap {
  int64_t source;
  double low, high;
};

// One axis of the transform, as a sparse matrix. Results in [inner_begin, inner_end) are those of
// the bare filters. Every other one has its own taps: those of border result i are
// taps[starts[i] .. starts[i + 1]), where results before the inner ones come first.
struct DwtAxis {
  int64_t inner_begin, inner_end;
  const int64_t* starts;
  const DwtTap* taps;
};

struct DwtPlane {
  void* data;
  int64_t n, c, y;  // strides; rows have no gaps
};

// Planes of `lanes` channels that lie next to each other: all of an image in channels_last, one
// otherwise, of which an image has `channels`.
struct DwtArgs {
  DType dtype;
  int length;     // of the filters
  int64_t shift;  // coefficient o of sample i has tap 2 o + shift - i
  const double *low, *high;
  int64_t channels, lanes, height, width, rows, cols;
  DwtAxis y, x;
  DwtPlane image;
  DwtPlane bands[4];  // cA, cH, cV, cD
};

// What the scratch of a thread must hold, in elements of the dtype computed in.
inline int64_t dwt_scratch(const DwtArgs& args) {
  const int64_t longest = args.width > args.cols ? args.width : args.cols;
  return (3 * longest + 2) * args.lanes + 256;
}

// Rows [begin, end) of the results, counted over (n, c, y): of the bands, and of the image.
DIFFAD_KERNEL(dwt_analysis, const DwtArgs& args, void* scratch, int64_t begin, int64_t end)
DIFFAD_KERNEL(dwt_synthesis, const DwtArgs& args, void* scratch, int64_t begin, int64_t end)

}  // namespace diffad
