// Scores are compared as unsigned integers, their keys: a float's bits have its order if those of
// negative numbers are inverted and the sign is turned. -0 becomes 0 first, which it equals.
#include "metrics.h"

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace diffad {
namespace {

// bool or floating-point, dense, never converted: see the bindings below.
template <class T>
using Array = py::array_t<T, py::array::c_style>;
template <class T>
using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <class K>
constexpr K kSign = K{1} << (8 * sizeof(K) - 1);

template <class T>
inline Key<T> key_of(T x) {
  x += 0;
  Key<T> bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits ^ (-(bits >> (8 * sizeof(x) - 1)) | kSign<Key<T>>);
}

template <class T>
inline bool is_finite(T x) {
  return x - x == 0;
}

template <class T>
inline T score_of(Key<T> key) {
  key ^= key & kSign<Key<T>> ? kSign<Key<T>> : ~Key<T>{0};
  T x;
  std::memcpy(&x, &key, sizeof(x));
  return x;
}

void check_sizes(py::ssize_t labels, py::ssize_t scores) {
  if (labels != scores) throw std::invalid_argument("labels and scores differ in size");
}

// The array takes the vector's memory over.
template <class T>
py::array_t<T> to_numpy(std::vector<T>&& values) {
  auto* owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

template <class T>
bool all_finite(const Array<T>& scores) {
  const T* x = scores.data();
  const int64_t n = scores.size();
  py::gil_scoped_release release;
  Key<T> bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= !is_finite(x[i]);
  return !bad;
}

// Calls f(begin, end) for each run of `anomalous` labels. Normal ones are skipped 8 at a time.
template <class F>
inline void for_runs(const bool* anomalous, int64_t n, F&& f) {
  const auto* label = reinterpret_cast<const unsigned char*>(anomalous);
  int64_t i = 0;
  while (true) {
    for (uint64_t word = 0; i + 8 <= n; i += 8) {
      std::memcpy(&word, label + i, 8);
      if (word) break;
    }
    while (i < n && !label[i]) ++i;
    if (i == n) return;
    const int64_t begin = i;
    const void* end = std::memchr(label + i, 0, n - i);
    i = end ? static_cast<const unsigned char*>(end) - label : n;
    f(begin, i);
  }
}

// A row's consecutive anomalous pixels. `parent` leads to an earlier run of the same region or is
// the run itself, the region's first.
struct Run {
  int64_t begin, end;
  uint32_t parent;
};

uint32_t first_of_region(std::vector<Run>& runs, uint32_t i) {
  while (runs[i].parent != i) i = runs[i].parent = runs[runs[i].parent].parent;
  return i;
}

// All runs of a mask, row by row, those of an 8-connected region linked to its first.
std::vector<Run> connected_runs(const bool* mask, int64_t rows, int64_t cols) {
  std::vector<Run> runs;
  uint32_t above = 0, above_end = 0;  // the previous row's runs
  for (int64_t y = 0; y < rows; ++y) {
    const int64_t row = y * cols;
    const auto row_begin = static_cast<uint32_t>(runs.size());
    for_runs(mask + row, cols, [&](int64_t begin, int64_t end) {
      const auto self = static_cast<uint32_t>(runs.size());
      runs.push_back({row + begin, row + end, self});
      // Runs above touch if they share a column or a corner.
      const int64_t left = row - cols + begin, right = row - cols + end;
      while (above < above_end && runs[above].end < left) ++above;
      for (uint32_t i = above; i < above_end && runs[i].begin <= right; ++i) {
        const uint32_t a = first_of_region(runs, i), b = first_of_region(runs, self);
        runs[std::max(a, b)].parent = std::min(a, b);
      }
    });
    above = row_begin;
    above_end = static_cast<uint32_t>(runs.size());
  }
  return runs;
}

template <class T>
py::tuple anomalous_scores(const Array<bool>& anomalous, const Array<T>& scores, bool regions) {
  check_sizes(anomalous.size(), scores.size());
  if (regions && anomalous.ndim() != 2) throw std::invalid_argument("a mask has two axes");
  if (anomalous.size() > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("more than 2^32 - 1 pixels in one array");
  }
  std::vector<T> found;
  std::vector<uint32_t> sizes;
  {
    const bool* mask = anomalous.data();
    const int64_t rows = regions ? anomalous.shape(0) : 1;
    const int64_t cols = regions ? anomalous.shape(1) : anomalous.size();
    const T* x = scores.data();
    py::gil_scoped_release release;
    if (!regions) {
      for_runs(mask, cols, [&](int64_t b, int64_t e) { found.insert(found.end(), x + b, x + e); });
    } else {
      std::vector<Run> runs = connected_runs(mask, rows, cols);
      std::vector<uint32_t> size(runs.size());  // of the region, at its first run
      int64_t pixels = 0;
      for (uint32_t i = 0; i < runs.size(); ++i) {
        size[first_of_region(runs, i)] += static_cast<uint32_t>(runs[i].end - runs[i].begin);
        pixels += runs[i].end - runs[i].begin;
      }
      found.reserve(pixels);
      sizes.reserve(pixels);
      for (uint32_t i = 0; i < runs.size(); ++i) {
        found.insert(found.end(), x + runs[i].begin, x + runs[i].end);
        sizes.insert(sizes.end(), runs[i].end - runs[i].begin, size[first_of_region(runs, i)]);
      }
    }
  }
  return py::make_tuple(to_numpy(std::move(found)), to_numpy(std::move(sizes)));
}

// A score and the size of its region.
template <class K>
struct Item {
  K key;
  uint32_t size;
};

// Sorts by the key, equal ones in their order: a stable distribution by each digit of 11 bits,
// from the least significant. A digit that all share is passed over.
template <class K>
void radix_sort(std::vector<Item<K>>& items) {
  constexpr int kBits = 11, kDigits = (8 * sizeof(K) + kBits - 1) / kBits, kMask = (1 << kBits) - 1;
  std::vector<int64_t> start(kDigits << kBits);
  for (const auto& item : items) {
    for (int d = 0; d < kDigits; ++d) ++start[d << kBits | (item.key >> (d * kBits) & kMask)];
  }
  std::vector<Item<K>> other(items.size());
  for (int d = 0; d < kDigits; ++d) {
    int64_t* begin = &start[d << kBits];
    if (begin[items[0].key >> (d * kBits) & kMask] == static_cast<int64_t>(items.size())) continue;
    int64_t total = 0;
    for (int i = 0; i <= kMask; ++i) total += std::exchange(begin[i], total);
    for (const auto& item : items) other[begin[item.key >> (d * kBits) & kMask]++] = item;
    items.swap(other);
  }
}

template <class T>
py::tuple distinct_scores(const Array<T>& scores, const Array<uint32_t>& sizes) {
  const int64_t n = scores.size();
  const bool regions = sizes.size() > 0;
  if (n == 0 || n > std::numeric_limits<uint32_t>::max()) {
    throw std::invalid_argument("the number of scores must be in [1, 2^32 - 1]");
  }
  if (regions) check_sizes(sizes.size(), n);
  std::vector<T> levels;
  std::vector<uint32_t> counts;
  std::vector<double> shares;
  {
    const T* x = scores.data();
    const uint32_t* size = sizes.data();
    py::gil_scoped_release release;
    std::vector<Item<Key<T>>> items(n);
    for (int64_t i = 0; i < n; ++i) items[i] = {key_of(x[i]), regions ? size[i] : 1};
    radix_sort(items);
    int64_t distinct = 1;
    for (int64_t i = 1; i < n; ++i) distinct += items[i].key != items[i - 1].key;
    levels.reserve(distinct);
    counts.reserve(distinct);
    if (regions) shares.reserve(distinct);
    for (int64_t i = 0; i < n; ++i) {
      if (i == 0 || items[i].key != items[i - 1].key) {
        levels.push_back(score_of<T>(items[i].key));
        counts.push_back(0);
        if (regions) shares.push_back(0);
      }
      ++counts.back();
      if (regions) shares.back() += 1.0 / items[i].size;
    }
  }
  return py::make_tuple(to_numpy(std::move(levels)), to_numpy(std::move(counts)),
                        to_numpy(std::move(shares)));
}

// Calls f(t) for each t < count, side by side. `f` throws nothing.
template <class F>
void in_threads(int count, F&& f) {
  std::vector<std::thread> others;
  others.reserve(count);
  try {
    for (int t = 1; t < count; ++t) others.emplace_back([&f, t] { f(t); });
  } catch (const std::exception&) {
    // The process may have no more threads or memory: the caller's thread does the rest.
  }
  f(0);
  for (int t = static_cast<int>(others.size()) + 1; t < count; ++t) f(t);
  for (auto& other : others) other.join();
}

// Counts normal scores between and at the levels. The range of the levels' keys is cut into at most
// 4096 stretches, each stretch into one to two cells a level, and a cell knows how many levels lie
// before it. Most cells hold one level at most, whatever the distribution; the search within the
// others is bounded by its logarithm. Scores are gathered into batches and brought into the order
// of their stretches first, which keeps what is looked up for one stretch in the nearest cache.
// Threads share a batch, then its stretches; counts do not depend on how many they are.
template <class T>
class NormalCounter {
  using K = Key<T>;
 public:
  NormalCounter(const Array<T>& levels, int threads)
      : threads_(threads),
        keys_(levels.size() + 1),
        batch_size_(std::max<int64_t>(levels.size() / 4, 1 << 20)) {
    if (threads < 1) throw std::invalid_argument("at least one thread counts");
    const T* x = levels.data();
    const auto n = static_cast<uint32_t>(levels.size());
    if (n == 0 || levels.size() > (int64_t{1} << 29)) {
      throw std::invalid_argument("the number of levels must be in [1, 2^29]");
    }
    for (uint32_t i = 0; i < n; ++i) {
      if (!is_finite(x[i]) || (i && !(x[i - 1] < x[i]))) {
        throw std::invalid_argument("levels must be finite and ascend");
      }
      keys_[i] = key_of(x[i]);
    }
    lowest_ = keys_[0] - 1;
    highest_ = keys_[n - 1] + 1;
    for (uint32_t i = 0; i < n; ++i) keys_[i] -= lowest_;
    keys_[n] = ~K{0};  // above every key that is looked up

    while ((highest_ - lowest_) >> shift_ >= 4096) ++shift_;
    std::vector<uint32_t> number(((highest_ - lowest_) >> shift_) + 1);  // of a stretch's levels
    for (uint32_t i = 0; i < n; ++i) ++number[keys_[i] >> shift_];
    uint32_t cells = 0;
    for (const uint32_t levels_here : number) {
      int bits = 0;
      while (bits < shift_ && (1u << bits) < levels_here) ++bits;
      stretches_.push_back({cells, shift_ - bits});
      cells += 1u << bits;
    }
    stretches_.push_back({cells, 0});  // the end
    before_.resize(cells + 1);
    for (uint32_t i = 0; i < n; ++i) {
      const K s = keys_[i] >> shift_;
      ++before_[stretches_[s].first + ((keys_[i] - (s << shift_)) >> stretches_[s].shift) + 1];
    }
    for (uint32_t i = 0; i < cells; ++i) before_[i + 1] += before_[i];
    bins_.resize(2 * n + 1);
    batch_.reserve(batch_size_);
    sorted_.reserve(batch_size_);
  }

  void add(const Array<bool>& anomalous, const Array<T>& scores) {
    check_sizes(anomalous.size(), scores.size());
    const bool* labels = anomalous.data();
    const T* x = scores.data();
    const int64_t n = scores.size();
    py::gil_scoped_release release;
    int64_t begin = 0;
    for_runs(labels, n, [&](int64_t run, int64_t end) {
      gather(x + begin, run - begin);
      begin = end;
    });
    gather(x + begin, n - begin);
  }

  // Entry 2k: scores between levels k - 1 and k; entry 2k + 1: those equal to level k.
  const std::vector<int64_t>& bins() {
    count();
    return bins_;
  }

 private:
  struct Stretch {
    uint32_t first;  // cell
    int shift;       // a cell is 2^shift keys
  };

  void gather(const T* x, int64_t n) {
    while (n > 0) {
      const int64_t had = batch_.size(), more = std::min(n, batch_size_ - had);
      batch_.resize(had + more);
      for (int64_t i = 0; i < more; ++i) {
        const K key = key_of(x[i]);
        batch_[had + i] = (key < lowest_ ? lowest_ : key > highest_ ? highest_ : key) - lowest_;
      }
      if (had + more == batch_size_) count();
      x += more;
      n -= more;
    }
  }

  void count() {
    const int64_t size = batch_.size(), stretches = stretches_.size() - 1;
    const int threads = static_cast<int>(std::clamp<int64_t>(size / kWorthAThread, 1, threads_));
    // Of each thread, where its next key of a stretch goes.
    std::vector<uint32_t> places(threads * stretches);
    const auto for_part = [&](int t, auto&& f) {
      uint32_t* place = &places[t * stretches];
      const K* end = batch_.data() + size * (t + 1) / threads;
      for (const K* key = batch_.data() + size * t / threads; key < end; ++key) {
        f(*key, place[*key >> shift_]);
      }
    };
    in_threads(threads, [&](int t) { for_part(t, [](K, uint32_t& place) { ++place; }); });
    std::vector<uint32_t> starts(stretches + 1);
    uint32_t total = 0;
    for (int64_t s = 0; s < stretches; ++s) {
      starts[s] = total;
      for (int t = 0; t < threads; ++t) total += std::exchange(places[t * stretches + s], total);
    }
    starts[stretches] = total;
    sorted_.resize(size);
    in_threads(threads, [&](int t) {
      for_part(t, [&](K key, uint32_t& place) { sorted_[place++] = key; });
    });
    std::vector<int64_t> first(threads + 1, stretches);  // stretch of a thread
    for (int t = 0; t < threads; ++t) {
      const auto after = std::lower_bound(starts.begin(), starts.end(), size * t / threads);
      first[t] = std::min<int64_t>(after - starts.begin(), stretches);
    }
    // Scores above the last level of a thread's stretches: of their bin the next thread has a part.
    std::vector<int64_t> above(threads);
    const auto next_level = [&](int t) { return before_[stretches_[first[t + 1]].first]; };
    in_threads(threads, [&](int t) {
      const uint32_t next = next_level(t);
      int64_t beyond = 0;
      for (int64_t s = first[t]; s < first[t + 1]; ++s) {
        const K base = static_cast<K>(s) << shift_;
        const uint32_t* before = &before_[stretches_[s].first];
        const int shift = stretches_[s].shift;
        const K* end = sorted_.data() + starts[s + 1];
        for (const K* key = sorted_.data() + starts[s]; key < end; ++key) {
          const uint32_t* cell = before + ((*key - base) >> shift);
          uint32_t i = cell[0];
          i += keys_[i] < *key;
          if (__builtin_expect(keys_[i] < *key, 0)) {
            i = std::lower_bound(&keys_[i], &keys_[cell[1]], *key) - keys_.data();
          }
          if (i == next) {
            ++beyond;
          } else {
            ++bins_[2 * i + (keys_[i] == *key)];
          }
        }
      }
      above[t] = beyond;
    });
    for (int t = 0; t < threads; ++t) bins_[2 * next_level(t)] += above[t];
    batch_.clear();
  }

  // Scores that are worth a thread.
  static constexpr int64_t kWorthAThread = 1 << 16;
  const int threads_;
  // Keys, less `lowest_`. One below and one above the levels stand for all scores beyond them.
  K lowest_, highest_;
  std::vector<K> keys_;
  int shift_ = 0;  // a stretch is 2^shift_ keys
  std::vector<Stretch> stretches_;
  std::vector<uint32_t> before_;  // levels before each cell
  std::vector<int64_t> bins_;
  int64_t batch_size_;  // large against the tables, which a batch goes through once
  std::vector<K> batch_, sorted_;
};

// The curves, from their start. Lowering the threshold to a level first passes the normal scores
// above it and then, in one straight line, those at it together with what the level gains.

template <class G>
double curve_area(const Array<int64_t>& bins, const Array<G>& gains, double max_fpr) {
  const int64_t levels = gains.size();
  check_sizes(bins.size(), 2 * levels + 1);
  const int64_t* passed = bins.data();
  const G* gain = gains.data();
  py::gil_scoped_release release;
  double normal = 0, all = 0;
  for (int64_t i = 0; i <= 2 * levels; ++i) normal += static_cast<double>(passed[i]);
  for (int64_t k = levels - 1; k >= 0; --k) all += static_cast<double>(gain[k]);
  double area = 0, x = 0, y = 0, sum = 0;  // x in normal scores
  const double limit = max_fpr * normal;
  const auto line_to = [&](double next_x, double next_y) {
    if (next_x > limit) {
      next_y = y + (next_y - y) * ((limit - x) / (next_x - x));
      next_x = limit;
    }
    area += 0.5 * (next_x - x) * (y + next_y);
    x = next_x;
    y = next_y;
  };
  for (int64_t k = levels - 1; k >= 0 && x < limit; --k) {
    line_to(x + static_cast<double>(passed[2 * k + 2]), y);
    if (x >= limit) break;
    sum += static_cast<double>(gain[k]);
    line_to(x + static_cast<double>(passed[2 * k + 1]), sum / all);
  }
  if (x < limit) line_to(limit, y);
  return area / normal;
}

double f1_max(const Array<int64_t>& bins, const Array<uint32_t>& counts) {
  const int64_t levels = counts.size();
  check_sizes(bins.size(), 2 * levels + 1);
  const int64_t* passed = bins.data();
  const uint32_t* count = counts.data();
  py::gil_scoped_release release;
  int64_t positives = 0, hits = 0, predicted = 0;
  for (int64_t k = 0; k < levels; ++k) positives += count[k];
  double best = 0;
  for (int64_t k = levels - 1; k >= 0; --k) {
    hits += count[k];
    predicted += passed[2 * k + 2] + passed[2 * k + 1] + count[k];
    best = std::max(best, 2.0 * static_cast<double>(hits) /
                              static_cast<double>(predicted + positives));
  }
  return best;
}

py::arg dense(const char* name) { return py::arg(name).noconvert(); }

template <class T>
void register_for(py::module_& m, const char* counter) {
  m.def("all_finite", &all_finite<T>, dense("scores"));
  m.def("anomalous_scores", &anomalous_scores<T>, dense("anomalous"), dense("scores"),
        py::arg("regions"));
  m.def("distinct_scores", &distinct_scores<T>, dense("scores"), dense("sizes"));
  py::class_<NormalCounter<T>>(m, counter)
      .def("add", &NormalCounter<T>::add, dense("anomalous"), dense("scores"))
      .def("bins", [](const py::object& self) {  // a view that keeps its owner alive
        const auto& bins = self.cast<NormalCounter<T>&>().bins();
        return py::array_t<int64_t>(static_cast<py::ssize_t>(bins.size()), bins.data(), self);
      });
  m.def("NormalCounter",
        [](const Array<T>& levels, int threads) { return NormalCounter<T>(levels, threads); },
        dense("levels"), py::arg("threads"));
}

}  // namespace

void register_metrics(py::module_& m) {
  register_for<float>(m, "NormalCounterFloat");
  register_for<double>(m, "NormalCounterDouble");
  m.def("curve_area", &curve_area<double>, dense("bins"), dense("gains"), py::arg("max_fpr"));
  m.def("curve_area", &curve_area<uint32_t>, dense("bins"), dense("gains"), py::arg("max_fpr"));
  m.def("f1_max", &f1_max, dense("bins"), dense("counts"));
}

}  // namespace diffad
