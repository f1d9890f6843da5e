// haar_pack and haar_unpack on the CPU. See common/haar.h for the maths.
//
// The image is cut into tiles: R rows by a run of blocks, of all channels where they lie together
// (channels_last), of one channel otherwise. Packing transforms the R rows of a tile down the
// columns into a scratch buffer that stays in the cache, then every row of the scratch along x,
// straight into the bands. Unpacking runs the same two passes backwards. Memory is read once and
// written once for any number of levels; a tile depends on no other, so neither the number of
// threads nor the split between them changes a bit.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "../common/haar_tensor.h"
#include "convert.h"
#include "vectorize.h"

namespace diffad {
namespace {

// Elements of a tile: 32 KiB of float, which with the rows of the image fits a small L2.
constexpr int64_t kTile = 8192;
// Fewer elements than this are not worth a thread.
constexpr int64_t kGrain = 32768;

// Transforms `n` columns of R rows: rows of `in` and `out` lie `in_pitch` and `out_pitch` apart.
// Applies the whole normalisation, for both directions.
template <int R, class In, class Out>
DIFFAD_INLINE void along_y(const In* __restrict in, int64_t in_pitch, Out* __restrict out,
                           int64_t out_pitch, int64_t n) {
  using acc = acc_t<In>;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    acc v[R];
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) v[k] = convert<acc>(in[k * in_pitch + i]);
    walsh(v);
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) out[k * out_pitch + i] = convert<Out>(v[k] * (acc(1) / R));
  }
}

// Transforms `n` groups of R values along x. Sample k of group i is row[i * group + k * sample];
// coefficient k of group i is bands[i * step + 2 spread(k) * band].
template <int R, bool kPack, class Row, class Bands>
DIFFAD_INLINE void along_x(Row* __restrict row, int64_t group, int64_t sample,
                           Bands* __restrict bands, int64_t step, int64_t band, int64_t n) {
  using acc = acc_t<std::remove_const_t<Row>>;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    acc v[R];
    if constexpr (kPack) {
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) v[k] = row[i * group + k * sample];
      walsh(v);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        bands[i * step + 2 * spread(k) * band] = convert<Bands>(v[k]);
      }
    } else {
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        v[k] = convert<acc>(bands[i * step + 2 * spread(k) * band]);
      }
      walsh(v);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) row[i * group + k * sample] = v[k];
    }
  }
}

// along_x for one row of a tile of `blocks` blocks, with loops that suit the layout.
template <int R, bool kPack, class Row, class Bands>
DIFFAD_INLINE void row_along_x(Row* row, Bands* bands, const HaarGeometry& g, int64_t blocks) {
  const int64_t band = g.channels * g.packed.c;
  if (!g.channels_last) {
    along_x<R, kPack>(row, R, 1, bands, 1, band, blocks);
  } else if (g.channels < 8) {  // too few channels for a vector: run over the blocks instead
    for (int64_t c = 0; c < g.channels; ++c) {
      along_x<R, kPack>(row + c, R * g.channels, g.channels, bands + c, g.packed.x, band, blocks);
    }
  } else {
    for (int64_t b = 0; b < blocks; ++b) {
      along_x<R, kPack>(row + b * R * g.channels, 1, g.channels, bands + b * g.packed.x, 1, band,
                        g.channels);
    }
  }
}

template <class scalar_t, int R, bool kPack>
struct HaarTiles {
  using Image = std::conditional_t<kPack, const scalar_t, scalar_t>;
  using Packed = std::conditional_t<kPack, scalar_t, const scalar_t>;

  // Tiles [begin, end) of `tile_blocks` blocks each (fewer at the end of a row).
  static DIFFAD_INLINE void run(HaarGeometry g, Image* image, Packed* packed, int64_t tile_blocks,
                                acc_t<scalar_t>* scratch, int64_t begin, int64_t end) {
    const int64_t lanes = g.channels_last ? g.channels : 1;
    const int64_t planes = g.channels_last ? 1 : g.channels;
    const int64_t tiles = (g.cols + tile_blocks - 1) / tile_blocks;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t x = i % tiles * tile_blocks;
      const int64_t y = i / tiles % g.rows;
      const int64_t c = i / tiles / g.rows % planes;
      const int64_t n = i / tiles / g.rows / planes;
      const int64_t blocks = std::min(tile_blocks, g.cols - x);
      const int64_t width = blocks * R * lanes;
      Image* rows = image + n * g.image.n + c * g.image.c + y * R * g.image.y + x * R * g.image.x;
      Packed* bands = packed + n * g.packed.n + c * g.packed.c + y * g.packed.y + x * g.packed.x;
      if constexpr (kPack) along_y<R>(rows, g.image.y, scratch, width, width);
      for (int v = 0; v < R; ++v) {
        row_along_x<R, kPack>(scratch + v * width, bands + spread(v) * g.channels * g.packed.c, g,
                              blocks);
      }
      if constexpr (!kPack) along_y<R>(scratch, width, rows, g.image.y, width);
    }
  }
};

template <class scalar_t, int R, bool kPack>
void haar_parallel(const HaarGeometry& g, const Tensor& in, const Tensor& out) {
  using Tiles = HaarTiles<scalar_t, R, kPack>;
  const int64_t lanes = g.channels_last ? g.channels : 1;
  const int64_t planes = g.channels_last ? 1 : g.channels;
  const int64_t block = R * R * lanes;
  const int64_t tile_blocks = std::clamp<int64_t>(kTile / block, 1, g.cols);
  const int64_t tiles = g.batch * planes * g.rows * ((g.cols + tile_blocks - 1) / tile_blocks);
  const auto* source = static_cast<const scalar_t*>(in.const_data_ptr());
  auto* target = static_cast<scalar_t*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, kGrain / (block * tile_blocks));
  torch::stable::parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<acc_t<scalar_t>[]> scratch(new acc_t<scalar_t>[block * tile_blocks]);
    if constexpr (kPack) {
      vectorized<Tiles>(g, source, target, tile_blocks, scratch.get(), begin, end);
    } else {
      vectorized<Tiles>(g, target, source, tile_blocks, scratch.get(), begin, end);
    }
  });
}

// The loops want rows without gaps between neighbours: columns next to each other, or in
// channels_last pixels next to each other. Anything else (an expanded gradient, a transposed
// image, a slice of channels) is copied first; slices along N, H and W are not.
Tensor with_dense_rows(const Tensor& x) {
  using torch::headeronly::MemoryFormat;
  if (is_channels_last(x)) {
    return x.stride(3) == x.size(1) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
  }
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x, MemoryFormat::Contiguous);
}

template <bool kPack>
Tensor haar(const Tensor& x, int64_t level) {
  const Tensor out = haar_output(x, level, kPack);
  if (out.numel() == 0) return out;
  const Tensor in = with_dense_rows(x);
  const HaarGeometry g = haar_geometry(kPack ? in : out, kPack ? out : in, is_channels_last(x));
  for_floating_dtype(x, "haar", [&](auto zero) {
    using scalar_t = decltype(zero);
    switch (level) {
      case 1: return haar_parallel<scalar_t, 2, kPack>(g, in, out);
      case 2: return haar_parallel<scalar_t, 4, kPack>(g, in, out);
      case 3: return haar_parallel<scalar_t, 8, kPack>(g, in, out);
      default: return haar_parallel<scalar_t, 16, kPack>(g, in, out);
    }
  });
  return out;
}

Tensor haar_pack(const Tensor& x, int64_t level) { return haar<true>(x, level); }
Tensor haar_unpack(const Tensor& y, int64_t level) { return haar<false>(y, level); }

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("haar_pack", TORCH_BOX(&haar_pack));
  m.impl("haar_unpack", TORCH_BOX(&haar_unpack));
}

}  // namespace
}  // namespace diffad
