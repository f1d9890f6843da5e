// The anomaly map; diffad_fast/reference/maps.py defines it. Four stages, each over a group of
// samples that fits in the cache:
//   feature_rows      cosine distances at the resolution of the features, their rows widened to W;
//   anomaly_rows      everything else, added and smoothed along x, to `rows`;
//   anomaly_columns   smoothed along y, to `map`;
//   anomaly_scores    mean of the largest values.
// A stands for the type they compute in: double where the dtype is double, otherwise float.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "isa.h"

namespace diffad {

// Strides in elements, by axis: sample, channel, y, x.
struct Samples {
  const void* data;
  int64_t stride[4];
};

// Features of one scale. Both tensors have columns next to each other, or both have channels.
struct FeatureScale {
  DType dtype;
  Samples f, f_hat;
  int64_t channels, height, width;
  int64_t block;         // rows at a time
  const int32_t* left;   // [W] column left of each pixel's centre, at most width - 1
  const void* share;     // A[W] weight of the column right of it
  const int32_t* above;  // [H] the same along y
  const void* share_y;
  void* rows;  // A[samples][height][pitch], at [0] the group's first sample
  int64_t first, pitch, map_width;
};

// Entry 0 the mean, 1 the deviation: A (H, W), stride along x 0 or 1; null without statistics.
struct Statistics {
  const void* data[2];
  int64_t stride_y[2], stride_x[2];
};

struct AnomalyMapArgs {
  DType dtype;
  Samples x, x_hat;
  int64_t channels, height, width, pitch;  // pitch: the width, up to a multiple of 16
  int levels;
  double weight[3];  // pixel, feature and sub-band map; 0 leaves one out
  Statistics stats[3];
  const void* base;  // A[all samples][height][width] to which the maps are added, or null
  const FeatureScale* features;
  int64_t feature_count;
  int64_t radius;
  const void* kernel;  // A[radius + 1], from the middle outwards
  int64_t first;       // the group's first sample
  void* rows;          // A[samples of the group][height][pitch]
  void* map;           // A[all samples][height][width]
  int64_t top;         // values in the mean
  void* score;         // A[all samples]
};

// Elements of type A that anomaly_rows needs as scratch.
inline int64_t anomaly_scratch(const AnomalyMapArgs& a) {
  const int64_t strip = int64_t{1} << a.levels;
  return (2 + 3 * strip) * a.pitch + 2 * a.pitch + 2 * a.radius + 128;
}

// Items are blocks of rows, of all samples of the group. Scratch: A[(block + 1) * width + 1].
DIFFAD_KERNEL(feature_rows, const FeatureScale&, void* scratch, int64_t begin, int64_t end)
// Items are strips of 2^levels rows.
DIFFAD_KERNEL(anomaly_rows, const AnomalyMapArgs&, void* scratch, int64_t begin, int64_t end)
// The pixel and the sub-band map of the same strips, as they are, to planes A[height][width] of all
// samples: of the arguments what names inputs and sizes counts, with weights that are not 0.
DIFFAD_KERNEL(residual_rows, const AnomalyMapArgs&, void* pixel, void* sub_band, void* scratch,
              int64_t begin, int64_t end)
// Items are rows.
DIFFAD_KERNEL(anomaly_columns, const AnomalyMapArgs&, int64_t begin, int64_t end)
// Items are samples.
DIFFAD_KERNEL(anomaly_scores, const AnomalyMapArgs&, int64_t begin, int64_t end)

}  // namespace diffad
