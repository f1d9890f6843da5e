// With low_0 the image and s = 2^(l-1), level l takes at every pixel the four values
//   a = low[y][x]   b = low[y][x+s]   c = low[y+s][x]   d = low[y+s][x+s]
// of the low band below: their sum is the next low band, the differences of rows, of columns and of
// both are the three bands of the level. A coefficient so found stands over the 2^l pixels from its
// own on, and is given to the one s further down and to the right, half a pixel off their middle.
//
// A block of rows of cells stays in the cache for all levels, with what the coarsest band reaches
// beyond it. The low band replaces the one below in place: rows and columns are taken upwards, and
// nothing is read that lies before what is written. Behind the last column that counts, vectors
// carry on into numbers that nobody reads.
#include "band_energies.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

// i in [0, n) or less than n - 1 pixels beyond; the outermost pixel is not repeated.
inline int64_t mirrored(int64_t i, int64_t n) {
  i = i < 0 ? -i : i;
  return i < n ? i : 2 * (n - 1) - i;
}

template <class T>
struct Block {
  using A = compute_t<T>;
  static constexpr int L = kLanes<A>;
  const BandEnergiesArgs& a;
  A* image;  // from `reach` pixels above and to the left of the block on
  int64_t first, rows;  // of cells
  int64_t pitch = a.pitch(), reach = a.reach();
  int64_t lines = rows * a.cell + 2 * reach;
  A* columns = image + (a.block * a.cell + 2 * reach + 1) * pitch;  // 6 arrays

  void read(const T* x) const {
    for (int64_t r = 0; r < lines; ++r) {
      const T* from = x + mirrored(first * a.cell + r - reach, a.height) * a.stride[2];
      A* to = image + r * pitch;
      const int64_t step = a.stride[3];
      int64_t i = 0;
      if (step == 1) {
        for (; i + L <= a.width; i += L) store(to + reach + i, load(from + i));
      }
      for (; i < a.width; ++i) to[reach + i] = load_one(from + i * step);
      for (i = 0; i < reach; ++i) {
        to[i] = to[reach + mirrored(i - reach, a.width)];
        to[reach + a.width + i] = to[reach + mirrored(a.width + i, a.width)];
      }
      for (i = a.width + 2 * reach; i < pitch; ++i) to[i] = 0;
    }
    for (int64_t i = 0; i < pitch; ++i) image[lines * pitch + i] = 0;
  }

  // The means of the image on a row of cells.
  void means(int64_t row, A* out) const {
    for (int64_t x = 0; x < a.width; x += L) {
      Vec<A> sum = {};
      const A* p = image + (row * a.cell + reach) * pitch + reach + x;
      for (int64_t y = 0; y < a.cell; ++y, p += pitch) sum += load(p);
      store(columns + x, sum);
    }
    fold(columns, [](auto u, auto v) { return u + v; });
    const A share = A(1) / static_cast<A>(a.cell * a.cell);
    for (int64_t i = 0; i < a.columns(); ++i) out[i] = columns[i] * share;
  }

  // Mean squares and largest squares of a level's three bands on a row of cells; `next` elements
  // lie between the bands of `out`, `peaks` between a band's mean and its largest square.
  void energies(int64_t level, int64_t row, A* out, int64_t next, int64_t peaks) const {
    const int64_t s = int64_t{1} << (level - 1);
    const int64_t below = s * pitch;
    for (int64_t x = 0; x < a.width; x += L) {
      Vec<A> sum[3] = {}, peak[3] = {};
      const A* p = image + (row * a.cell + reach - s) * pitch + reach - s + x;
      for (int64_t y = 0; y < a.cell; ++y, p += pitch) {
        const Vec<A> a0 = load(p), b = load(p + s), c = load(p + below), d = load(p + below + s);
        const Vec<A> above_right = b - a0, below_right = d - c;
        const Vec<A> bands[3] = {(c + d) - (a0 + b), above_right + below_right,
                                 below_right - above_right};
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          const Vec<A> square = bands[k] * bands[k];
          sum[k] += square;
          peak[k] = max(peak[k], square);
        }
      }
      for (int k = 0; k < 3; ++k) {
        store(columns + k * pitch + x, sum[k]);
        store(columns + (3 + k) * pitch + x, peak[k]);
      }
    }
    // The transform that keeps norms halves every band: by levels 4^-l of a value, 16^-l of its
    // square.
    const A scale = A(1) / static_cast<A>(int64_t{1} << 4 * level);
    const A share = A(1) / static_cast<A>(a.cell * a.cell) * scale;
    for (int k = 0; k < 3; ++k, out += next) {
      A *sums = columns + k * pitch, *highest = columns + (3 + k) * pitch;
      fold(sums, [](auto u, auto v) { return u + v; });
      fold(highest, [](auto u, auto v) { return u > v ? u : v; });
      for (int64_t i = 0; i < a.columns(); ++i) {
        out[i] = sums[i] * share;
        // A maximum may lose a NaN, a sum of squares never does.
        out[peaks + i] = sums[i] == sums[i] ? highest[i] * scale : sums[i];
      }
    }
  }

  // Brings an array of columns to one of cells, in place: neighbours in pairs as long as the cell
  // divides by 2, then what is left in order.
  template <class F>
  DIFFAD_SIMD void fold(A* p, F&& join) const {
    int64_t cell = a.cell, n = a.width;
    for (; cell % 2 == 0; cell /= 2) {
      n /= 2;
      for (int64_t i = 0; i < n; i += L) {
        Vec<A> even, odd;
        deinterleave(load(p + 2 * i), load(p + 2 * i + L), even, odd);
        store(p + i, join(even, odd));
      }
    }
    for (int64_t i = 0; i < n / cell && cell > 1; ++i) {
      A value = p[i * cell];
      for (int64_t j = 1; j < cell; ++j) value = join(value, p[i * cell + j]);
      p[i] = value;
    }
  }

  // The low band of `level` in place of the one below.
  void descend(int64_t level) const {
    const int64_t s = int64_t{1} << (level - 1);
    for (int64_t r = 0; r + s < lines; ++r) {
      A *p = image + r * pitch, *below = p + s * pitch;
      for (int64_t x = 0; x < a.width + 2 * reach; x += L) {
        store(p + x, (load(p + x) + load(p + x + s)) + (load(below + x) + load(below + x + s)));
      }
    }
  }
};

template <class T>
void run(const BandEnergiesArgs& a, void* scratch, int64_t item) {
  using A = compute_t<T>;
  const int64_t n = item / a.blocks() / a.channels, c = item / a.blocks() % a.channels;
  const int64_t first = item % a.blocks() * a.block, left = a.rows() - first;
  const Block<T> block{a, static_cast<A*>(scratch), first, left < a.block ? left : a.block};
  block.read(static_cast<const T*>(a.x) + n * a.stride[0] + c * a.stride[1]);
  const int64_t plane = a.rows() * a.columns(), band = a.channels * plane, all = 3 * a.levels * band;
  A* out = static_cast<A*>(a.out) + n * (2 * all + band) + c * plane + first * a.columns();
  for (int64_t row = 0; row < block.rows; ++row) block.means(row, out + 2 * all + row * a.columns());
  for (int64_t level = 1; level <= a.levels; ++level) {
    for (int64_t row = 0; row < block.rows; ++row) {
      block.energies(level, row, out + (level - 1) * 3 * band + row * a.columns(), band, all);
    }
    if (level < a.levels) block.descend(level);
  }
}

}  // namespace

void band_energies(const BandEnergiesArgs& args, void* scratch, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    for (int64_t item = begin; item < end; ++item) run<decltype(zero)>(args, scratch, item);
  });
}

}  // namespace diffad::DIFFAD_ISA
