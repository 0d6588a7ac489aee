// A softmax's sum while its numbers go by, in units of log 2: Σ 2^(x − largest), relative to the largest so far. For
// the host and the device.
#pragma once
#include "half.h"

namespace sslfast {

SSLFAST_INLINE float power_of_two(float x) { return SSLFAST_DEVICE_OR_HOST(exp2f(x), __builtin_exp2f(x)); }
SSLFAST_INLINE double power_of_two(double x) { return SSLFAST_DEVICE_OR_HOST(exp2(x), __builtin_exp2(x)); }
SSLFAST_INLINE float binary_logarithm(float x) { return SSLFAST_DEVICE_OR_HOST(log2f(x), __builtin_log2f(x)); }
SSLFAST_INLINE double binary_logarithm(double x) { return SSLFAST_DEVICE_OR_HOST(log2(x), __builtin_log2(x)); }

// Before the first number; also the largest of −∞ alone, so that no difference of two −∞ is formed.
template <typename A>
struct OnlineSum {
  A largest, sum;
};

template <typename A>
SSLFAST_INLINE OnlineSum<A> nothing_summed() {
  return {A(-3.0e38), A(0)};
}

// One exponential: that of the difference, by which either the sum or the number is the smaller. A NaN stays in the
// sum.
template <typename A>
SSLFAST_INLINE OnlineSum<A> with_number(const OnlineSum<A>& so_far, A x) {
  const bool larger = x > so_far.largest;
  const A e = power_of_two(larger ? so_far.largest - x : x - so_far.largest);
  return larger ? OnlineSum<A>{x, so_far.sum * e + A(1)} : OnlineSum<A>{so_far.largest, so_far.sum + e};
}

template <typename A>
SSLFAST_INLINE OnlineSum<A> merged(const OnlineSum<A>& a, const OnlineSum<A>& b) {
  const bool larger = b.largest > a.largest;
  const A e = power_of_two(larger ? a.largest - b.largest : b.largest - a.largest);
  return larger ? OnlineSum<A>{b.largest, a.sum * e + b.sum} : OnlineSum<A>{a.largest, a.sum + b.sum * e};
}

}  // namespace sslfast
