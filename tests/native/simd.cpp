// Compares what csrc/cpu/kernels/simd.h does to vectors with plain arithmetic on their numbers, for
// the instruction set that this file is compiled for. Prints what differs; the exit status tells.
#include "../../csrc/cpu/kernels/simd.h"

#include <cmath>
#include <cstdio>
#include <random>

namespace diffad::DIFFAD_ISA {

std::mt19937 words(1);
int failures = 0;

// The same number, or NaN for NaN; the sign of zero counts.
template <class T>
void expect(const char* what, T value, T expected) {
  if (value != value && expected != expected) return;
  if (value == expected && std::signbit(double(value)) == std::signbit(double(expected))) return;
  if (failures++ < 20) std::printf("%s: %.17g, not %.17g\n", what, double(value), double(expected));
}

template <class C>
void arithmetic() {
  const C special[] = {0, -C(0), 1, C(INFINITY), -C(INFINITY), C(NAN), C(1e-310)};
  Vec<C> v[3], whole;
  for (Vec<C>& x : v) {
    for (int i = 0; i < kLanes<C>; ++i) {
      x[i] = words() % 4 ? C(words()) / C(1e9) - 2 : special[words() % 7];
      whole[i] = words() % 1000;  // any order of adding them is exact
    }
  }
  const auto [a, b, c] = v;
  const Vec<C> product = fma(a, b, c), low = min(a, b), high = max(a, b), root = sqrt(a);
  bool below = false;
  C sum = 0;
  for (int i = 0; i < kLanes<C>; ++i) {
#if defined(__FMA__) || defined(__aarch64__)
    expect<C>("fma", product[i], std::fma(a[i], b[i], c[i]));
#endif
    expect<C>("fma of numbers", fma(C(a[i]), C(b[i]), C(c[i])), product[i]);
    expect<C>("min", low[i], a[i] < b[i] ? a[i] : b[i]);
    expect<C>("max", high[i], a[i] > b[i] ? a[i] : b[i]);
    expect<C>("sqrt", root[i], std::sqrt(a[i]));
    below = below || a[i] < b[i];
    sum += whole[i];
  }
  expect("any_below", any_below(a, b), below);
  expect("sum_of_lanes", sum_of_lanes(whole), sum);
}

void words_and_doubles() {
  const uint32_t factor = words();
  VecU64 a;
  Vec<float> x;
  for (int i = 0; i < kLanes<double>; ++i) a[i] = uint64_t{words()} << 32 | words();
  for (int i = 0; i < kLanes<float>; ++i) x[i] = float(words());
  const VecU64 product = multiply_words(a, factor);
  const Vec<double> wide[] = {widen<0>(x), widen<1>(x)};
  const Vec<float> back = narrow(wide[0] / 3, wide[1] / 3);
  for (int i = 0; i < kLanes<float>; ++i) {
    const int lane = i % kLanes<double>;
    expect<uint64_t>("multiply_words", product[lane], (a[lane] & 0xffffffffu) * factor);
    expect<double>("widen", wide[i / kLanes<double>][lane], x[i]);
    expect<float>("narrow", back[i], float(double(x[i]) / 3));
  }
}

// All numbers of T, and the middles between neighbours with the floats next to these.
template <class T>
void conversions(int fraction_bits, int least_exponent) {
  const int infinity = 0x7fff >> fraction_bits << fraction_bits;
  const auto magnitude = [&](int h) {  // for infinity, the power of two in its place
    const int exponent = h >> fraction_bits, fraction = h & ((1 << fraction_bits) - 1);
    return std::ldexp(exponent ? fraction + (1 << fraction_bits) : fraction,
                      (exponent ? exponent - 1 : 0) + least_exponent);
  };
  const auto stored = [](float x) {
    T all[kLanes<float>];
    store(all, splat(x));
    return int{all[0].x};
  };
  for (int h = 0; h <= 0xffff; ++h) {
    const int size = h & 0x7fff;
    const double is = size > infinity ? NAN : size == infinity ? INFINITY : magnitude(size);
    const float x = float(h == size ? is : -is);
    const T all[kLanes<float>] = {{uint16_t(h)}};
    expect<float>("load", load(all)[0], x);
    expect<float>("load_one", load_one(all), x);
    if (size > infinity) expect("store NaN", (stored(x) & 0x7fff) > infinity, true);
    if (size <= infinity) expect("store", stored(x), h);
    if (size >= infinity) continue;
    const float middle = std::copysign(float((is + magnitude(size + 1)) / 2), x);
    expect("store a middle", stored(middle), h + (h & 1));
    expect("store below", stored(std::nextafter(middle, 0.0f)), h);
    expect("store above", stored(std::nextafter(middle, 2 * middle)), h + 1);
  }
}

}  // namespace diffad::DIFFAD_ISA

int main() {
  using namespace diffad::DIFFAD_ISA;
  for (int i = 0; i < 1000; ++i) {
    arithmetic<float>();
    arithmetic<double>();
    words_and_doubles();
  }
  conversions<diffad::half>(10, -24);
  conversions<diffad::bf16>(7, -133);
  return failures != 0;
}
