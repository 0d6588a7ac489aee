// What softmax losses do with a tile of scaled similarities x (base 2, leading dimension kTile) while it is in cache:
// bias and exclusions, exponentials and their row and column sums forward, weights W backward.
//
// Bounded = true: |x| ≤ 60 is known in advance (Cauchy–Schwarz on the rows' norms), so no maximum is needed and one
// exponential serves the row and the column. Otherwise each row keeps its running maximum, and since row and column
// need different ones, two exponentials are taken.
// Tiles are padded by `nothing` to a whole number of vectors.
#pragma once
#include <cstdint>

#include "tile_gemm.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

inline constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
inline constexpr double kBoundedLimit = 60;  // 2^±60 and sums of 2^66 of them are far from float's limits

// A similarity that takes no part: 2^nothing = 0.
template <typename T, bool Bounded>
inline constexpr T nothing = Bounded ? static_cast<T>(kNothing) : -static_cast<T>(__builtin_inf());

// Per row of Z: the exponent that its sum is relative to (0 when bounded), and the sum.
template <typename T>
struct RowStatistics {
  T* max;
  T* sum;
};

template <typename T>
static inline T nothing_of(bool bounded) {
  return bounded ? nothing<T, true> : nothing<T, false>;
}

// The columns from `columns` up to a whole number of vectors take no part.
template <typename T>
static void mask_padding(T* x, int64_t rows, int64_t columns, bool bounded) {
  const int64_t padded = round_up(columns, kLanes<T>);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = columns; j < padded; ++j) x[i * kTile + j] = nothing_of<T>(bounded);
}

template <typename T>
static void mask_diagonal(T* x, int64_t rows, bool bounded) {
  for (int64_t i = 0; i < rows; ++i) x[i * kTile + i] = nothing_of<T>(bounded);
}

// Smallest and largest of some ids: two ranges that do not meet need no comparison in their tile.
struct IdRange {
  int64_t low, high;
  bool meets(const IdRange& other) const { return low <= other.high && other.low <= high; }
};

static inline IdRange range_of(const int64_t* ids, int64_t count) {
  IdRange range{ids[0], ids[0]};
  for (int64_t i = 1; i < count; ++i) {
    range.low = ids[i] < range.low ? ids[i] : range.low;
    range.high = ids[i] > range.high ? ids[i] : range.high;
  }
  return range;
}

// Calls f(i, j) for every pair of the tile with equal ids. They are rare, so each row is first searched as a whole.
template <typename F>
static inline void each_equal(const int64_t* row_ids, int64_t rows, const int64_t* col_ids, int64_t columns, F&& f) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t id = row_ids[i];
    int64_t found = 0;
    for (int64_t j = 0; j < columns; ++j) found |= col_ids[j] == id;
    if (found == 0) continue;
    for (int64_t j = 0; j < columns; ++j)
      if (col_ids[j] == id) f(i, j);
  }
}

template <typename T>
static void add_bias(T* x, int64_t rows, int64_t columns, const T* bias) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) x[i * kTile + j] += bias[j];
}

// Σ_j 2^x_ij into row sums and Σ_i 2^x_ij into column sums, G rows at a time.
template <typename T, int G>
static inline void sum_rows(const T* x, int64_t columns, T* row_sum, T* column_sum) {
  vec<T> total[G] = {};
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    vec<T> down = load(column_sum + j);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const vec<T> e = exp2v<false>(load(x + g * kTile + j));
      total[g] += e;
      down += e;
    }
    store(column_sum + j, down);
  }
  for (int g = 0; g < G; ++g) row_sum[g] += sum_lanes<T>(total[g]);
}

template <typename T>
static void accumulate_bounded(const T* x, int64_t rows, int64_t columns, bool rows_only, RowStatistics<T> of_rows,
                               RowStatistics<T> of_columns) {
  alignas(64) T down[kTile] = {};
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) sum_rows<T, 4>(x + i * kTile, columns, of_rows.sum + i, down);
  for (; i < rows; ++i) sum_rows<T, 1>(x + i * kTile, columns, of_rows.sum + i, down);
  if (!rows_only)
    for (int64_t j = 0; j < columns; ++j) of_columns.sum[j] += down[j];
}

// Raises a running maximum to `top` and rescales the sum that is relative to it.
template <typename T>
static inline void raise_max(T top, T* max, T* sum) {
  if (!(top > *max)) return;  // also when both are −Inf, or top is NaN: the exponentials will say so
  const vec<T> rescale = exp2v<true>(broadcast(*max - top));
  *sum *= rescale[0];
  *max = top;
}

// What a row's exponents are taken relative to: its maximum, or 0 where that is infinite, because ∞ − ∞ is NaN: a row
// that has seen nothing yet, or an infinite similarity, whose exponential is infinite as it should be.
template <typename T>
static inline T shift_of(T max) {
  constexpr T infinity = static_cast<T>(__builtin_inf());
  return max == infinity || max == -infinity ? T(0) : max;
}

template <typename T>
static void accumulate_any(const T* x, int64_t rows, int64_t columns, bool rows_only, RowStatistics<T> of_rows,
                           RowStatistics<T> of_columns) {
  constexpr T lowest = -static_cast<T>(__builtin_inf());
  const int64_t padded = round_up(columns, kLanes<T>);
  alignas(64) T down[kTile] = {}, column_max[kTile];
  for (int64_t j = 0; j < padded; ++j) column_max[j] = lowest;
  for (int64_t i = 0; i < rows; ++i) {
    vec<T> top = broadcast(lowest);
    for (int64_t j = 0; j < padded; j += kLanes<T>) {
      const vec<T> v = load(x + i * kTile + j);
      top = larger<T>(v, top);
      store(column_max + j, larger<T>(v, load(column_max + j)));
    }
    raise_max(max_lanes<T>(top), of_rows.max + i, of_rows.sum + i);
  }
  for (int64_t j = 0; j < padded; ++j) {
    if (j < columns && !rows_only) {
      raise_max(column_max[j], of_columns.max + j, of_columns.sum + j);
      column_max[j] = of_columns.max[j];
    }
    column_max[j] = shift_of(column_max[j]);
  }
  for (int64_t i = 0; i < rows; ++i) {
    vec<T> total = {};
    const vec<T> shift = broadcast(shift_of(of_rows.max[i]));
    for (int64_t j = 0; j < padded; j += kLanes<T>) {
      const vec<T> v = load(x + i * kTile + j);
      total += exp2v<true>(v - shift);
      if (!rows_only) store(down + j, load(down + j) + exp2v<true>(v - load(column_max + j)));
    }
    of_rows.sum[i] += sum_lanes<T>(total);
  }
  if (!rows_only)
    for (int64_t j = 0; j < columns; ++j) of_columns.sum[j] += down[j];
}

// e_ij = 2^(x_ij − max_i) in place of x_ij, its row sums into `of_rows`; `risen(i, factor)` is called for a row whose
// maximum rises, and whose earlier sums therefore shrink by the factor.
template <typename T, bool Bounded, typename Risen>
static void exponentials(T* x, int64_t rows, int64_t columns, RowStatistics<T> of_rows, Risen&& risen) {
  constexpr T lowest = -static_cast<T>(__builtin_inf());
  for (int64_t i = 0; i < rows; ++i) {
    T* row = x + i * kTile;
    T shift = 0;
    if constexpr (!Bounded) {
      vec<T> top = broadcast(lowest);
      for (int64_t j = 0; j < columns; j += kLanes<T>) top = larger<T>(load(row + j), top);
      const T before = of_rows.max[i];
      raise_max(max_lanes<T>(top), of_rows.max + i, of_rows.sum + i);
      if (of_rows.max[i] != before && before != lowest) risen(i, exp2v<true>(broadcast(before - of_rows.max[i]))[0]);
      shift = shift_of(of_rows.max[i]);
    }
    vec<T> total = {};
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const vec<T> v = load(row + j);
      const vec<T> e = Bounded ? exp2v<false>(v) : exp2v<true>(v - shift);
      total += e;
      store(row + j, e);
    }
    of_rows.sum[i] += sum_lanes<T>(total);
  }
}

// The larger of two numbers, NaN if one is NaN.
template <typename T>
static inline T larger_or_nan(T a, T b) {
  return a == a && !(b <= a) ? b : a;
}

// The largest x of each row into top[0 … rows).
template <typename T>
static void largest_of_rows(const T* x, int64_t rows, int64_t columns, T* top) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) top[i] = larger_or_nan(top[i], x[i * kTile + j]);
}

template <typename T>
static void largest_of_columns(const T* x, int64_t rows, int64_t columns, T* top) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) top[j] = larger_or_nan(top[j], x[i * kTile + j]);
}

// W_ij = a_i·2^(x_ij − max_i) + b_j·2^(x_ij − max_j), with a = g/sum: the two softmaxes that s_ij takes part in.
// Bounded: the maxima are already in a and b.
template <typename T>
struct RowWeights {
  const T* max;
  const T* a;  // readable up to a whole number of vectors
};

template <typename T, bool Bounded>
static void weights(const T* x, int64_t rows, int64_t columns, bool rows_only, RowWeights<T> of_rows,
                    RowWeights<T> of_columns, T* w) {
  for (int64_t i = 0; i < rows; ++i) {
    const vec<T> a = broadcast(of_rows.a[i]), max = broadcast(of_rows.max[i]);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const vec<T> v = load(x + i * kTile + j);
      if constexpr (Bounded)
        store(w + i * kTile + j, exp2v<false>(v) * (a + load(of_columns.a + j)));
      else if (rows_only)
        store(w + i * kTile + j, exp2v<true>(v - max) * a);
      else
        store(w + i * kTile + j,
              exp2v<true>(v - max) * a + exp2v<true>(v - load(of_columns.max + j)) * load(of_columns.a + j));
    }
  }
}

// What the backward needs of one row or column: a = g/sum, 0 where nothing was summed or no gradient came, and the
// maximum; `folded` puts the maximum into a.
template <typename T>
static inline void prepare_weight(const T* grad, const T* max, const T* sum, int64_t i, bool folded, T* a, T* shift) {
  const bool none = grad == nullptr || sum[i] == 0;
  a[i] = none ? T(0) : grad[i] / sum[i];
  shift[i] = none ? T(0) : max[i];
  if (folded && shift[i] != 0) a[i] *= exp2v<true>(broadcast(-shift[i]))[0];
}

// Whether the maxima that count are small enough to be folded into a.
template <typename T>
static inline bool foldable(const T* grad, const T* max, const T* sum, int64_t count) {
  bool small = true;
  for (int64_t i = 0; grad != nullptr && i < count; ++i)
    small = small && (sum[i] == 0 || (max[i] <= T(kBoundedLimit) && max[i] >= T(-kBoundedLimit)));
  return small;
}

// lse = ln 2·(max + log2 sum), −Inf where nothing was summed.
template <typename T>
static inline void natural_lse(const T* max, const T* sum, int64_t count, T* lse) {
  for (int64_t i = 0; lse != nullptr && i < count; ++i) {
    const double log_sum = sum[i] == 0 ? -__builtin_inf() : static_cast<double>(max[i]) + __builtin_log2(sum[i]);
    lse[i] = static_cast<T>(kLn2 * log_sum);
  }
}

// Logits from base 2 to base e in place; `bounded`: those below every possible one stand for none.
template <typename T>
static inline void natural_logits(T* x, int64_t count, bool bounded) {
  for (int64_t i = 0; x != nullptr && i < count; ++i)
    x[i] = bounded && x[i] < T(-2 * kBoundedLimit) ? -static_cast<T>(__builtin_inf())
                                                   : static_cast<T>(kLn2 * static_cast<double>(x[i]));
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
