// Rows of stored logits, a chunk of columns at a time: what the softmax over prototypes is made of.
#pragma once
#include "common/half.h"
#include "levels.h"
#include "vec.h"

namespace sslfast {

inline constexpr int64_t kLogitChunk = 512;  // columns worked on in the first cache
inline constexpr int64_t kSummedRows = 4;    // rows whose softmax is added to the column sums together
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

// out[k] = log2(e)·row[k]/τ − base, and −∞ up to a whole vector; returns their number. `buffer` holds a chunk.
template <typename T, typename A>
static inline int64_t scaled_chunk(const T* row, int64_t count, A factor, A base, A* buffer, A* __restrict__ out) {
  const A* in = chunk_of(row, count, buffer);
  int64_t k = 0;
  for (; k < count; k += kLanes<A>) store(out + k, load(in + k) * factor - base);
  return k;
}

// The base of a row whose first chunk this is.
template <typename A>
static inline A base_of(const A* chunk, int64_t n) {
  const A top = largest_of(chunk, n);
  return top > kLeast<A> && top < A(3.0e38) ? top : A(0);
}

template <typename A>
static inline A sum_of(const A* x, int64_t n) {
  vec<A> sum = {};
  for (int64_t k = 0; k < n; k += kLanes<A>) sum += load(x + k);
  return sum_lanes<A>(sum);
}

template <typename A>
static inline A dot_of(const A* p, const A* y, int64_t n) {
  vec<A> sum[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes<A> <= n; k += 4 * kLanes<A>) {
    for (int u = 0; u < 4; ++u) sum[u] += load(p + k + u * kLanes<A>) * load(y + k + u * kLanes<A>);
  }
  for (; k < n; k += kLanes<A>) sum[0] += load(p + k) * load(y + k);
  return sum_lanes<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// From the maximum and the sum of every chunk of a row of exponentials, each relative to its chunk's maximum: what
// makes the row's softmax of them, in place of the sums; and log2 of the row's sum.
template <typename A>
static inline A chunk_weights(const A* shift, A* weight, int64_t chunks, A top) {
  A total = 0;
  for (int64_t c = 0; c < chunks; ++c) total += weight[c] * exp2_of(shift[c] - top);
  for (int64_t c = 0; c < chunks; ++c) weight[c] = exp2_of(shift[c] - top) / total;
  return top + A(__builtin_log2(total));
}

// sums[k] += Σ_r weight_r·E_r[k].
template <int kRows, typename A>
static inline void add_each(const A* __restrict__ e, int64_t padded, const A* weight, int64_t chunks,
                            A* __restrict__ sums) {
  for (int64_t c = 0; c < chunks; ++c) {
    vec<A> w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = broadcast(weight[r * chunks + c]);
    const int64_t end = (c + 1) * kLogitChunk < padded ? (c + 1) * kLogitChunk : padded;
    for (int64_t k = c * kLogitChunk; k < end; k += kLanes<A>) {
      vec<A> sum = load(sums + k);
      for (int r = 0; r < kRows; ++r) sum += load(e + r * padded + k) * w[r];
      store(sums + k, sum);
    }
  }
}

// The same of 1 to kSummedRows rows.
template <typename A>
static inline void add_rows(int64_t rows, const A* e, int64_t padded, const A* weight, int64_t chunks, A* sums) {
  switch (rows) {
    case 4: return add_each<4>(e, padded, weight, chunks, sums);
    case 3: return add_each<3>(e, padded, weight, chunks, sums);
    case 2: return add_each<2>(e, padded, weight, chunks, sums);
    default: return add_each<1>(e, padded, weight, chunks, sums);
  }
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
