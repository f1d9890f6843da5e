// nearest_distances: the sample passes by in blocks of a few vectors of rows, turned once so that
// the lanes are the sample's, and all rows of an item take their distances to it, some at a time.
//
// The search runs in float32 first and keeps two candidates more than asked for. Of what was left
// out it knows how near it may be at most; where the last of the asked, in float64, is as near as
// that, none was missed. Elsewhere the row is searched again in the next of three ways:
//
// 1. By the product, half the work of differences: |a - b|^2 = |a|^2 + 2 (|b|^2 / 2 - <a, b>). In
//    any order of the sum and with u = 2^-24, D products are wrong by up to D u |a| |b| / (1 - D u)
//    and |b|^2 by as much of itself (Higham 2002, 3.1; Cauchy and Schwarz). With g = 2 (D + 8) u,
//    twice the bound and some for the rest of the operations,
//      |b|^2 / 2 (1 - g) - g |a| |b| - <a, b>
//    is below the true value, and candidates are those for which it is least. Rows far from 0 for
//    their distances do not get by with it.
// 2. By sums of squared differences, in one chain of fma over the features: for all terms are
//    positive, a sum s is wrong by some D + 3 roundings of s. What was left out is no nearer than
//    w (1 - (D + 4) 2^-23), w being the sum of the last candidate.
// 3. The same in float64: equally far neighbours, very large and very small numbers.
#include "nearest_distances.h"

#include "gemm.h"

namespace diffad::DIFFAD_ISA {
namespace {

enum class By { kProduct, kDifference };

// Vectors of the sample in a block.
constexpr int kVectors = 2;
template <class C>
constexpr int kWide = kVectors * kLanes<C>;
// Fewer rows do not pay for the lengths of the sample's.
constexpr int64_t kFewest = 4;
// Sums below the first may have lost squares that underflowed; products of numbers whose squares
// add up to less than the second do not overflow.
constexpr float kSmallest = 1e-30f, kLargest = 1e36f;

// The candidates of a row, the nearest first; those that are missing are infinitely far.
template <class C>
struct Candidates {
  C* sums;
  int32_t* places;
  int64_t count;

  void clear() const {
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = static_cast<C>(__builtin_inf());
      places[i] = -1;
    }
  }
  C last() const { return sums[count - 1]; }
  void add(C sum, int32_t place) const {
    int64_t i = count - 1;
    for (; i > 0 && sums[i - 1] > sum; --i) {
      sums[i] = sums[i - 1];
      places[i] = places[i - 1];
    }
    sums[i] = sum;
    places[i] = place;
  }
};

template <class C, class T>
DIFFAD_SIMD Vec<C> load_as(const T* p, int64_t n) {
  constexpr int L = kLanes<C>;
  if constexpr (std::is_same_v<C, T>) {
    return n < L ? load_partial(p, n) : load(p);
  } else {
    typedef T Narrow __attribute__((vector_size(L * sizeof(T))));
    Narrow narrow = {};
    if (n < L) {
      std::memcpy(&narrow, p, n * sizeof(T));
    } else {
      std::memcpy(&narrow, p, sizeof(narrow));
    }
    return __builtin_convertvector(narrow, Vec<C>);
  }
}

// kWide rows of the sample from `first` on, feature by feature; its last row again in lanes beyond.
template <class C, class T>
void turn(const NearestArgs& a, int64_t first, C* turned) {
  constexpr int L = kLanes<C>;
  const T* sample = static_cast<const T*>(a.sample);
  for (int v = 0; v < kVectors; ++v) {
    for (int64_t f = 0; f < a.size; f += L) {
      Vec<C> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const int64_t row = first + v * L + i < a.samples ? first + v * L + i : a.samples - 1;
        block[i] = load_as<C>(sample + row * a.sample_stride + f, a.size - f);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(turned + (f + i) * kWide<C> + v * L, block[i]);
    }
  }
}

double bound(const NearestArgs& a) { return static_cast<double>(a.size + 8) * 0x1p-23; }

// Of each row of a block b |b|^2 / 2 (1 - g), then g |b|. False where a product may overflow.
bool measure(const NearestArgs& a, const float* turned, float* measures) {
  constexpr int L = kLanes<float>;
  const auto g = static_cast<float>(bound(a));
  bool fits = true;
  for (int v = 0; v < kVectors; ++v) {
    Vec<float> square = {};
    for (int64_t f = 0; f < a.size; ++f) {
      const Vec<float> x = load(turned + f * kWide<float> + v * L);
      square = fma(x, x, square);
    }
    for (int i = 0; i < L; ++i) fits &= square[i] < kLargest;
    store(measures + v * L, square * (0.5f - 0.5f * g));
    store(measures + (kVectors + v) * L, sqrt(square) * g);
  }
  return fits;
}

// Candidates of R rows `x`, padded() apart, among the lanes of `turned`, which are the rows of the
// sample from `first`. `lengths` are those of the rows, behind the block are its `measure`s.
template <By kBy, class C, int R>
void search(const NearestArgs& a, const C* x, const float* lengths, const C* turned, int64_t first,
            const Candidates<C>* found) {
  constexpr int L = kLanes<C>;
  const int64_t next = a.padded();
  Vec<C> sum[R][kVectors] = {};
  if constexpr (kBy == By::kProduct) {
    multiply_add<C, R, kVectors>(x, next, 1, turned, L, kWide<C>, a.size, sum);
    const C* measures = turned + next * kWide<C>;
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec<C> half = load(measures + v * L), reach = load(measures + (kVectors + v) * L);
        sum[r][v] = fma(splat(-lengths[r]), reach, half) - sum[r][v];
      }
    }
  } else {
    for (int64_t f = 0; f < a.size; ++f) {
      Vec<C> others[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) others[v] = load(turned + f * kWide<C> + v * L);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec<C> number = splat(x[r * next + f]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const Vec<C> difference = others[v] - number;
          sum[r][v] = fma(difference, difference, sum[r][v]);
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      if (!any_below(sum[r][v], splat(found[r].last()))) continue;
      C sums[L];
      store(sums, sum[r][v]);
      const int64_t place = first + v * L;
      for (int i = 0; i < L && place + i < a.samples; ++i) {
        if (sums[i] < found[r].last()) found[r].add(sums[i], static_cast<int32_t>(place + i));
      }
    }
  }
}

// Squared distances of a row of x to N of the sample, as in `search` by differences in float64.
template <int N, class T>
void exact(const NearestArgs& a, const double* x, const int32_t* places, double* sums) {
  const T* others[N];
  for (int i = 0; i < N; ++i) {
    others[i] = static_cast<const T*>(a.sample) + places[i] * a.sample_stride;
  }
  double sum[N] = {};
  for (int64_t f = 0; f < a.size; ++f) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const double difference = static_cast<double>(others[i][f]) - x[f];
      sum[i] = fma(difference, difference, sum[i]);
    }
  }
  for (int i = 0; i < N; ++i) sums[i] = sum[i];
}

// Exact sums of the row's candidates, in order; false where others may be nearer. `square` is that
// of its length.
template <By kBy, class T>
bool settle(const NearestArgs& a, const double* x, double square, const Candidates<float>& rough,
            double* sums) {
  if (rough.places[rough.count - 1] < 0) return false;
  int64_t i = 0;
  for (; i + 4 <= rough.count; i += 4) exact<4, T>(a, x, rough.places + i, sums + i);
  for (; i < rough.count; ++i) exact<1, T>(a, x, rough.places + i, sums + i);
  for (i = 1; i < rough.count; ++i) {
    const double sum = sums[i];
    int64_t k = i;
    for (; k > 0 && sums[k - 1] > sum; --k) sums[k] = sums[k - 1];
    sums[k] = sum;
  }
  const double last = sums[a.count - 1], w = rough.last();
  if (rough.count == a.samples || last == 0) return true;
  if constexpr (kBy == By::kProduct) return last <= square * (1 - 1e-9) + 2 * w - kSmallest;
  return w >= kSmallest && last <= w * (1 - static_cast<double>(a.size + 4) * 0x1p-23);
}

// For candidates that are missing, what is infinitely far, then what cannot be compared.
template <class T>
void fill_up(const NearestArgs& a, const double* x, const Candidates<double>& found) {
  int64_t have = 0, infinite = 0;
  while (have < a.count && found.places[have] >= 0) ++have;
  if (have == a.count) return;
  for (int32_t place = 0; place < a.samples; ++place) {
    double sum;
    exact<1, T>(a, x, &place, &sum);
    infinite += sum == __builtin_inf();
  }
  for (int64_t i = have + infinite; i < a.count; ++i) found.sums[i] = __builtin_nan("");
}

template <class T>
void run_item(const NearestArgs& a, int64_t first, void* scratch) {
  const int64_t left = a.rows - first;
  const int64_t rows = left < kRowsOfItem ? left : kRowsOfItem;
  const int64_t next = a.padded(), kept = a.candidates();
  auto* block = static_cast<char*>(scratch);
  auto* wide = reinterpret_cast<double*>(block + kVectors * kVectorBytes * (next + 2));
  auto* narrow = reinterpret_cast<float*>(wide + rows * next);
  auto* fine = reinterpret_cast<double*>(narrow + rows * next);
  auto* rough = reinterpret_cast<float*>(fine + rows * kept);
  auto* places = reinterpret_cast<int32_t*>(rough + rows * kept);
  // Of the rows that are open, which move up in the place of settled ones.
  int64_t open = rows, row_of[kRowsOfItem];
  double square[kRowsOfItem];
  float length[kRowsOfItem];
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(a.x) + (first + r) * a.x_stride;
    double sum = 0;
    for (int64_t f = 0; f < next; ++f) {
      const T number = f < a.size ? from[f] : T(0);
      wide[r * next + f] = static_cast<double>(number);
      if constexpr (sizeof(T) == 4) narrow[r * next + f] = number;
      sum = fma(static_cast<double>(number), static_cast<double>(number), sum);
    }
    row_of[r] = r;
    square[r] = sum;
    length[r] = static_cast<float>(__builtin_sqrt(sum));
  }
  // False where products overflow.
  const auto through = [&](auto by, auto* x, auto* sums) {
    using C = std::remove_reference_t<decltype(*x)>;
    Candidates<C> found[kRowsOfItem];
    for (int64_t r = 0; r < open; ++r) {
      found[r] = {sums + r * kept, places + r * kept, kept};
      found[r].clear();
    }
    auto* turned = reinterpret_cast<C*>(block);
    for (int64_t from = 0; from < a.samples; from += kWide<C>) {
      turn<C, T>(a, from, turned);
      if constexpr (by == By::kProduct) {
        if (!measure(a, turned, turned + next * kWide<C>)) return false;
      }
      for_even_blocks(open, kPairRows, [&](int64_t r, int64_t count) {
        with_rows<kPairRows>(count, [&](auto together) {
          search<by, C, together>(a, x + r * next, length + r, turned, from, found + r);
        });
      });
    }
    return true;
  };
  const auto write = [&](int64_t r, const double* sums) {
    double* out = a.out + (first + row_of[r]) * a.count;
    for (int64_t i = 0; i < a.count; ++i) out[i] = __builtin_sqrt(sums[i]);
  };
  const auto settle_all = [&](auto by) {
    if (!through(by, narrow, rough)) return;
    int64_t still = 0;
    for (int64_t r = 0; r < open; ++r) {
      const double* x = wide + r * next;
      const Candidates<float> of_row{rough + r * kept, places + r * kept, kept};
      if (square[r] < kLargest || by != By::kProduct) {
        if (settle<by, T>(a, x, square[r], of_row, fine)) {
          write(r, fine);
          continue;
        }
      }
      if (still < r) {
        std::memcpy(wide + still * next, x, next * sizeof(double));
        std::memcpy(narrow + still * next, narrow + r * next, next * sizeof(float));
        square[still] = square[r];
        length[still] = length[r];
        row_of[still] = row_of[r];
      }
      ++still;
    }
    open = still;
  };
  using Product = std::integral_constant<By, By::kProduct>;
  using Difference = std::integral_constant<By, By::kDifference>;
  if constexpr (sizeof(T) == 4) {
    if (rows >= kFewest) settle_all(Product());
    if (open > 0) settle_all(Difference());
  }
  if (open == 0) return;
  through(Difference(), wide, fine);
  for (int64_t r = 0; r < open; ++r) {
    fill_up<T>(a, wide + r * next, {fine + r * kept, places + r * kept, kept});
    write(r, fine + r * kept);
  }
}

}  // namespace

void nearest_distances(const NearestArgs& args, void* scratch, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (args.dtype == DType::kDouble) {
      run_item<double>(args, item * kRowsOfItem, scratch);
    } else {
      run_item<float>(args, item * kRowsOfItem, scratch);
    }
  }
}

}  // namespace diffad::DIFFAD_ISA
