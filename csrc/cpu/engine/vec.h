// Vectors of the level being compiled, as GCC/Clang vector extensions: one source for SSE2, AVX2, AVX-512 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr bool kManyRegisters = true;  // 32 vector registers
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr bool kManyRegisters = false;  // 16
#else
inline constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
inline constexpr bool kManyRegisters = true;
#else
inline constexpr bool kManyRegisters = false;
#endif
#endif

// Vec<T>::type holds kLanes<T> numbers; Vec<T>::mask is the signed integer vector of the same shape.
template <typename T>
struct Vec {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> mask __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using vec = typename Vec<T>::type;
template <typename T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
static inline vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Vec<T>::loose*>(p);
}
template <typename T>
static inline void store(T* p, vec<T> v) {
  *reinterpret_cast<typename Vec<T>::loose*>(p) = v;
}
template <typename T>
static inline vec<T> broadcast(T x) {
  return vec<T>{} + x;
}

// Comparisons are written so that a NaN in `a` stays a NaN.
template <typename T>
static inline vec<T> at_least(vec<T> a, vec<T> low) {
  return a < low ? low : a;
}
template <typename T>
static inline vec<T> at_most(vec<T> a, vec<T> high) {
  return a > high ? high : a;
}
template <typename T>
static inline vec<T> larger(vec<T> a, vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
static inline T sum_lanes(vec<T> v) {
  T total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += v[l];
  return total;
}
template <typename T>
static inline T max_lanes(vec<T> v) {
  T top = v[0];
  for (int l = 1; l < kLanes<T>; ++l) top = v[l] > top ? v[l] : top;
  return top;
}

// 2^x to about one unit in the last place. With n = round(x) and f = x − n in [−½, ½]: 2^x = 2^n · 2^f, 2^f by the
// exponential series in f·ln 2 (the first term left out is below 2e-9 for float and 3e-17 for double).
// Any = false: |x| ≤ 100 or x = kNothing, whose result is 0; 2^n is then one integer addition to the exponent's bits.
// Any = true: every x; below the smallest normal number the result is 0, above the largest +Inf, NaN stays NaN.
inline constexpr int kNothing = -127;

static inline vec<float> exp2_fraction(vec<float> f) {
  vec<float> p = broadcast(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.0f;
}

template <bool Any>
static inline vec<float> exp2v(vec<float> x) {
  using I = Vec<float>::mask;
  if constexpr (Any) x = at_most<float>(at_least<float>(x, broadcast(-127.0f)), broadcast(128.0f));
  // 1.5·2^23: adding it rounds to an integer, which then stands in the low bits (with the exponent's bias, if added
  // too).
  const vec<float> shifter = broadcast(12582912.0f + (Any ? 127.0f : 0.0f));
  const vec<float> shifted = x + shifter;
  const vec<float> p = exp2_fraction(x - (shifted - shifter));
  const I exponent = reinterpret_cast<I>(shifted) << 23;
  if constexpr (Any)
    return p * reinterpret_cast<vec<float>>(exponent);
  else
    return reinterpret_cast<vec<float>>(reinterpret_cast<I>(p) + exponent);
}

template <bool Any>
static inline vec<double> exp2v(vec<double> x) {
  using I = Vec<double>::mask;
  x = at_most<double>(at_least<double>(x, broadcast(-1023.0)), broadcast(1024.0));
  if constexpr (!Any) x = x == broadcast<double>(kNothing) ? broadcast(-1023.0) : x;
  const vec<double> shifter = broadcast(6755399441055744.0 + 1023.0);  // 1.5·2^52 + the bias
  const vec<double> shifted = x + shifter;
  const vec<double> t = (x - (shifted - shifter)) * 0.693147180559945309417;
  // 1/k! for k = 13 … 2
  constexpr double inverse_factorial[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                          1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                          1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
  vec<double> p = broadcast(inverse_factorial[0]);
  for (int k = 1; k < 12; ++k) p = p * t + inverse_factorial[k];
  p = (p * t + 1.0) * t + 1.0;
  return p * reinterpret_cast<vec<double>>(reinterpret_cast<I>(shifted) << 52);
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
