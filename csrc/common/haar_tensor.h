// Haar packets: argument checks and output, the same on every device.
#pragma once

#include "haar.h"
#include "tensor.h"

namespace diffad {

inline Strides strides_of(const Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
}

// Allocates the result of packing (`pack`) or unpacking `in`; it is channels_last where `in` is.
inline Tensor haar_output(const Tensor& in, int64_t level, bool pack) {
  STD_TORCH_CHECK(in.dim() == 4, "haar: expected a tensor (N, C, H, W), got ", in.dim(), " axes");
  STD_TORCH_CHECK(1 <= level && level <= kHaarMaxLevel, "haar: level must be 1 to ", kHaarMaxLevel,
                  ", got ", level);
  const int64_t r = int64_t{1} << level;
  const int64_t n = in.size(0), c = in.size(1), h = in.size(2), w = in.size(3);
  const bool last = is_channels_last(in);
  if (pack) {
    STD_TORCH_CHECK(h % r == 0 && w % r == 0, "haar_pack: ", h, " x ", w,
                    " does not divide by ", r);
    return empty_4d(in, {n, c * r * r, h / r, w / r}, last);
  }
  STD_TORCH_CHECK(c % (r * r) == 0, "haar_unpack: ", c, " channels do not divide by ", r * r);
  return empty_4d(in, {n, c / (r * r), h * r, w * r}, last);
}

inline HaarGeometry haar_geometry(const Tensor& image, const Tensor& packed, bool channels_last) {
  return {image.size(0),     image.size(1),      packed.size(2), packed.size(3),
          strides_of(image), strides_of(packed), channels_last};
}

}  // namespace diffad
