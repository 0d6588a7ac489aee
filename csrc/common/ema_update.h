// The arithmetic of an exponential moving average, one element at a time, for the host and the device:
//     t ← m t + (1 − m) s  =  t + (1 − m)(s − t)  =  s − m (s − t).
// Of the last two forms the one with the smaller factor is taken, as torch.lerp does: m = 0 gives exactly s, m = 1
// exactly t, and t = s stays t. The first form has none of the three. `A` is the accumulator: float, or double for
// averages of doubles.
#pragma once
#include "half.h"

namespace sslfast {

template <typename A>
struct Momentum {
  A kept;      // m
  A taken;     // 1 − m, subtracted in double: of m = 0.9999 as a float the difference would have three digits
  bool large;  // m > 1/2
};

template <typename A>
SSLFAST_INLINE Momentum<A> momentum_of(double m) {
  return {static_cast<A>(m), static_cast<A>(1.0 - m), m > 0.5};
}

template <typename A>
SSLFAST_INLINE A moved(A average, A student, Momentum<A> m) {
  const A step = student - average;
  return m.large ? average + m.taken * step : student - m.kept * step;
}

}  // namespace sslfast
