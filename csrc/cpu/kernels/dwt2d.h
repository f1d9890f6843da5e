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

// The rows of the transform, as a sparse matrix. Results in [inner_begin, inner_end) are those of
// the bare filters. Every other one has its own taps: those of border result i are
// taps[starts[i] .. starts[i + 1]), where results before the inner ones come first.
struct DwtAxis {
  int64_t inner_begin, inner_end;
  const int64_t* starts;
  const DwtTap* taps;
};

// A sample's share in one beyond the ends of its row: extended[e] = sum of weight x[sample].
struct DwtImage {
  int64_t extended, sample;
  double weight;
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
  DwtAxis y;
  int longest;  // of the lists of taps in y
  const DwtImage* images;  // of the columns, in the order of `extended`
  int64_t image_count;
  int64_t extended_width;  // from column 0 to the last one that a coefficient reaches
  DwtPlane image;
  DwtPlane bands[4];  // cA, cH, cV, cD
};

// Samples come in pairs that begin with those = shift - 1 (mod 2), so perhaps with one before 0.
inline int64_t dwt_before_pairs(const DwtArgs& args) { return (args.shift - 1) & 1; }
inline int64_t dwt_row_pairs(const DwtArgs& args) {
  return (args.height + dwt_before_pairs(args) + 1) / 2;
}

// What the scratch of a thread must hold, in elements of the dtype computed in.
inline int64_t dwt_scratch(const DwtArgs& args) {
  const int64_t coefficients = 2 * args.cols;
  const int64_t longest =
      args.extended_width > coefficients ? args.extended_width : coefficients;
  return (4 * (longest + 64) + 16 * (args.length + 32)) * args.lanes + 1024;
}

// Rows [begin, end) of the bands, counted over (n, c, y), and pairs of rows of the image.
DIFFAD_KERNEL(dwt_analysis, const DwtArgs& args, void* scratch, int64_t begin, int64_t end)
DIFFAD_KERNEL(dwt_synthesis, const DwtArgs& args, void* scratch, int64_t begin, int64_t end)

}  // namespace diffad
