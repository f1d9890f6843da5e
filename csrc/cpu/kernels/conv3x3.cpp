// conv3x3: Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016, arXiv 1509.09308).
//
// The outputs of 4x4 neighbouring pixels are the product of two polynomials, up to transposition,
// and the product of polynomials is known from its values at enough points:
//   Y = A^T ((G g G^T) . (B^T d B)) A,
// with d the window of 6x6 pixels, g the filter of 3x3 and . the product number by number: 36
// multiplications in place of 144. Summed over input channels, each of the 36 points is a matrix
// product (tiles, inputs) x (inputs, outputs), in which the time goes; G g G^T is packed once.
//
// The six points of each axis are 0, a, -a, b, -b and infinity. With m(x) = x (x^2-a^2) (x^2-b^2)
// and N_p = m'(p) the rows of the matrices are, for a finite point p,
//   B^T: the coefficients of m(x) / (x - p),   G: (1, p, p^2) / N_p,   A^T, a column: (1, p, p^2, p^3),
// and for infinity the coefficients of m(x), (0, 0, 1) and (0, 0, 0, 1). The usual choice a = 1,
// b = 2 makes all numbers short but of sizes from 1/24 to 8, and errors grow with the spread
// (Barabasz et al. 2020, arXiv 1803.10986). a = 1/sqrt(2), b = sqrt(2) are reciprocal, so that no
// point's powers stand out: the error is a fourth of the usual one's, and 1.5 to 2 times that of
// the direct sum.
//
// The gradient for x is the same convolution with the filters turned by half a turn, inputs and
// outputs swapped. That for the weights follows from the transposes of the three maps:
//   dg = G^T (sum over tiles of (B^T d B) . (A dY A^T)) G.
//
// An output is one chain of fma over the inputs in their order, whatever tiles are computed beside
// it: the bits do not depend on threads, nor on the rest of the batch.
#include "conv3x3.h"

#include <cstring>

#include "gemm.h"

namespace diffad::DIFFAD_ISA {
namespace {

using V = Vec<float>;
constexpr int L = kLanes<float>;
constexpr int64_t kBlock = kChannelBlock;
static_assert(kBlock % L == 0);

// a, its square and cube; likewise b. a b = 1, a^2 + b^2 = 5/2.
constexpr float kA = 0.70710678118654752f, kA2 = 0.5f, kA3 = 0.35355339059327376f;
constexpr float kB = 1.41421356237309505f, kB2 = 2.0f, kB3 = 2.82842712474619010f;
constexpr float kSquares = 2.5f;
// 1 / N_p for +-a and +-b: 2 a^2 (a^2-b^2) = -3/2, 2 b^2 (b^2-a^2) = 6. N_0 = a^2 b^2 = 1.
constexpr float kGa = -1.0f / 1.5f, kGb = 1.0f / 6.0f;

DIFFAD_SIMD V fma(float a, V b, V c) { return DIFFAD_ISA::fma(splat(a), b, c); }

// What a transform does along one axis.
struct WindowToPoints {  // B^T
  static constexpr int kFrom = 6, kTo = 6;
  static DIFFAD_SIMD void apply(const V (&d)[6], V (&out)[6]) {
    out[0] = fma(-kSquares, d[2], d[0] + d[4]);
    const V even_a = fma(-kB2, d[2], d[4]), odd_a = fma(-kB2, d[1], d[3]);
    out[1] = fma(kA, odd_a, even_a);
    out[2] = fma(-kA, odd_a, even_a);
    const V even_b = fma(-kA2, d[2], d[4]), odd_b = fma(-kA2, d[1], d[3]);
    out[3] = fma(kB, odd_b, even_b);
    out[4] = fma(-kB, odd_b, even_b);
    out[5] = fma(-kSquares, d[3], d[1] + d[5]);
  }
};
struct PointsToOutputs {  // A^T
  static constexpr int kFrom = 6, kTo = 4;
  static DIFFAD_SIMD void apply(const V (&m)[6], V (&out)[4]) {
    const V sum_a = m[1] + m[2], odd_a = m[1] - m[2], sum_b = m[3] + m[4], odd_b = m[3] - m[4];
    out[0] = m[0] + sum_a + sum_b;
    out[1] = fma(kA, odd_a, kB * odd_b);
    out[2] = fma(kA2, sum_a, kB2 * sum_b);
    out[3] = fma(kA3, odd_a, fma(kB3, odd_b, m[5]));
  }
};
struct GradientToPoints {  // A
  static constexpr int kFrom = 4, kTo = 6;
  static DIFFAD_SIMD void apply(const V (&y)[4], V (&out)[6]) {
    out[0] = y[0];
    const V even_a = fma(kA2, y[2], y[0]), odd_a = fma(kA3, y[3], kA * y[1]);
    out[1] = even_a + odd_a;
    out[2] = even_a - odd_a;
    const V even_b = fma(kB2, y[2], y[0]), odd_b = fma(kB3, y[3], kB * y[1]);
    out[3] = even_b + odd_b;
    out[4] = even_b - odd_b;
    out[5] = y[3];
  }
};
struct FilterToPoints {  // G
  static constexpr int kFrom = 3, kTo = 6;
  static DIFFAD_SIMD void apply(const V (&g)[3], V (&out)[6]) {
    out[0] = g[0];
    const V even_a = fma(kA2, g[2], g[0]), odd_a = kA * g[1];
    out[1] = kGa * (even_a + odd_a);
    out[2] = kGa * (even_a - odd_a);
    const V even_b = fma(kB2, g[2], g[0]), odd_b = kB * g[1];
    out[3] = kGb * (even_b + odd_b);
    out[4] = kGb * (even_b - odd_b);
    out[5] = g[2];
  }
};
struct PointsToFilter {  // G^T
  static constexpr int kFrom = 6, kTo = 3;
  static DIFFAD_SIMD void apply(const V (&u)[6], V (&out)[3]) {
    const V sum_a = kGa * (u[1] + u[2]), odd_a = kGa * (u[1] - u[2]);
    const V sum_b = kGb * (u[3] + u[4]), odd_b = kGb * (u[3] - u[4]);
    out[0] = u[0] + sum_a + sum_b;
    out[1] = fma(kA, odd_a, kB * odd_b);
    out[2] = fma(kA2, sum_a, fma(kB2, sum_b, u[5]));
  }
};

// T along both axes: from(row, column) is read, to(row, column, value) is called.
template <class T, class From, class To>
DIFFAD_SIMD void transform(From&& from, To&& to) {
  V half[T::kTo][T::kFrom];
  for (int column = 0; column < T::kFrom; ++column) {
    V in[T::kFrom], out[T::kTo];
#pragma GCC unroll 6
    for (int i = 0; i < T::kFrom; ++i) in[i] = from(i, column);
    T::apply(in, out);
#pragma GCC unroll 6
    for (int i = 0; i < T::kTo; ++i) half[i][column] = out[i];
  }
  for (int row = 0; row < T::kTo; ++row) {
    V out[T::kTo];
    T::apply(half[row], out);
#pragma GCC unroll 6
    for (int i = 0; i < T::kTo; ++i) to(row, i, out[i]);
  }
}

// A tile's image and its first pixel.
struct Place {
  int64_t image, row, column;
  Place(const TileGrid& grid, int64_t tile) {
    image = tile / (grid.rows * grid.columns);
    row = tile / grid.columns % grid.rows * kTile;
    column = tile % grid.columns * kTile;
  }
};

// The transform of a tile's pixels, `border` more on each side, to points `next_point` apart in
// `to`; a block of channels is `next_block` from the one before. Pixels outside the image are 0.
template <class T>
void to_points(const TileGrid& grid, int64_t tile, const Pixels& x, int64_t border,
               int64_t channels, const float* zeros, float* to, int64_t next_point,
               int64_t next_block) {
  const Place place(grid, tile);
  const float* pixel[T::kFrom][T::kFrom];
  for (int r = 0; r < T::kFrom; ++r) {
    for (int c = 0; c < T::kFrom; ++c) {
      const int64_t row = place.row - border + r, column = place.column - border + c;
      const bool inside = row >= 0 && row < grid.height && column >= 0 && column < grid.width;
      pixel[r][c] =
          inside ? x.data + place.image * x.image + row * x.row + column * x.column : zeros;
    }
  }
  for (int64_t channel = 0; channel < channels; channel += L) {
    float* points = to + channel / kBlock * next_block + channel % kBlock;
    transform<T>([&](int r, int c) { return load(pixel[r][c] + channel); },
                 [&](int r, int c, V value) { store(points + (r * 6 + c) * next_point, value); });
  }
}

// ------------------------------------------------------------------------ forward

// Outputs that are multiplied and then transformed back together: a pair of vectors, or a block
// where that is more.
constexpr int64_t kWide = 2 * L > kBlock ? 2 * L : kBlock;
static_assert(kWide <= 2 * kBlock);

// m (R, kWide) = V vectors of x (R, inputs) u.
template <int R, int N>
void product(const float* x, const float* u, int64_t vector, int64_t inputs, float* m) {
  V sum[R][N] = {};
  // Weights stream from memory, point after point and block after block.
  multiply_add<float, R, N>(x, inputs, 1, u, vector, kBlock, inputs, sum, inputs * kBlock);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) store(m + r * kWide + n * L, sum[r][n]);
  }
}

// Of all points, `width` outputs from `first` on.
void multiply(const ConvForward& a, const float* x, int64_t tiles, int64_t first, int64_t width,
              float* m) {
  const int64_t block = kPoints * a.inputs * kBlock;
  for (int64_t point = 0; point < kPoints; ++point) {
    const float* rows = x + point * (tiles * a.inputs + kPointGap);
    float* result = m + point * (tiles * kWide + kPointGap);
    for (int64_t c = 0; c < width; c += 2 * L) {
      const float* u = a.packed + (first + c) / kBlock * block + point * a.inputs * kBlock +
                       (first + c) % kBlock;
      for_even_blocks(tiles, kPairRows, [&](int64_t t, int64_t count) {
        with_rows<kPairRows>(count, [&](auto r) {
          const float* in = rows + t * a.inputs;
          float* out = result + t * kWide + c;
          if constexpr (2 * L <= kBlock) {
            product<r, 2>(in, u, L, a.inputs, out);
          } else if (width == kWide) {
            product<r, 2>(in, u, block, a.inputs, out);
          } else {
            product<r, 1>(in, u, 0, a.inputs, out);
          }
        });
      });
    }
  }
}

// Points of `width` outputs from `first` on to the pixels of a tile.
void finish(const ConvForward& a, int64_t tile, const float* m, int64_t next_point, int64_t first,
            int64_t width) {
  const Place place(a.grid, tile);
  const int64_t rows = a.grid.height - place.row, columns = a.grid.width - place.column;
  const int64_t corner = (place.image * a.grid.height + place.row) * a.grid.width + place.column;
  float* y = a.y + corner * a.outputs + first;
  const float* residual = a.residual.data;
  if (residual != nullptr) {
    residual += place.image * a.residual.image + place.row * a.residual.row +
                place.column * a.residual.column + first;
  }
  for (int64_t c = 0; c < width; c += L) {
    const V bias = a.bias == nullptr ? V{} : load(a.bias + first + c);
    transform<PointsToOutputs>(
        [&](int r, int k) { return load(m + (r * 6 + k) * next_point + c); },
        [&](int r, int k, V value) {
          if (r >= rows || k >= columns) return;
          value += bias;
          if (residual != nullptr) {
            value += load(residual + r * a.residual.row + k * a.residual.column + c);
          }
          store(y + (r * a.grid.width + k) * a.outputs + c, value);
        });
  }
}

// --------------------------------------------------------- gradient for the weights

// du (R, 16 each of N vectors) = sum over tiles of the transposed x times g, added to what is
// there but for the first chunk.
template <int R, int N>
void add_product(const float* x, const float* g, int64_t g_vector, int64_t tiles, bool first,
                 float* du, int64_t du_vector) {
  V sum[R][N] = {};
  multiply_add<float, R, N>(x, 1, kBlock, g, g_vector, kBlock, tiles, sum);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      float* to = du + r * kBlock + n * du_vector;
      store(to, first ? sum[r][n] : load(to) + sum[r][n]);
    }
  }
}

}  // namespace

void conv3x3_pack(const ConvPack& a, int64_t begin, int64_t end) {
  // The points of an input lie a power of two apart, all in one set of the cache: those of a few
  // inputs are gathered first, and a run of lines is written at once.
  constexpr int64_t kRun = 8;
  float filters[3][3][kRun][kBlock], points[kPoints][kRun * kBlock + kPointGap];
  for (int64_t item = begin; item < end;) {
    const int64_t block = item / a.inputs, first = item % a.inputs;
    const int64_t left = end - item < a.inputs - first ? end - item : a.inputs - first;
    const int64_t count = left < kRun ? left : kRun;
    const float* from = a.weight + block * kBlock * a.output + first * a.input;
    for (int64_t o = 0; o < kBlock; ++o) {
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t c = 0; c < 3; ++c) {
          for (int64_t i = 0; i < count; ++i) {
            filters[r][c][i][o] = from[o * a.output + i * a.input + r * a.row + c * a.column];
          }
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t o = 0; o < kBlock; o += L) {
        transform<FilterToPoints>(
            [&](int r, int c) { return load(&filters[r][c][i][o]); },
            [&](int r, int c, V v) { store(&points[r * 6 + c][i * kBlock + o], v); });
      }
    }
    float* to = a.packed + (block * kPoints * a.inputs + first) * kBlock;
    for (int64_t point = 0; point < kPoints; ++point, to += a.inputs * kBlock) {
      std::memcpy(to, points[point], count * kBlock * sizeof(float));
    }
    item += count;
  }
}

void conv3x3_forward(const ConvForward& a, float* scratch, int64_t begin, int64_t end,
                     int64_t first, int64_t last) {
  for_even_blocks(end - begin, a.at_once, [&](int64_t offset, int64_t tiles) {
    const int64_t tile = begin + offset;
    const int64_t x_point = tiles * a.inputs + kPointGap, m_point = tiles * kWide + kPointGap;
    float *x = scratch, *m = scratch + kPoints * x_point;
    for (int64_t t = 0; t < tiles; ++t) {
      to_points<WindowToPoints>(a.grid, tile + t, a.x, 1, a.inputs, a.zeros, x + t * a.inputs,
                                x_point, kBlock);
    }
    for (int64_t o = first; o < last; o += kWide) {
      const int64_t width = last - o < kWide ? last - o : kWide;
      multiply(a, x, tiles, o, width, m);
      for (int64_t t = 0; t < tiles; ++t) finish(a, tile + t, m + t * kWide, m_point, o, width);
    }
  });
}

void conv3x3_transform(const ConvGradient& a, int64_t begin, int64_t end) {
  const int64_t next_block = a.tiles * kBlock;
  for (int64_t t = begin; t < end; ++t) {
    to_points<WindowToPoints>(a.grid, a.first + t, a.x, 1, a.inputs, a.zeros,
                              a.x_points + t * kBlock, a.tiles * a.inputs + kPointGap, next_block);
    to_points<GradientToPoints>(a.grid, a.first + t, a.grad, 0, a.outputs, a.zeros,
                                a.grad_points + t * kBlock, a.tiles * a.outputs + kPointGap,
                                next_block);
  }
}

void conv3x3_products(const ConvGradient& a, int64_t begin, int64_t end) {
  const int64_t groups = (a.outputs + kGroup - 1) / kGroup;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t point = item / groups, first = item % groups * kGroup;
    const int64_t width = a.outputs - first < kGroup ? a.outputs - first : kGroup;
    const int64_t g_block = a.tiles * kBlock, du_block = a.inputs * kBlock;
    const float* x = a.x_points + point * (a.tiles * a.inputs + kPointGap);
    const float* g = a.grad_points + point * (a.tiles * a.outputs + kPointGap);
    float* du = a.packed + point * (a.outputs * a.inputs + kPointGap);
    for (int64_t c = first; c < first + width; c += 2 * L) {
      const float* panel = g + c / kBlock * g_block + c % kBlock;
      for (int64_t input = 0; input < a.inputs; input += kBlock) {
        for_even_blocks(kBlock, kPairRows, [&](int64_t i, int64_t count) {
          with_rows<kPairRows>(count, [&](auto r) {
            const float* rows = x + input * a.tiles + i;
            float* to = du + c / kBlock * du_block + (input + i) * kBlock + c % kBlock;
            if constexpr (2 * L <= kBlock) {
              add_product<r, 2>(rows, panel, L, a.tiles, a.first == 0, to, L);
            } else if (width == kGroup) {
              add_product<r, 2>(rows, panel, g_block, a.tiles, a.first == 0, to, du_block);
            } else {
              add_product<r, 1>(rows, panel, 0, a.tiles, a.first == 0, to, 0);
            }
          });
        });
      }
    }
  }
}

void conv3x3_unpack(const ConvUnpack& a, int64_t begin, int64_t end) {
  const int64_t next_point = a.outputs * a.inputs + kPointGap;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item / a.inputs, input = item % a.inputs;
    const float* from = a.packed + item * kBlock;
    float filters[3][3][kBlock];
    for (int64_t o = 0; o < kBlock; o += L) {
      transform<PointsToFilter>(
          [&](int r, int c) { return load(from + (r * 6 + c) * next_point + o); },
          [&](int r, int c, V value) { store(&filters[r][c][o], value); });
    }
    for (int64_t o = 0; o < kBlock; ++o) {
      float* to = a.weight + ((block * kBlock + o) * a.inputs + input) * 9;
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t c = 0; c < 3; ++c) to[r * 3 + c] = filters[r][c][o];
      }
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
