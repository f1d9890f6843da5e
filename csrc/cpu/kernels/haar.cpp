// Haar packets. A tile of R rows is transformed down the columns into a scratch buffer that stays
// in the cache, then every row of the scratch along x, straight into the bands; unpacking runs the
// same two passes backwards. Memory is read and written once for any number of levels.
//
// Where channels lie next to each other, both passes run over them. Otherwise the pass along x
// works on R vectors, R kLanes neighbouring samples: a stage parts even from odd positions, which
// leaves sums and differences in order for the next stage. Stage l parts bit l-1 of the index, and
// its sums come before its differences, so the first stage decides the top bit of the position:
// coefficient k ends in vector reversed(k).
#include "haar.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

template <int R>
constexpr int reversed(int k) {
  int result = 0;
  for (int bit = 1; bit < R; bit *= 2) result = 2 * result + (k & bit ? 1 : 0);
  return result;
}

// Unnormalised transform of R vectors along x, from samples in order to coefficients.
template <int R, int Size = R, class V>
DIFFAD_SIMD void split(V (&v)[R]) {
  if constexpr (Size > 1) {
    constexpr int half = Size / 2;
    V next[R];
    DIFFAD_UNROLL
    for (int i = 0; i < R / 2; ++i) {
      const int first = i / half * Size, k = i % half;
      V even, odd;
      deinterleave(v[first + 2 * k], v[first + 2 * k + 1], even, odd);
      next[first + k] = even + odd;
      next[first + half + k] = even - odd;
    }
    DIFFAD_UNROLL
    for (int i = 0; i < R; ++i) v[i] = next[i];
    split<R, half>(v);
  }
}

// And back.
template <int R, int Size = 2, class V>
DIFFAD_SIMD void merge(V (&v)[R]) {
  if constexpr (Size <= R) {
    constexpr int half = Size / 2;
    V next[R];
    DIFFAD_UNROLL
    for (int i = 0; i < R / 2; ++i) {
      const int first = i / half * Size, k = i % half;
      const V low = v[first + k], high = v[first + half + k];
      interleave(low + high, low - high, next[first + 2 * k], next[first + 2 * k + 1]);
    }
    DIFFAD_UNROLL
    for (int i = 0; i < R; ++i) v[i] = next[i];
    merge<R, 2 * Size>(v);
  }
}

// Transforms `n` columns of R rows that lie `in_pitch` and `out_pitch` apart. Applies the whole
// normalisation, for both directions.
template <int R, class In, class Out>
DIFFAD_SIMD void along_y(const In* in, int64_t in_pitch, Out* out, int64_t out_pitch, int64_t n) {
  using C = compute_t<In>;
  using V = Vec<C>;
  constexpr int lanes = kLanes<C>;
  V v[R];
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) v[k] = load(in + k * in_pitch + i);
    walsh(v);
    DIFFAD_UNROLL
    for (int k = 0; k < R; ++k) store(out + k * out_pitch + i, v[k] * (C(1) / R));
  }
  if (i < n) {
    for (int k = 0; k < R; ++k) v[k] = load_partial(in + k * in_pitch + i, n - i);
    walsh(v);
    for (int k = 0; k < R; ++k) {
      store_partial(out + k * out_pitch + i, v[k] * (C(1) / R), n - i);
    }
  }
}

// `blocks` groups of R neighbours in a row of the scratch, one channel; coefficient k of group i is
// band[k][i]. May read up to R vectors past the end of the row.
template <class T, int R, bool kPack>
DIFFAD_SIMD void along_x(compute_t<T>* row, T* const (&band)[R], int64_t blocks) {
  using V = Vec<compute_t<T>>;
  constexpr int lanes = kLanes<compute_t<T>>;
  for (int64_t i = 0; i < blocks; i += lanes) {
    const int64_t left = blocks - i;
    V v[R];
    if constexpr (kPack) {
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) v[k] = load(row + i * R + k * lanes);
      split(v);
      if (left >= lanes) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) store(band[k] + i, v[reversed<R>(k)]);
      } else {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) store_partial(band[k] + i, v[reversed<R>(k)], left);
      }
    } else {
      if (left >= lanes) {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) v[reversed<R>(k)] = load(band[k] + i);
      } else {
        DIFFAD_UNROLL
        for (int k = 0; k < R; ++k) v[reversed<R>(k)] = load_partial(band[k] + i, left);
      }
      merge(v);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        const int64_t n = left * R - k * lanes;
        if (n >= lanes) {
          store(row + i * R + k * lanes, v[k]);
        } else if (n > 0) {
          store_partial(row + i * R + k * lanes, v[k], n);
        }
      }
    }
  }
}

// The same for the `lanes` neighbouring channels of a pixel: coefficient k of group i is at
// band[k] + i step.
template <class T, int R, bool kPack>
DIFFAD_SIMD void along_x_by_channels(compute_t<T>* row, int64_t lanes, T* const (&band)[R],
                                     int64_t step, int64_t blocks) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < blocks; ++i) {
    C* const group = row + i * R * lanes;
    const int64_t at = i * step;
    int64_t c = 0;
    for (; c + kLanes<C> <= lanes; c += kLanes<C>) {
      Vec<C> v[R];
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        v[k] = kPack ? load(group + k * lanes + c) : load(band[k] + at + c);
      }
      walsh(v);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        if constexpr (kPack) {
          store(band[k] + at + c, v[k]);
        } else {
          store(group + k * lanes + c, v[k]);
        }
      }
    }
    for (; c < lanes; ++c) {
      C v[R];
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        v[k] = kPack ? group[k * lanes + c] : load_one(band[k] + at + c);
      }
      walsh(v);
      DIFFAD_UNROLL
      for (int k = 0; k < R; ++k) {
        if constexpr (kPack) {
          store_one(band[k] + at + c, v[k]);
        } else {
          group[k * lanes + c] = v[k];
        }
      }
    }
  }
}

// One level needs no scratch: a 2x2 block is four vectors.

// v[2 y + x] holds the samples or the coefficients of both directions: down, then across.
template <class V>
DIFFAD_SIMD void butterfly(V (&v)[4]) {
  const V s0 = (v[0] + v[2]) * 0.5f, s1 = (v[1] + v[3]) * 0.5f;
  const V d0 = (v[0] - v[2]) * 0.5f, d1 = (v[1] - v[3]) * 0.5f;
  v[0] = s0 + s1;
  v[1] = s0 - s1;
  v[2] = d0 + d1;
  v[3] = d0 - d1;
}

template <class T, bool kPack>
DIFFAD_SIMD void one_level(T* image, int64_t pitch, T* const (&band)[4], int64_t blocks) {
  using C = compute_t<T>;
  using V = Vec<C>;
  constexpr int lanes = kLanes<C>;
  for (int64_t i = 0; i < blocks; i += lanes) {
    const int64_t left = blocks - i;
    const bool whole = left >= lanes;
    // Of the two vectors in a row of the image; 0 is none.
    const int64_t first = 2 * left < lanes ? 2 * left : lanes;
    const int64_t second = 2 * left - first;
    V v[4];
    DIFFAD_UNROLL
    for (int y = 0; y < 2; ++y) {
      T* const p = image + y * pitch + 2 * i;
      if constexpr (kPack) {
        const V a = whole ? load(p) : load_partial(p, first);
        const V b = whole ? load(p + lanes) : load_partial(p + first, second);
        deinterleave(a, b, v[2 * y], v[2 * y + 1]);
      } else {
        DIFFAD_UNROLL
        for (int x = 0; x < 2; ++x) {
          const T* q = band[y + 2 * x] + i;
          v[2 * y + x] = whole ? load(q) : load_partial(q, left);
        }
      }
    }
    butterfly(v);
    DIFFAD_UNROLL
    for (int y = 0; y < 2; ++y) {
      if constexpr (kPack) {
        DIFFAD_UNROLL
        for (int x = 0; x < 2; ++x) {
          T* q = band[y + 2 * x] + i;
          if (whole) {
            store(q, v[2 * y + x]);
          } else {
            store_partial(q, v[2 * y + x], left);
          }
        }
      } else {
        T* const p = image + y * pitch + 2 * i;
        V a, b;
        interleave(v[2 * y], v[2 * y + 1], a, b);
        if (whole) {
          store(p, a);
          store(p + lanes, b);
        } else {
          store_partial(p, a, first);
          store_partial(p + first, b, second);
        }
      }
    }
  }
}

template <class T, bool kPack, class V, class Load, class Store>
DIFFAD_SIMD void one_block(T* const (&pixel)[4], T* const (&band)[4], Load get, Store put) {
  V v[4];
  DIFFAD_UNROLL
  for (int k = 0; k < 4; ++k) v[k] = get(kPack ? pixel[k] : band[k / 2 + 2 * (k % 2)]);
  butterfly(v);
  DIFFAD_UNROLL
  for (int k = 0; k < 4; ++k) put(kPack ? band[k / 2 + 2 * (k % 2)] : pixel[k], v[k]);
}

template <class T, bool kPack>
DIFFAD_SIMD void one_level_by_channels(T* image, int64_t pitch, int64_t lanes, T* const (&band)[4],
                                       int64_t step, int64_t blocks) {
  using C = compute_t<T>;
  for (int64_t i = 0; i < blocks; ++i) {
    T* const p = image + 2 * i * lanes;
    T* const pixel[4] = {p, p + lanes, p + pitch, p + pitch + lanes};
    const int64_t at = i * step;
    int64_t c = 0;
    for (; c + kLanes<C> <= lanes; c += kLanes<C>) {
      one_block<T, kPack, Vec<C>>(
          pixel, band, [&](T* q) { return load(q + (kPack ? c : at + c)); },
          [&](T* q, Vec<C> v) { store(q + (kPack ? at + c : c), v); });
    }
    for (; c < lanes; ++c) {
      one_block<T, kPack, C>(
          pixel, band, [&](T* q) { return load_one(q + (kPack ? c : at + c)); },
          [&](T* q, C v) { store_one(q + (kPack ? at + c : c), v); });
    }
  }
}

// What a coefficient is standardised by, see HaarArgs; null: by nothing.
template <class C>
struct Standard {
  const C *mean, *inverse;
  DIFFAD_SIMD Vec<C> operator()(Vec<C> y, int k) const {
    return mean ? (y - splat(mean[k])) * splat(inverse[k]) : y;
  }
  DIFFAD_SIMD Standard from(int k) const {
    return mean ? Standard{mean + k, inverse + k} : Standard{nullptr, nullptr};
  }
};

// Some of the coefficients of up to a vector of blocks: number k of block i at bands[k pitch + i], to
// pixels[i step + k], or (kPack false) back. N numbers, at most a vector of them.
template <class T, int N, bool kPack>
DIFFAD_SIMD void turn(compute_t<T>* bands, int64_t pitch, T* pixels, int64_t step, int64_t blocks,
                      Standard<compute_t<T>> standard) {
  constexpr int lanes = kLanes<compute_t<T>>;
  Vec<compute_t<T>> v[lanes] = {};
  if constexpr (kPack) {
    DIFFAD_UNROLL
    for (int k = 0; k < N; ++k) v[k] = standard(load(bands + k * pitch), k);
  } else if (blocks >= lanes) {
    DIFFAD_UNROLL
    for (int i = 0; i < lanes; ++i) v[i] = load_first<N>(pixels + i * step);
  } else {
    for (int i = 0; i < blocks; ++i) v[i] = load_first<N>(pixels + i * step);
  }
  transpose(v);
  if constexpr (!kPack) {
    DIFFAD_UNROLL
    for (int k = 0; k < N; ++k) store(bands + k * pitch, v[k]);
  } else if (blocks >= lanes) {
    DIFFAD_UNROLL
    for (int i = 0; i < lanes; ++i) store_first<N>(pixels + i * step, v[i]);
  } else {
    for (int i = 0; i < blocks; ++i) store_first<N>(pixels + i * step, v[i]);
  }
}

// The same for the four coefficients of a vector of blocks, which four vectors hold.
template <class T, bool kPack>
DIFFAD_SIMD void turn_fours(compute_t<T>* bands, int64_t pitch, T* pixels,
                            Standard<compute_t<T>> standard) {
  constexpr int lanes = kLanes<compute_t<T>>;
  Vec<compute_t<T>> band[4], pairs[4], block[4];
  if constexpr (kPack) {
    for (int k = 0; k < 4; ++k) band[k] = standard(load(bands + k * pitch), k);
    interleave(band[0], band[2], pairs[0], pairs[2]);
    interleave(band[1], band[3], pairs[1], pairs[3]);
    interleave(pairs[0], pairs[1], block[0], block[1]);
    interleave(pairs[2], pairs[3], block[2], block[3]);
    for (int k = 0; k < 4; ++k) store(pixels + k * lanes, block[k]);
  } else {
    for (int k = 0; k < 4; ++k) block[k] = load(pixels + k * lanes);
    deinterleave(block[0], block[1], pairs[0], pairs[1]);
    deinterleave(block[2], block[3], pairs[2], pairs[3]);
    deinterleave(pairs[0], pairs[2], band[0], band[2]);
    deinterleave(pairs[1], pairs[3], band[1], band[3]);
    for (int k = 0; k < 4; ++k) store(bands + k * pitch, band[k]);
  }
}

// The same for all numbers of `blocks` blocks in a row.
template <class T, int Numbers, bool kPack>
DIFFAD_SIMD void turn_row(compute_t<T>* bands, int64_t pitch, T* pixels, int64_t blocks,
                          Standard<compute_t<T>> standard) {
  constexpr int lanes = kLanes<compute_t<T>>;
  constexpr int rest = Numbers % lanes;
  for (int64_t i = 0; i < blocks; i += lanes) {
    T* const to = pixels + i * Numbers;
    if constexpr (Numbers == 4) {
      if (blocks - i >= lanes) {
        turn_fours<T, kPack>(bands + i, pitch, to, standard);
        continue;
      }
    }
    for (int k = 0; k + lanes <= Numbers; k += lanes) {
      turn<T, lanes, kPack>(bands + k * pitch + i, pitch, to + k, Numbers, blocks - i,
                            standard.from(k));
    }
    if constexpr (rest != 0) {
      constexpr int k = Numbers - rest;
      turn<T, rest, kPack>(bands + k * pitch + i, pitch, to + k, Numbers, blocks - i,
                           standard.from(k));
    }
  }
}

// A row of blocks of Lanes channels that lie next to each other, from the image to the blocks' own
// coefficients, or back.
template <class T, int R, int Lanes, bool kPack>
DIFFAD_SIMD void row_by_pixels(T* image, int64_t image_pitch, T* pixels, int64_t blocks,
                               int64_t tile_cols, Standard<compute_t<T>> standard,
                               compute_t<T>* scratch) {
  using C = compute_t<T>;
  constexpr int lanes = kLanes<C>;
  const int64_t width = blocks * R * Lanes;
  C* const line = scratch;
  C* const planes = line + R * R * Lanes * tile_cols + kHaarPadding;
  const int64_t plane = tile_cols * R + kHaarPadding;
  C* const bands = planes + Lanes * plane;
  const int64_t pitch = tile_cols + 32;  // vectors of the last blocks end beyond them
  if constexpr (kPack) {
    along_y<R>(image, image_pitch, line, width, width);
  } else {
    turn_row<T, R * R * Lanes, false>(bands, pitch, pixels, blocks, standard);
  }
  for (int v = 0; v < R; ++v) {
    C* const row = line + v * width;
    if constexpr (Lanes == 3 && kPack) {
      for (int64_t i = 0; i < blocks * R; i += lanes) {
        Vec<C> triples[3];
        for (int k = 0; k < 3; ++k) triples[k] = load(row + 3 * i + k * lanes);
        deinterleave(triples);
        for (int c = 0; c < 3; ++c) store(planes + c * plane + i, triples[c]);
      }
    }
    for (int c = 0; c < Lanes; ++c) {
      C* band[R];
      for (int h = 0; h < R; ++h) {
        band[h] = bands + ((spread(v) + 2 * spread(h)) * Lanes + c) * pitch;
      }
      along_x<C, R, kPack>(Lanes == 1 ? row : planes + c * plane, band, blocks);
    }
    if constexpr (Lanes == 3 && !kPack) {
      // What is written beyond the row is the next one's, which follows.
      for (int64_t i = 0; i < blocks * R; i += lanes) {
        Vec<C> triples[3];
        for (int c = 0; c < 3; ++c) triples[c] = load(planes + c * plane + i);
        interleave(triples);
        for (int k = 0; k < 3; ++k) store(row + 3 * i + k * lanes, triples[k]);
      }
    }
  }
  if constexpr (kPack) {
    turn_row<T, R * R * Lanes, true>(bands, pitch, pixels, blocks, standard);
  } else {
    along_y<R>(line, width, image, image_pitch, width);
  }
}

// Copies rows that follow each other in `from` to rows that lie `pitch` apart, past the caches.
template <class T>
void stream_rows(T* to, int64_t pitch, const T* from, int64_t rows, int64_t width) {
  if (pitch == width) {
    width *= rows;
    rows = 1;
  }
  for (int64_t r = 0; r < rows; ++r) stream(to + r * pitch, from + r * width, width);
}

template <class T, int R, bool kPack>
void tiles(const HaarArgs& a, compute_t<T>* scratch, int64_t begin, int64_t end) {
  const Strides& is = a.image_strides;
  const Strides& bs = a.band_strides;
  const bool planar = a.lanes == 1 && bs.x == 1;
  using C = compute_t<T>;
  const Standard<C> standard{static_cast<const C*>(a.mean), static_cast<const C*>(a.inverse)};
  const int64_t down = (a.rows + a.tile_rows - 1) / a.tile_rows;
  const int64_t across = (a.cols + a.tile_cols - 1) / a.tile_cols;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t x = i % across * a.tile_cols;
    const int64_t y = i / across % down * a.tile_rows;
    const int64_t c = i / across / down % a.channels;
    const int64_t n = i / across / down / a.channels;
    const int64_t rows = a.rows - y < a.tile_rows ? a.rows - y : a.tile_rows;
    const int64_t blocks = a.cols - x < a.tile_cols ? a.cols - x : a.tile_cols;
    T* const image =
        static_cast<T*>(a.image) + n * is.n + c * is.c + y * R * is.y + x * R * a.lanes;
    const int64_t offset = n * bs.n + c * bs.c + y * bs.y + x * bs.x;
    if (a.by_pixels) {
      for (int64_t r = 0; r < rows; ++r) {
        T* const from = image + r * R * is.y;
        T* const to = static_cast<T*>(a.bands[0]) + offset + r * bs.y;
        const auto of = [&](auto channels) {
          row_by_pixels<T, R, channels(), kPack>(from, is.y, to, blocks, a.tile_cols, standard,
                                                 scratch);
        };
        a.lanes == 1 ? of(std::integral_constant<int, 1>{}) : of(std::integral_constant<int, 3>{});
      }
    } else if constexpr (R == 2) {
      for (int64_t r = 0; r < rows; ++r) {
        T* band[4];
        for (int k = 0; k < 4; ++k) band[k] = static_cast<T*>(a.bands[k]) + offset + r * bs.y;
        T* const pixels = image + r * R * is.y;
        if (planar) {
          one_level<T, kPack>(pixels, is.y, band, blocks);
        } else {
          one_level_by_channels<T, kPack>(pixels, is.y, a.lanes, band, bs.x, blocks);
        }
      }
    } else {
      const int64_t width = blocks * R * a.lanes;
      // What a tile writes to one place is too short to go past the caches from registers: finished
      // bands, or rows of the image, gather here first.
      const bool gather = a.past_cache && (planar || !kPack);
      T* const stage = reinterpret_cast<T*>(scratch + R * a.lanes * R * a.tile_rows * a.tile_cols +
                                            kHaarPadding);
      if constexpr (kPack) {
        for (int64_t r = 0; r < rows; ++r) {
          along_y<R>(image + r * R * is.y, is.y, scratch + r * R * width, width, width);
        }
      }
      // R bands at a time, each over all rows of the tile: these follow each other in memory.
      for (int v = 0; v < R; ++v) {
        T* first[R];
        for (int h = 0; h < R; ++h) {
          first[h] = static_cast<T*>(a.bands[spread(v) + 2 * spread(h)]) + offset;
        }
        for (int64_t r = 0; r < rows; ++r) {
          compute_t<T>* const row = scratch + (r * R + v) * width;
          T* band[R];
          for (int h = 0; h < R; ++h) {
            band[h] = kPack && gather ? stage + (h * rows + r) * blocks : first[h] + r * bs.y;
          }
          if (planar) {
            along_x<T, R, kPack>(row, band, blocks);
          } else {
            along_x_by_channels<T, R, kPack>(row, a.lanes, band, bs.x, blocks);
          }
        }
        if (kPack && gather) {
          for (int h = 0; h < R; ++h) {
            stream_rows(first[h], bs.y, stage + h * rows * blocks, rows, blocks);
          }
        }
      }
      if constexpr (!kPack) {
        for (int64_t r = 0; r < rows; ++r) {
          T* const to = image + r * R * is.y;
          along_y<R>(scratch + r * R * width, width, gather ? stage : to, gather ? width : is.y,
                     width);
          if (gather) stream_rows(to, is.y, stage, R, width);
        }
      }
    }
  }
  if (a.past_cache) finish_streams();
}

template <class T, int R>
void both_ways(const HaarArgs& a, void* scratch, int64_t begin, int64_t end) {
  auto* s = static_cast<compute_t<T>*>(scratch);
  return a.pack ? tiles<T, R, true>(a, s, begin, end) : tiles<T, R, false>(a, s, begin, end);
}

}  // namespace

void haar(const HaarArgs& args, void* scratch, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (args.level) {
      case 1: return both_ways<T, 2>(args, scratch, begin, end);
      case 2: return both_ways<T, 4>(args, scratch, begin, end);
      case 3: return both_ways<T, 8>(args, scratch, begin, end);
      default: return both_ways<T, 16>(args, scratch, begin, end);
    }
  });
}

}  // namespace diffad::DIFFAD_ISA
