// Rows of stored logits, a chunk of columns at a time: what the softmax over prototypes is made of.
#pragma once
#include "common/half.h"
#include "levels.h"
#include "vec.h"

namespace sslfast {

inline constexpr int64_t kLogitChunk = 512;  // columns worked on in the first cache
inline constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

// A number of columns as whole vectors of every level and dtype.
inline constexpr int64_t padded_columns(int64_t columns) { return (columns + 15) / 16 * 16; }
inline constexpr int64_t chunks_of(int64_t columns) { return (columns + kLogitChunk - 1) / kLogitChunk; }

namespace SSLFAST_CPU_LEVEL {

// In place of −∞, so that no difference of two of them is formed.
template <typename A>
inline constexpr A kLeast = A(-3.0e38);

// `count` numbers of a row as accumulators, then −∞ up to a whole vector: where they lie, or in `buffer`.
template <typename T, typename A = Accumulator<T>>
static inline const A* chunk_of(const T* __restrict__ x, int64_t count, A* __restrict__ buffer) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (count % kLanes<A> == 0) return reinterpret_cast<const A*>(x);
  }
  for (int64_t k = 0; k < count; ++k) buffer[k] = A(widen(x[k]));
  for (int64_t k = count; k % kLanes<A> != 0; ++k) buffer[k] = A(-__builtin_inf());
  return buffer;
}

// The largest of n numbers, a multiple of a vector; kLeast of −∞ alone. A NaN may be passed over: its exponential is
// NaN.
template <typename A>
static inline A largest_of(const A* x, int64_t n) {
  vec<A> a = broadcast(kLeast<A>), b = a;
  int64_t k = 0;
  for (; k + 2 * kLanes<A> <= n; k += 2 * kLanes<A>) {
    a = larger<A>(a, load(x + k));
    b = larger<A>(b, load(x + k + kLanes<A>));
  }
  if (k < n) a = larger<A>(a, load(x + k));
  a = larger<A>(b, a);
  const A top = max_lanes<A>(a);
  return top != top ? kLeast<A> : top;
}

// x[k] ← 2^(x[k] − shift), and their sum.
template <typename A>
static inline A exponentials_of(A* x, int64_t n, A shift) {
  vec<A> sum[2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes<A> <= n; k += 2 * kLanes<A>) {
    for (int u = 0; u < 2; ++u) {
      const vec<A> e = exp2v<true>(load(x + k + u * kLanes<A>) - shift);
      store(x + k + u * kLanes<A>, e);
      sum[u] += e;
    }
  }
  if (k < n) {
    const vec<A> e = exp2v<true>(load(x + k) - shift);
    store(x + k, e);
    sum[0] += e;
  }
  return sum_lanes<A>(sum[0] + sum[1]);
}

static inline float exp2_of(float x) { return __builtin_exp2f(x); }
static inline double exp2_of(double x) { return __builtin_exp2(x); }

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
