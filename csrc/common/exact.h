// Arithmetic that gives the same bits on the host and the device: only IEEE operations on doubles that round alike
// everywhere, each rounded on its own. SSLFAST_MUL and SSLFAST_ADD keep a compiler from joining two of them to a fused
// multiply-add (the host's files are compiled with -ffp-contract=off besides).
#pragma once
#include "philox.h"

#define SSLFAST_MUL(a, b) SSLFAST_DEVICE_OR_HOST(__dmul_rn(a, b), (a) * (b))
#define SSLFAST_ADD(a, b) SSLFAST_DEVICE_OR_HOST(__dadd_rn(a, b), (a) + (b))

namespace sslfast {

struct Range {
  double low, high;
};

SSLFAST_INLINE double uniform(const Range& range, uint32_t word) {
  return SSLFAST_ADD(range.low, SSLFAST_MUL(SSLFAST_ADD(range.high, -range.low), unit(word)));
}

// To the nearest whole number, ties to even: for |x| < 2^51.
SSLFAST_INLINE double nearest(double x) { return SSLFAST_ADD(SSLFAST_ADD(x, 0x1.8p52), -0x1.8p52); }

// e^x for |x| < 700, to about one unit in the last place: 2^n Σ r^k/k! with n = x/ln 2 rounded and |r| ≤ ½ ln 2.
SSLFAST_INLINE double exponential(double x) {
  const double n = nearest(SSLFAST_MUL(x, 1.4426950408889634074));
  double r = SSLFAST_ADD(x, -SSLFAST_MUL(n, 0x1.62e42fefa0000p-1));  // ln 2 in two parts
  r = SSLFAST_ADD(r, -SSLFAST_MUL(n, 0x1.cf79abc9e3b3ap-40));
  double sum = 1.0;
  for (int k = 14; k >= 1; --k) sum = SSLFAST_ADD(1.0, SSLFAST_MUL(sum, r / k));
  const int power = static_cast<int>(n);
  const double two = power < 0 ? 0.5 : 2.0;
  for (int k = power < 0 ? -power : power; k > 0; --k) sum = SSLFAST_MUL(sum, two);
  return sum;
}

SSLFAST_INLINE double root(double x) { return SSLFAST_DEVICE_OR_HOST(__dsqrt_rn(x), __builtin_sqrt(x)); }

}  // namespace sslfast
