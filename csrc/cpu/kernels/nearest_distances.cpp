// nearest_distances: the sample passes by in blocks of as many rows as a vector has lanes, turned
// so that the lanes are the sample's, and some rows of x take their distances to it on the way.
//
// Squared distances are sums of squared differences, feature by feature in one chain of fma. In
// float32 a sum s of D of them is wrong by some D + 3 roundings of s, for all terms are positive
// (Higham 2002, 3.1), unless it is so small that squares underflow. So the search runs in float32
// and keeps two candidates more than asked for, the last of which has the sum w: with a bound twice
// as wide as needed, whatever was left out is no nearer than w (1 - (D + 4) 2^-23). Where the last
// of the asked, in float64, is as near as that, none was missed; elsewhere (equally far neighbours,
// very large and very small numbers) the row is searched again, in float64.
#include "nearest_distances.h"

#include "simd.h"

namespace diffad::DIFFAD_ISA {
namespace {

// Rows of x whose sums stay in registers beside a block of the sample.
#if defined(__AVX512F__)
constexpr int kTogether = 12;
#else
constexpr int kTogether = 6;
#endif
// Bytes of the sample that stay in the second-level cache while an item's rows pass by.
constexpr int64_t kChunkBytes = int64_t{256} << 10;
// Sums below this may have lost squares that underflowed.
constexpr float kSmallest = 1e-30f;

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

// Candidates of R rows `x` (padded() apart, filled up with zeros) among rows [begin, end) of the
// sample.
template <class C, class T, int R>
void search(const NearestArgs& a, const C* x, int64_t begin, int64_t end,
            const Candidates<C>* found) {
  constexpr int L = kLanes<C>;
  const T* sample = static_cast<const T*>(a.sample);
  const int64_t next = a.padded();
  for (int64_t first = begin; first < end; first += L) {
    Vec<C> sum[R] = {};
    for (int64_t f = 0; f < a.size; f += L) {
      Vec<C> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const int64_t row = first + i < end ? first + i : end - 1;
        square[i] = load_as<C>(sample + row * a.sample_stride + f, a.size - f);
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const Vec<C> difference = square[i] - splat(x[r * next + f + i]);
          sum[r] = fma(difference, difference, sum[r]);
        }
      }
    }
    const int64_t lanes = end - first < L ? end - first : L;
    for (int r = 0; r < R; ++r) {
      if (!any_below(sum[r], splat(found[r].last()))) continue;
      C sums[L];
      store(sums, sum[r]);
      for (int i = 0; i < lanes; ++i) {
        if (sums[i] < found[r].last()) found[r].add(sums[i], static_cast<int32_t>(first + i));
      }
    }
  }
}

template <class C, class T, int R = kTogether>
void search_for(int64_t rows, const NearestArgs& a, const C* x, int64_t begin, int64_t end,
                const Candidates<C>* found) {
  if constexpr (R > 1) {
    if (rows < R) return search_for<C, T, R - 1>(rows, a, x, begin, end, found);
  }
  search<C, T, R>(a, x, begin, end, found);
}

// The squared distance of a row of x to one of the sample, as in `search` in float64.
template <class T>
double exact(const NearestArgs& a, const double* x, int64_t place) {
  const T* sample = static_cast<const T*>(a.sample) + place * a.sample_stride;
  double sum = 0;
  for (int64_t f = 0; f < a.size; ++f) {
    const double difference = static_cast<double>(sample[f]) - x[f];
    sum = fma(difference, difference, sum);
  }
  return sum;
}

// Exact sums of the row's candidates, in order; false where others may be nearer.
template <class T>
bool settle(const NearestArgs& a, const double* x, const Candidates<float>& rough, double* sums) {
  for (int64_t i = 0; i < rough.count; ++i) {
    if (rough.places[i] < 0) return false;
    const double sum = exact<T>(a, x, rough.places[i]);
    int64_t k = i;
    for (; k > 0 && sums[k - 1] > sum; --k) sums[k] = sums[k - 1];
    sums[k] = sum;
  }
  if (rough.count == a.samples || sums[a.count - 1] == 0) return true;
  const double others = rough.last() * (1 - static_cast<double>(a.size + 4) * 0x1p-23);
  return rough.last() >= kSmallest && sums[a.count - 1] <= others;
}

// For candidates that are missing, what is infinitely far, then what cannot be compared.
template <class T>
void fill_up(const NearestArgs& a, const double* x, const Candidates<double>& found) {
  int64_t have = 0, infinite = 0;
  while (have < a.count && found.places[have] >= 0) ++have;
  if (have == a.count) return;
  for (int64_t place = 0; place < a.samples; ++place) {
    infinite += exact<T>(a, x, place) == __builtin_inf();
  }
  for (int64_t i = have + infinite; i < a.count; ++i) found.sums[i] = __builtin_nan("");
}

template <class T>
void run_item(const NearestArgs& a, int64_t first, void* scratch) {
  const int64_t left = a.rows - first;
  const int64_t rows = left < kRowsOfItem ? left : kRowsOfItem;
  const int64_t next = a.padded(), kept = a.candidates();
  auto* wide = static_cast<double*>(scratch);
  auto* narrow = reinterpret_cast<float*>(wide + rows * next);
  auto* fine = reinterpret_cast<double*>(narrow + rows * next);
  auto* rough = reinterpret_cast<float*>(fine + rows * kept);
  auto* places = reinterpret_cast<int32_t*>(rough + rows * kept);
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(a.x) + (first + r) * a.x_stride;
    for (int64_t f = 0; f < next; ++f) {
      const T number = f < a.size ? from[f] : T(0);
      wide[r * next + f] = static_cast<double>(number);
      if constexpr (sizeof(T) == 4) narrow[r * next + f] = number;
    }
  }
  const auto through = [&](auto* x, auto* sums, int64_t count) {
    using C = std::remove_reference_t<decltype(*x)>;
    Candidates<C> found[kRowsOfItem];
    for (int64_t r = 0; r < count; ++r) {
      found[r] = {sums + r * kept, places + r * kept, kept};
      found[r].clear();
    }
    const int64_t row_bytes = a.size * static_cast<int64_t>(sizeof(T));
    const int64_t chunk = (kChunkBytes / row_bytes / 16 + 1) * 16;
    for (int64_t begin = 0; begin < a.samples; begin += chunk) {
      const int64_t end = begin + chunk < a.samples ? begin + chunk : a.samples;
      for (int64_t r = 0; r < count; r += kTogether) {
        const int64_t together = count - r < kTogether ? count - r : kTogether;
        search_for<C, T>(together, a, x + r * next, begin, end, found + r);
      }
    }
  };
  const auto write = [&](int64_t r, const double* sums) {
    double* out = a.out + (first + r) * a.count;
    for (int64_t i = 0; i < a.count; ++i) out[i] = __builtin_sqrt(sums[i]);
  };
  // Rows that are open move up, in the place of settled ones.
  int64_t open = 0, row_of[kRowsOfItem];
  if constexpr (sizeof(T) == 4) through(narrow, rough, rows);
  for (int64_t r = 0; r < rows; ++r) {
    const double* x = wide + r * next;
    if constexpr (sizeof(T) == 4) {
      if (settle<T>(a, x, {rough + r * kept, places + r * kept, kept}, fine)) {
        write(r, fine);
        continue;
      }
      if (open < r) std::memcpy(wide + open * next, x, next * sizeof(double));
    }
    row_of[open++] = r;
  }
  through(wide, fine, open);
  for (int64_t k = 0; k < open; ++k) {
    fill_up<T>(a, wide + k * next, {fine + k * kept, places + k * kept, kept});
    write(row_of[k], fine + k * kept);
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
