// See wavelet_attention.h for the maths.
//
// All products are one kernel, C = A B (+ C), whose rows are read number by number and whose
// columns are kVectors vectors, in registers. In the forward pass the columns are queries: S is
// kept as (keys, queries) and the output as (D, queries), so that the softmax of a query is that of
// a lane, without any sum across lanes, and neither k nor v' has to be transposed, only q' and the
// result. In the backward pass the columns are keys for the same reason.
#include "wavelet_attention.h"

#include <new>

#include "simd.h"

// Used from many places: inlined everywhere they would make the library and its build large.
#define DIFFAD_NOINLINE __attribute__((noinline))

namespace diffad::DIFFAD_ISA {
namespace {

// Rows and columns of C in registers: 16 vector registers hold 4 x 3 sums, 3 of B and 1 of A.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int kRows = 4;
#else
constexpr int kRows = 8;
#endif
constexpr int kVectors = 3;
template <class T>
constexpr int kColumns = kVectors * kLanes<T>;
static_assert(kAttentionRows % kRows == 0 && kAttentionKeys % kColumns<float> == 0 &&
              kAttentionQueries % kColumns<float> == 0);

// So much of B's depth at a time stays in the first cache.
constexpr int64_t kDepth = 256;
// Keys, in the backward pass queries, that one tile of S has.
constexpr int64_t kTile = 64;

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory that is aligned to cache lines and not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{64}))) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  operator T*() const { return data_; }

 private:
  T* data_;
};

// ---------------------------------------------------------------- matrix products

// What the sums start from: 0, C, or C with every column times its `factor`.
enum class Start { kZero, kC, kScaledC };

// Element (row, k) of A; elements (k, 0...) of B and (row, 0...) of C lie next to each other.
template <class T>
struct A {
  const T* data;
  int64_t row, k;
};
template <class T>
struct B {
  const T* data;
  int64_t k;
};
template <class T>
struct C {
  T* data;
  int64_t row;
};

// kRows rows and n vectors of columns.
template <int n, Start start, class T>
DIFFAD_SIMD void multiply_tile(int64_t depth, A<T> a, B<T> b, C<T> c, const T* factor) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][n];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int i = 0; i < n; ++i) {
      sum[r][i] = start == Start::kZero ? Vec<T>{} : load(c.data + r * c.row + i * lanes);
      if (start == Start::kScaledC) sum[r][i] *= load(factor + i * lanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> x[n];
#pragma GCC unroll 3
    for (int i = 0; i < n; ++i) x[i] = load(b.data + i * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> y = splat(a.data[r * a.row]);
#pragma GCC unroll 3
      for (int i = 0; i < n; ++i) sum[r][i] = fma(y, x[i], sum[r][i]);
    }
    a.data += a.k;
    b.data += b.k;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int i = 0; i < n; ++i) store(c.data + r * c.row + i * lanes, sum[r][i]);
  }
}

// `rows` is rounded up to a multiple of kRows.
template <int n, Start start, class T>
DIFFAD_NOINLINE void multiply(int64_t rows, int64_t depth, A<T> a, B<T> b, C<T> c,
                          const T* factor = nullptr) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t part = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t r = 0; r < rows; r += kRows) {
      const A<T> a_tile{a.data + r * a.row + k * a.k, a.row, a.k};
      const B<T> b_tile{b.data + k * b.k, b.k};
      const C<T> c_tile{c.data + r * c.row, c.row};
      if (k == 0) {
        multiply_tile<n, start>(part, a_tile, b_tile, c_tile, factor);
      } else {
        multiply_tile<n, Start::kC>(part, a_tile, b_tile, c_tile, factor);
      }
    }
  }
}

// Calls f with the number of vectors that hold `columns` <= kColumns columns, as a constant.
template <class T, class F>
DIFFAD_SIMD void for_vectors(int64_t columns, F&& f) {
  if (columns <= kLanes<T>) return f(std::integral_constant<int, 1>());
  if (columns <= 2 * kLanes<T>) return f(std::integral_constant<int, 2>());
  return f(std::integral_constant<int, 3>());
}

// ----------------------------------------------------------------------- the transform

// Unnormalised 2 x 2 Haar: (a b / c d) becomes cA, cH, cV, cD. Twice is 4 times the identity.
template <class V>
DIFFAD_SIMD void haar(V& a, V& b, V& c, V& d) {
  const V top = a + b, bottom = c + d, left = a - b, right = c - d;
  a = top + bottom, b = top - bottom, c = left + right, d = left - right;
}

// Pixels of a block of R x R, row by row, to coefficients: of level 1 in place of each 2 x 2, and
// of level 2 in place of their cA.
template <int R, class V>
DIFFAD_SIMD void analyse(V (&v)[R * R]) {
#pragma GCC unroll 4
  for (int i = 0; i < R * R / 4; ++i) {
    const int k = i / (R / 2) * 2 * R + i % (R / 2) * 2;
    haar(v[k], v[k + 1], v[k + R], v[k + R + 1]);
  }
  if constexpr (R == 4) haar(v[0], v[2], v[8], v[10]);
}
template <int R, class V>
DIFFAD_SIMD void synthesise(V (&v)[R * R]) {
  if constexpr (R == 4) haar(v[0], v[2], v[8], v[10]);
#pragma GCC unroll 4
  for (int i = 0; i < R * R / 4; ++i) {
    const int k = i / (R / 2) * 2 * R + i % (R / 2) * 2;
    haar(v[k], v[k + 1], v[k + R], v[k + R + 1]);
  }
}

// The band of the coefficient in place i, coarse to fine, and what normalises it: 1 / 2 a level in
// each direction.
template <int R>
constexpr int band_at(int i) {
  const int y = i / R, x = i % R, fine = y % 2 * 2 + x % 2;
  if (R == 2) return fine;
  return fine ? 3 + fine : y / 2 * 2 + x / 2;
}
static_assert(band_at<4>(2) == 1 && band_at<4>(8) == 2 && band_at<4>(11) == 4);
template <int R>
constexpr double norm_of(int band) {
  return R == 4 && band < 4 ? 1.0 / 16 : 1.0 / 4;
}

// Multiplies a block by factor M, M = T^t diag(gain) T, or by factor alone where there is no gain.
template <class T, int R>
class Fold {
 public:
  Fold(const void* gains, const AttentionArgs& a, int64_t head, double factor)
      : identity_(gains == nullptr), factor_(static_cast<T>(factor)) {
    if (identity_) return;
    const T* gain = static_cast<const T*>(gains) + head % a.heads * a.bands();
    for (int b = 0; b < a.bands(); ++b) gain_[b] = gain[b] * static_cast<T>(factor * norm_of<R>(b));
  }
  Fold() : identity_(true), factor_(1) {}

  DIFFAD_SIMD void operator()(Vec<T> (&v)[R * R]) const {
    if (identity_) {
#pragma GCC unroll 16
      for (int i = 0; i < R * R; ++i) v[i] *= splat(factor_);
      return;
    }
    analyse<R>(v);
#pragma GCC unroll 16
    for (int i = 0; i < R * R; ++i) v[i] *= splat(gain_[band_at<R>(i)]);
    synthesise<R>(v);
  }

 private:
  bool identity_;
  T factor_, gain_[kAttentionMaxBands];
};

// ------------------------------------------------------------------------- blocks

// Blocks of R x R pixels on a grid: channel c of pixel (y, x) in block (i, j) is
// data[i block_y + j block_x + y y + x x + c c].
template <class S>
struct Blocks {
  S* data;
  int64_t block_y, block_x, y, x, c;
};

// Those of one head of a tensor.
template <int R, class S>
Blocks<S> head_of(const AttentionTensor& t, const AttentionArgs& a, int64_t head) {
  S* data = static_cast<S*>(t.data) + head / a.heads * t.n + head % a.heads * t.head;
  return {data, R * t.y, R * t.x, t.y, t.x, t.c};
}

// The rows of a matrix, the first of which is block `first` of the grid.
template <int R, class T>
Blocks<T> blocks_in(T* rows, const AttentionArgs& a, int64_t first) {
  const int64_t row = a.row_stride();
  return {rows - first * row, a.cols * row, row, R * a.channels, a.channels, 1};
}

// n channels; `kWhole` says that they fill a vector and lie next to each other.
template <bool kWhole, class S>
DIFFAD_SIMD Vec<compute_t<S>> load_run(const S* p, int64_t stride, int64_t n) {
  if (kWhole) return load(p);
  if (stride == 1) return load_partial(p, n);
  S buffer[kLanes<compute_t<S>>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

template <int R, bool kWhole, class S>
DIFFAD_SIMD void load_block(const Blocks<S>& b, const S* p, int64_t n,
                            Vec<compute_t<S>> (&v)[R * R]) {
#pragma GCC unroll 16
  for (int i = 0; i < R * R; ++i) v[i] = load_run<kWhole>(p + i / R * b.y + i % R * b.x, b.c, n);
}

template <int R, bool kWhole, class S>
DIFFAD_SIMD void store_block(const Blocks<S>& b, S* p, int64_t n,
                             const Vec<compute_t<S>> (&v)[R * R]) {
#pragma GCC unroll 16
  for (int i = 0; i < R * R; ++i) {
    S* to = p + i / R * b.y + i % R * b.x;
    if (kWhole) {
      store(to, v[i]);
    } else {
      store_partial(to, v[i], n);
    }
  }
}

// Calls f(position in x, position in y, n, whole) for every vector of channels, of which n count,
// of the blocks [first, last); `whole` is a constant, as above. The channels of y are neighbours.
template <class T, class X, class Y, class F>
DIFFAD_SIMD void for_runs(const AttentionArgs& a, int64_t first, int64_t last, const Blocks<X>& x,
                          const Blocks<Y>& y, F&& f) {
  const auto loop = [&](auto whole) __attribute__((always_inline)) {
    int64_t i = first / a.cols, j = first % a.cols;
    for (int64_t block = first; block < last; ++block) {
      X* at_x = x.data + i * x.block_y + j * x.block_x;
      Y* at_y = y.data + i * y.block_y + j * y.block_x;
      for (int64_t c = 0; c < a.channels; c += kLanes<T>) {
        f(at_x + c * x.c, at_y + c, smaller(a.channels - c, kLanes<T>), whole);
      }
      if (++j == a.cols) j = 0, ++i;
    }
  };
  if (x.c == 1 && a.channels % kLanes<T> == 0) {
    loop(std::true_type());
  } else {
    loop(std::false_type());
  }
}

// Copies the blocks [first, last), folded. The channels of `out` lie next to each other.
template <int R, class In, class Out, class T>
DIFFAD_NOINLINE void copy(const AttentionArgs& a, int64_t first, int64_t last,
                          const Blocks<In>& in, const Blocks<Out>& out, const Fold<T, R>& fold) {
  for_runs<T>(a, first, last, in, out, [&](const In* from, Out* to, int64_t n, auto whole) {
    Vec<T> v[R * R];
    load_block<R, whole>(in, from, n, v);
    fold(v);
    store_block<R, whole>(out, to, n, v);
  });
}

// Copies the blocks [first, last) to `rows`, with zeros up to the ends of the rows and of `count`.
template <int R, class In, class T>
void copy_to_rows(const AttentionArgs& a, int64_t first, int64_t last, const Blocks<In>& in,
                  T* rows, int64_t count, const Fold<T, R>& fold) {
  copy<R>(a, first, last, in, blocks_in<R>(rows, a, first), fold);
  const int64_t row = a.row_stride(), size = a.block_size();
  if (size % 16 != 0) {  // a vector or group of rows may reach beyond the end
    for (int64_t i = first; i < last; ++i) {
      std::memset(rows + (i - first) * row + size, 0, (row - size) * sizeof(T));
    }
  }
  std::memset(rows + (last - first) * row, 0, (count - (last - first)) * row * sizeof(T));
}

// result[b] += factor sum over the blocks [first, last) of <(T x)_b, (T y)_b>.
template <int R, class X, class T>
DIFFAD_NOINLINE void add_band_products(const AttentionArgs& a, int64_t first, int64_t last,
                                       const Blocks<X>& x, const Blocks<T>& y, double factor,
                                       T* result) {
  constexpr int bands = R == 2 ? 4 : 7;
  Vec<T> sum[bands] = {};
  for_runs<T>(a, first, last, x, y, [&](const X* at_x, const T* at_y, int64_t n, auto whole) {
    Vec<T> v[R * R], w[R * R];
    load_block<R, whole>(x, at_x, n, v);
    load_block<R, whole>(y, at_y, n, w);
    analyse<R>(v);
    analyse<R>(w);
#pragma GCC unroll 16
    for (int i = 0; i < R * R; ++i) sum[band_at<R>(i)] = fma(v[i], w[i], sum[band_at<R>(i)]);
  });
  for (int b = 0; b < bands; ++b) {
    result[b] += sum_of_lanes(sum[b]) * static_cast<T>(factor * norm_of<R>(b));
  }
}

// `n` vectors of rows become columns: (n lanes, depth) to (depth, n lanes). Up to a vector more of
// the depth is read and written.
template <int n, class T>
DIFFAD_NOINLINE void rows_to_columns(const T* rows, int64_t row, int64_t depth, T* columns) {
  constexpr int lanes = kLanes<T>;
  for (int64_t c = 0; c < depth; c += lanes) {
#pragma GCC unroll 3
    for (int i = 0; i < n; ++i) {
      Vec<T> v[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) v[k] = load(rows + (i * lanes + k) * row + c);
      transpose(v);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) store(columns + ((c + k) * n + i) * lanes, v[k]);
    }
  }
}

// And back, every column times its `factor`.
template <int n, class T>
DIFFAD_NOINLINE void columns_to_rows(const T* columns, int64_t depth, const T* factor, T* rows,
                                     int64_t row) {
  constexpr int lanes = kLanes<T>;
  for (int64_t c = 0; c < depth; c += lanes) {
#pragma GCC unroll 3
    for (int i = 0; i < n; ++i) {
      Vec<T> v[lanes];
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) {
        v[k] = load(columns + ((c + k) * n + i) * lanes) * load(factor + i * lanes);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int k = 0; k < lanes; ++k) store(rows + (i * lanes + k) * row + c, v[k]);
    }
  }
}

// ------------------------------------------------------------------------ attention

constexpr double kLog2E = 1.4426950408889634;

// The softmax of n vectors of queries, over all keys so far.
template <class T>
struct Softmax {
  T max[kColumns<T>], sum[kColumns<T>], factor[kColumns<T>];
};

// Turns S (keys, queries) into 2^(S - max), with the maximum and sum brought up to date; what was
// summed before has to be multiplied by `factor`.
template <int n, class T>
DIFFAD_NOINLINE void update(Softmax<T>& state, T* s, int64_t keys) {
  constexpr int lanes = kLanes<T>;
  Vec<T> max_[n], sum[n];
#pragma GCC unroll 3
  for (int i = 0; i < n; ++i) max_[i] = load(state.max + i * lanes), sum[i] = Vec<T>{};
  for (int64_t k = 0; k < keys; ++k) {
#pragma GCC unroll 3
    for (int i = 0; i < n; ++i) max_[i] = max(load(s + (k * n + i) * lanes), max_[i]);
  }
  for (int64_t k = 0; k < keys; ++k) {
#pragma GCC unroll 3
    for (int i = 0; i < n; ++i) {
      const Vec<T> p = exp2_negative(load(s + (k * n + i) * lanes) - max_[i]);
      store(s + (k * n + i) * lanes, p);
      sum[i] += p;
    }
  }
#pragma GCC unroll 3
  for (int i = 0; i < n; ++i) {
    const Vec<T> factor = exp2_negative(load(state.max + i * lanes) - max_[i]);
    store(state.factor + i * lanes, factor);
    store(state.sum + i * lanes, fma(load(state.sum + i * lanes), factor, sum[i]));
    store(state.max + i * lanes, max_[i]);
  }
}

template <class S, int R>
void forward(const AttentionArgs& a, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  constexpr int64_t lanes = kLanes<T>, panel = kColumns<T>;
  const int64_t tokens = a.tokens(), size = a.block_size(), row = a.row_stride();
  const int64_t depth = round_up(size, 16), all_rows = round_up(tokens, kAttentionRows);
  Buffer<T> k(all_rows * row), v(all_rows * row), rows(panel * row), s(kTile * panel);
  Buffer<T> q(kAttentionQueries * depth), o(kAttentionQueries * depth);
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / a.items(), first = item % a.items() * kAttentionQueries;
    const int64_t last = smaller(first + kAttentionQueries, tokens);
    if (head != packed) {
      const Fold<T, R> value_fold(a.value_gain, a, head, 1);
      copy_to_rows(a, 0, tokens, head_of<R, S>(a.k, a, head), &k[0], all_rows, Fold<T, R>());
      copy_to_rows(a, 0, tokens, head_of<R, S>(a.v, a, head), &v[0], all_rows, value_fold);
      packed = head;
    }
    Softmax<T> softmax[kAttentionQueries / panel];
    const Fold<T, R> logit_fold(a.logit_gain, a, head, a.scale * kLog2E);
    for (int64_t i = first; i < last; i += panel) {
      for_vectors<T>(last - i, [&](auto n) {
        copy_to_rows(a, i, smaller(i + panel, last), head_of<R, S>(a.q, a, head), &rows[0],
                     n * lanes, logit_fold);
        rows_to_columns<n>(&rows[0], row, size, q + (i - first) * depth);
      });
      for (T& x : softmax[(i - first) / panel].max) x = -static_cast<T>(__builtin_inf());
      for (T& x : softmax[(i - first) / panel].sum) x = 0;
    }
    for (int64_t j = 0; j < tokens; j += kTile) {
      const int64_t keys = smaller(kTile, tokens - j);
      for (int64_t i = first; i < last; i += panel) {
        for_vectors<T>(last - i, [&](auto n) {
          const B<T> query{q + (i - first) * depth, n * lanes}, p{s, n * lanes};
          const C<T> logits{s, n * lanes}, out{o + (i - first) * depth, n * lanes};
          const A<T> key{k + j * row, row, 1}, value{v + j * row, 1, row};
          Softmax<T>& state = softmax[(i - first) / panel];
          multiply<n, Start::kZero>(keys, size, key, query, logits);
          update<n>(state, &s[0], keys);
          if (j == 0) {
            multiply<n, Start::kZero>(size, keys, value, p, out);
          } else {
            multiply<n, Start::kScaledC>(size, keys, value, p, out, state.factor);
          }
        });
      }
    }
    for (int64_t i = first; i < last; i += panel) {
      for_vectors<T>(last - i, [&](auto n) {
        Softmax<T>& state = softmax[(i - first) / panel];
        const int64_t end_query = smaller(i + panel, last);
        T* lse = static_cast<T*>(a.lse) + head * tokens;
        for (int64_t t = i; t < end_query; ++t) {
          lse[t] = state.max[t - i] + static_cast<T>(__builtin_log2(state.sum[t - i]));
        }
        for (int64_t x = 0; x < n * lanes; ++x) state.factor[x] = 1 / state.sum[x];
        columns_to_rows<n>(o + (i - first) * depth, size, state.factor, &rows[0], row);
        copy(a, i, end_query, blocks_in<R>(&rows[0], a, i), head_of<R, S>(a.out, a, head),
             Fold<T, R>());
      });
    }
  }
}

template <class S, int R>
void backward_keys(const AttentionBackwardArgs& b, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  constexpr int64_t lanes = kLanes<T>, panel = kColumns<T>;
  const AttentionArgs& a = b.forward;
  const int64_t tokens = a.tokens(), size = a.block_size(), row = a.row_stride();
  const int64_t depth = round_up(size, 16), all_rows = round_up(tokens, kAttentionRows);
  Buffer<T> q(all_rows * row), dout(all_rows * row), delta(tokens);
  Buffer<T> k_rows(panel * row), v_rows(panel * row), k(depth * panel), v(depth * panel);
  Buffer<T> dk(depth * panel), dv(depth * panel), s(kTile * panel), ds(kTile * panel);
  int64_t packed = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / b.chunks, begin_key = item % b.chunks * b.chunk_keys;
    const int64_t end_key = smaller(begin_key + b.chunk_keys, tokens);
    if (head != packed) {
      const Fold<T, R> logit_fold(a.logit_gain, a, head, a.scale * kLog2E);
      copy_to_rows(a, 0, tokens, head_of<R, S>(a.q, a, head), &q[0], all_rows, logit_fold);
      copy_to_rows(a, 0, tokens, head_of<R, S>(b.dout, a, head), &dout[0], all_rows, Fold<T, R>());
      for (int64_t i = 0; i < tokens; ++i) {
        copy_to_rows(a, i, i + 1, head_of<R, S>(a.out, a, head), &k_rows[0], 1, Fold<T, R>());
        Vec<T> sum{};
        for (int64_t c = 0; c < size; c += lanes) {
          sum = fma(load(k_rows + c), load(dout + i * row + c), sum);
        }
        delta[i] = sum_of_lanes(sum);
      }
      packed = head;
    }
    const Fold<T, R> value_fold(a.value_gain, a, head, 1);
    const T* lse = static_cast<const T*>(a.lse) + head * tokens;
    T* dq = static_cast<T*>(b.dq_parts) + item * b.dq_rows() * row;
    T* value_gain = static_cast<T*>(b.value_gain_parts) + item * a.bands();
    if (b.value_gain_parts) std::memset(value_gain, 0, a.bands() * sizeof(T));
    for (int64_t j = begin_key; j < end_key; j += panel) {
      const int64_t last = smaller(j + panel, end_key), keys = last - j;
      for_vectors<T>(keys, [&](auto n) {
        constexpr int64_t width = n * lanes;
        copy_to_rows(a, j, last, head_of<R, S>(a.k, a, head), &k_rows[0], width, Fold<T, R>());
        copy_to_rows(a, j, last, head_of<R, S>(a.v, a, head), &v_rows[0], width, value_fold);
        rows_to_columns<n>(&k_rows[0], row, size, &k[0]);
        rows_to_columns<n>(&v_rows[0], row, size, &v[0]);
        for (int64_t i = 0; i < tokens; i += kTile) {
          const int64_t queries = smaller(kTile, tokens - i);
          const T *q_tile = q + i * row, *dout_tile = dout + i * row;
          multiply<n, Start::kZero, T>(queries, size, {q_tile, row, 1}, {k, width}, {s, width});
          multiply<n, Start::kZero, T>(queries, size, {dout_tile, row, 1}, {v, width}, {ds, width});
          for (int64_t t = 0; t < queries; ++t) {
#pragma GCC unroll 3
            for (int64_t x = t * width; x < (t + 1) * width; x += lanes) {
              const Vec<T> p = exp2_negative(load(s + x) - splat(lse[i + t]));
              store(s + x, p);
              store(ds + x, p * (load(ds + x) - splat(delta[i + t])));
            }
          }
          const auto add = [&](auto start) {
            multiply<n, start, T>(size, queries, {dout_tile, 1, row}, {s, width}, {dv, width});
            multiply<n, start, T>(size, queries, {q_tile, 1, row}, {ds, width}, {dk, width});
          };
          if (i == 0) {
            add(std::integral_constant<Start, Start::kZero>());
          } else {
            add(std::integral_constant<Start, Start::kC>());
          }
          for (int64_t c = 0, columns; c < size; c += columns) {
            // Rather two and two vectors than three and one, which would be slow.
            columns = size - c > 3 * lanes && size - c <= 4 * lanes ? 2 * lanes : panel;
            for_vectors<T>(smaller(columns, size - c), [&](auto m) {
              const A<T> left{ds, width, 1};
              const B<T> right{k_rows + c, row};
              const C<T> sum{dq + i * row + c, row};
              if (j == begin_key) {
                multiply<m, Start::kZero>(queries, keys, left, right, sum);
              } else {
                multiply<m, Start::kC>(queries, keys, left, right, sum);
              }
            });
          }
        }
        T factor[width];
        for (T& x : factor) x = static_cast<T>(1 / kLog2E);
        columns_to_rows<n>(&dk[0], size, factor, &k_rows[0], row);
        copy(a, j, last, blocks_in<R>(&k_rows[0], a, j), head_of<R, S>(b.dk, a, head),
             Fold<T, R>());
        for (T& x : factor) x = 1;
        columns_to_rows<n>(&dv[0], size, factor, &v_rows[0], row);
        const Blocks<T> mixed = blocks_in<R>(&v_rows[0], a, j);
        if (b.value_gain_parts) {
          add_band_products<R>(a, j, last, head_of<R, S>(a.v, a, head), mixed, 1, value_gain);
        }
        copy(a, j, last, mixed, head_of<R, S>(b.dv, a, head), value_fold);
      });
    }
  }
}

template <class S, int R>
void backward_queries(const AttentionBackwardArgs& b, int64_t begin, int64_t end) {
  using T = compute_t<S>;
  const AttentionArgs& a = b.forward;
  const int64_t tokens = a.tokens(), row = a.row_stride(), part = b.dq_rows() * row;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / a.items(), first = item % a.items() * kAttentionQueries;
    const int64_t last = smaller(first + kAttentionQueries, tokens);
    T* dq = static_cast<T*>(b.dq_parts) + head * b.chunks * part + first * row;
    for (int64_t i = 0; i < (last - first) * row; i += kLanes<T>) {
      Vec<T> sum = load(dq + i);
      for (int64_t c = 1; c < b.chunks; ++c) sum += load(dq + c * part + i);
      store(dq + i, sum);
    }
    const Blocks<T> sums = blocks_in<R>(dq, a, first);
    if (b.logit_gain_parts) {
      T* logit_gain = static_cast<T*>(b.logit_gain_parts) + item * a.bands();
      std::memset(logit_gain, 0, a.bands() * sizeof(T));
      add_band_products<R>(a, first, last, head_of<R, S>(a.q, a, head), sums, a.scale, logit_gain);
    }
    copy(a, first, last, sums, head_of<R, S>(b.dq, a, head),
         Fold<T, R>(a.logit_gain, a, head, a.scale));
  }
}

// Calls f with a number of the dtype and the side of a block as a constant.
template <class F>
void for_dtype_and_level(const AttentionArgs& a, F&& f) {
  for_dtype(a.dtype, [&](auto zero) {
    if (a.level == 1) return f(zero, std::integral_constant<int, 2>());
    return f(zero, std::integral_constant<int, 4>());
  });
}

}  // namespace

void wavelet_attention(const AttentionArgs& a, int64_t begin, int64_t end) {
  for_dtype_and_level(a, [&](auto s, auto r) { forward<decltype(s), r>(a, begin, end); });
}

void wavelet_attention_backward_keys(const AttentionBackwardArgs& b, int64_t begin, int64_t end) {
  for_dtype_and_level(b.forward,
                      [&](auto s, auto r) { backward_keys<decltype(s), r>(b, begin, end); });
}

void wavelet_attention_backward_queries(const AttentionBackwardArgs& b, int64_t begin,
                                        int64_t end) {
  for_dtype_and_level(b.forward,
                      [&](auto s, auto r) { backward_queries<decltype(s), r>(b, begin, end); });
}

}  // namespace diffad::DIFFAD_ISA
