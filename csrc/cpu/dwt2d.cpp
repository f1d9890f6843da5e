// dwt2d and idwt2d on the CPU, for any pair of filters and any border.
//
// One axis of the analysis of a signal x of n samples, extended by E beyond its borders, is
//   c_b[o] = sum over j of f_b[j] (E x)[2 o + s - j],   b = low, high,
// that is c_b = M_b x with the sparse matrix
//   M_b[o, i] = sum over e of f_b[2 o + s - e] E[e, i],
// where s = 1, or F/2 for the periodization. A synthesis with the filters g_b of reconstruction is
//   x[i] = sum over k, b of c_b[k] g_b[i + F - 1 - s - 2 k] = sum over b of (M_b^T c_b)[i]
// for f_b[j] = g_b[F - 1 - j] and an extension by zeros, or in the periodization by period. So there
// are two operators, with M and with M^T, and each is the adjoint of the other. Far from the
// borders both are plain filters. Near them E decides: its rows beyond the signal, made here in
// double, are all that a pass along x needs. Down the columns, where the extension would be a copy
// of the image, a result near a border has its own list of taps. That serves every border, and
// signals that are shorter than the filter.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "../common/tensor.h"
#include "dtype_of.h"
#include "haar.h"
#include "kernels/dwt2d.h"
#include "layout.h"

namespace diffad {
namespace {

// Fewer samples than this are not worth a thread.
constexpr int64_t kGrain = 16384;

// E: in the order of MODES in reference/wavelet.py, and the periodization of a signal whose end was
// cropped, which counts as zeros.
enum Border : int64_t {
  kZero, kConstant, kSymmetric, kPeriodic, kSmooth, kPeriodization, kReflect, kAntisymmetric,
  kAntireflect, kCropped, kBorders
};

int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }
int64_t halved(int64_t a) { return a >> 1; }  // rounded down

// Calls f(i, E[e, i]) for the samples i of 0..n-1 that make the extended one at e. `m` is the
// number of coefficients.
template <class F>
void extension(Border border, int64_t n, int64_t m, int64_t e, F f) {
  if (0 <= e && e < n) return f(e, 1.0);
  switch (border) {
    case kConstant: return f(e < 0 ? 0 : n - 1, 1.0);
    case kPeriodic: return f(modulo(e, n), 1.0);
    case kPeriodization:  // an odd length is first made even by repeating the last sample
      return f(std::min(modulo(e, n + n % 2), n - 1), 1.0);
    case kCropped:
      if (const int64_t i = modulo(e, 2 * m); i < n) f(i, 1.0);
      return;
    case kSymmetric:
    case kAntisymmetric: {  // c b a | a b c | c b a, of period 2 n
      const int64_t r = modulo(e, 2 * n);
      return f(std::min(r, 2 * n - 1 - r), border == kSymmetric || r < n ? 1.0 : -1.0);
    }
    case kSmooth: {  // the straight line through the two outermost samples
      if (n == 1) return f(0, 1.0);
      const int64_t end = e < 0 ? 0 : n - 1, next = e < 0 ? 1 : n - 2;
      const double distance = e < 0 ? -e : e - (n - 1);
      f(end, 1.0 + distance);
      return f(next, -distance);
    }
    case kReflect:
    case kAntireflect: {  // c b | a b c | b a, of period 2 n - 2
      const int64_t period = 2 * n - 2, r = modulo(e, period);
      const int64_t i = std::min(r, period - r);
      if (border == kReflect) return f(i, 1.0);
      // Point reflections at the first and the last sample: e(i + period) = e(i) + 2 (last - first).
      const double turned = r >= n, periods = (e - r) / period;
      f(i, 1 - 2 * turned);
      f(n - 1, 2 * (turned + periods));
      return f(0, -2 * periods);
    }
    default: return;  // zeros
  }
}

struct Filters {
  const double *low, *high;
  int64_t length, shift;
};

// E[e, i] for all e beyond the n samples that m coefficients reach, in the order of e.
std::vector<DwtImage> images_of(Border border, int64_t n, int64_t m, const Filters& f) {
  std::vector<DwtImage> images;
  const auto beyond = [&](int64_t e) {
    extension(border, n, m, e,
              [&](int64_t i, double weight) { images.push_back({e, i, weight}); });
  };
  for (int64_t e = f.shift - f.length + 1; e < 0; ++e) beyond(e);
  for (int64_t e = n; e <= 2 * (m - 1) + f.shift; ++e) beyond(e);
  return images;
}

// The taps of the rows at the borders, a list after another.
class Axis {
 public:
  // M: n samples to m coefficients.
  static Axis analysis(Border border, int64_t n, int64_t m, const Filters& f) {
    Axis axis;
    axis.set_inner(halved(f.length - f.shift), halved(n - 1 - f.shift) + 1, m);
    axis.for_borders(m, [&](int64_t o) {
      for (int64_t j = 0; j < f.length; ++j) {
        extension(border, n, m, 2 * o + f.shift - j, [&](int64_t i, double weight) {
          axis.add(i, weight * f.low[j], weight * f.high[j]);
        });
      }
    });
    return axis;
  }

  // M^T: m coefficients to n samples. The inner ones are whole pairs, see dwt_before_pairs.
  static Axis synthesis(Border border, int64_t n, int64_t m, const Filters& f) {
    const std::vector<DwtImage> images = images_of(border, n, m, f);
    int64_t begin = std::max<int64_t>(0, f.shift - 1);
    int64_t end = std::min(n, 2 * m - f.length + f.shift + 1);
    for (const DwtImage& image : images) {
      if (2 * image.sample < n) {
        begin = std::max(begin, image.sample + 1);
      } else {
        end = std::min(end, image.sample);
      }
    }
    Axis axis;
    axis.set_inner(begin + ((begin - f.shift + 1) & 1), end - ((end - f.shift + 1) & 1), n);
    axis.for_borders(n, [&](int64_t i) {
      const auto from = [&](int64_t e, double weight) {
        const int64_t last = std::min(m - 1, halved(e - f.shift + f.length - 1));
        for (int64_t o = std::max<int64_t>(0, halved(e - f.shift + 1)); o <= last; ++o) {
          const int64_t j = 2 * o + f.shift - e;
          axis.add(o, weight * f.low[j], weight * f.high[j]);
        }
      };
      from(i, 1.0);
      for (const DwtImage& image : images) {
        if (image.sample == i) from(image.extended, image.weight);
      }
    });
    return axis;
  }

  DwtAxis get() const { return {begin_, end_, starts_.data(), taps_.data()}; }

  int longest() const {
    int64_t most = 0;
    for (size_t i = 1; i < starts_.size(); ++i) most = std::max(most, starts_[i] - starts_[i - 1]);
    return static_cast<int>(most);
  }

 private:
  void set_inner(int64_t begin, int64_t end, int64_t count) {
    begin = std::max<int64_t>(begin, 0);
    end = std::min(end, count);
    if (begin < end) {
      begin_ = begin;
      end_ = end;
    }
  }

  template <class F>
  void for_borders(int64_t count, F f) {
    for (int64_t i = 0; i < count; ++i) {
      if (i == begin_) i = end_;
      if (i == count) break;
      f(i);
      starts_.push_back(taps_.size());
    }
  }

  // To the list begun last; a source that is in it already gets one sum of weights.
  void add(int64_t source, double low, double high) {
    for (size_t k = starts_.back(); k < taps_.size(); ++k) {
      if (taps_[k].source == source) {
        taps_[k].low += low;
        taps_[k].high += high;
        return;
      }
    }
    taps_.push_back({source, low, high});
  }

  int64_t begin_ = 0, end_ = 0;
  std::vector<int64_t> starts_{0};
  std::vector<DwtTap> taps_;
};

// At even sizes nothing reaches over the borders of Haar's filters, and M M^T = 1.
bool is_haar(const Filters& f, int64_t height, int64_t width, int64_t rows, int64_t cols) {
  const double r = std::sqrt(0.5);
  const auto near = [](double a, double b) { return std::abs(a - b) < 1e-15; };
  return f.length == 2 && f.shift == 1 && height == 2 * rows && width == 2 * cols &&
         near(f.low[0], r) && near(f.low[1], r) && near(f.high[0], -r) && near(f.high[1], r);
}

using Bands = std::tuple<Tensor, Tensor, Tensor, Tensor>;

DwtPlane plane_of(void* data, const Tensor& x) {
  return {data, x.stride(0), x.stride(1), x.stride(2)};
}

// `image` (N,C,H,W) to or from `bands`, all with rows as with_dense_rows leaves them.
void transform(bool analysis, void* image_data, const Tensor& image,
               const std::array<void*, 4>& band_data, const std::array<Tensor, 4>& bands, bool last,
               const Tensor& filters, int64_t border_index) {
  STD_TORCH_CHECK(filters.dim() == 2 && filters.size(0) == 2 && filters.size(1) > 0 &&
                      filters.stride(0) == filters.size(1) && filters.stride(1) == 1 &&
                      filters.scalar_type() == torch::headeronly::ScalarType::Double &&
                      filters.device().is_cpu(),
                  "dwt2d: filters must be a dense float64 tensor (2, F) on the CPU");
  STD_TORCH_CHECK(0 <= border_index && border_index < kBorders, "dwt2d: unknown border ",
                  border_index);
  const auto border = static_cast<Border>(border_index);
  const int64_t batch = image.size(0), channels = image.size(1);
  const int64_t height = image.size(2), width = image.size(3);
  const int64_t rows = bands[0].size(2), cols = bands[0].size(3);
  STD_TORCH_CHECK(std::min({height, width, rows, cols}) > 0, "dwt2d: no pixels");
  const bool reflects = border == kReflect || border == kAntireflect;
  STD_TORCH_CHECK(!reflects || std::min(height, width) > 1, "dwt2d: reflections need 2 samples");
  const auto* low = static_cast<const double*>(filters.const_data_ptr());
  const int64_t length = filters.size(1);
  const bool periodized = border == kPeriodization || border == kCropped;
  const Filters f{low, low + length, length, periodized ? length / 2 : 1};
  const DType dtype = dtype_of(image, "dwt2d");
  const int64_t planes = last ? 1 : channels, lanes = last ? channels : 1;
  if (is_haar(f, height, width, rows, cols)) {
    // The packet's kernel takes one set of strides for all bands.
    const auto same = [&](const Tensor& b) {
      return b.stride(0) == bands[0].stride(0) && b.stride(1) == bands[0].stride(1) &&
             b.stride(2) == bands[0].stride(2);
    };
    if (same(bands[1]) && same(bands[2]) && same(bands[3])) {
      HaarArgs args;
      args.dtype = dtype;
      args.level = 1;
      args.pack = analysis;
      args.channels = planes;
      args.lanes = lanes;
      args.rows = rows;
      args.cols = cols;
      args.image = image_data;
      args.image_strides = {image.stride(0), image.stride(1), image.stride(2), lanes};
      args.band_strides = {bands[0].stride(0), bands[0].stride(1), bands[0].stride(2), lanes};
      std::copy(band_data.begin(), band_data.end(), args.bands);
      return haar_tiles(args, batch);
    }
  }
  const Axis y = (analysis ? &Axis::analysis : &Axis::synthesis)(border, height, rows, f);
  const std::vector<DwtImage> images = images_of(border, width, cols, f);
  DwtArgs args{};
  args.dtype = dtype;
  args.length = static_cast<int>(length), args.shift = f.shift;
  args.low = f.low, args.high = f.high;
  args.channels = planes, args.lanes = lanes;
  args.height = height, args.width = width, args.rows = rows, args.cols = cols;
  args.y = y.get(), args.longest = y.longest();
  args.images = images.data(), args.image_count = static_cast<int64_t>(images.size());
  args.extended_width = std::max(width, 2 * (cols - 1) + f.shift + 1);
  args.image = plane_of(image_data, image);
  for (int b = 0; b < 4; ++b) args.bands[b] = plane_of(band_data[b], bands[b]);
  const int64_t count = batch * planes * (analysis ? rows : dwt_row_pairs(args));
  const int64_t work = 2 * width * lanes;
  const int64_t grain = std::max<int64_t>(1, kGrain / work);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch = scratch_of(dwt_scratch(args) * sizeof(double));
    (analysis ? dwt_analysis_kernel() : dwt_synthesis_kernel())(args, scratch.get(), begin, end);
  });
}

void* const_data(const Tensor& x) { return const_cast<void*>(x.const_data_ptr()); }

// M along both axes: (N,C,H,W) to four bands (N,C,rows,columns).
Bands dwt2d(const Tensor& x, const Tensor& filters, int64_t border, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 4, "dwt2d: expected a tensor (N, C, H, W), got ", x.dim(), " axes");
  const bool last = is_channels_last(x);
  const auto band = [&] {
    const Tensor made = empty_4d(x, {x.size(0), x.size(1), rows, columns}, last);
    huge_pages(made);
    return made;
  };
  const std::array<Tensor, 4> bands{band(), band(), band(), band()};
  std::array<void*, 4> data;
  for (int b = 0; b < 4; ++b) data[b] = bands[b].mutable_data_ptr();
  if (bands[0].numel() > 0) {
    const Tensor in = with_dense_rows(x, last);
    transform(true, const_data(in), in, data, bands, last, filters, border);
  }
  return {bands[0], bands[1], bands[2], bands[3]};
}

// M^T along both axes: four bands to (N,C,height,width).
Tensor idwt2d(const Tensor& a, const Tensor& h, const Tensor& v, const Tensor& d,
              const Tensor& filters, int64_t border, int64_t height, int64_t width) {
  STD_TORCH_CHECK(a.dim() == 4, "idwt2d: expected bands (N, C, H, W), got ", a.dim(), " axes");
  const bool last = is_channels_last(a);
  const Tensor x = empty_4d(a, {a.size(0), a.size(1), height, width}, last);
  std::array<Tensor, 4> bands{a, h, v, d};
  for (const Tensor& band : bands) {
    STD_TORCH_CHECK(band.dim() == 4 && band.scalar_type() == a.scalar_type() &&
                        std::equal(band.sizes().begin(), band.sizes().end(), a.sizes().begin()),
                    "idwt2d: the bands must have the same shape and dtype");
  }
  if (x.numel() > 0) {
    huge_pages(x);
    std::array<void*, 4> data;
    for (int b = 0; b < 4; ++b) {
      bands[b] = with_dense_rows(bands[b], last);
      data[b] = const_data(bands[b]);
    }
    transform(false, x.mutable_data_ptr(), x, data, bands, last, filters, border);
  }
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(diffad_fast, CPU, m) {
  m.impl("dwt2d", TORCH_BOX(&dwt2d));
  m.impl("idwt2d", TORCH_BOX(&idwt2d));
}

}  // namespace
}  // namespace diffad
