// What softmax losses do with a tile of scaled similarities x (base 2, leading dimension kTile) while it is in cache:
// exponentials and their row and column sums forward, weights W backward.
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

// A similarity that takes no part: 2^nothing = 0.
template <typename T, bool Bounded>
inline constexpr T nothing = Bounded ? static_cast<T>(kNothing) : -static_cast<T>(__builtin_inf());

// Per row of Z: the exponent that its sum is relative to (0 when bounded), and the sum.
template <typename T>
struct RowStatistics {
  T* max;
  T* sum;
};

template <typename T, bool Bounded>
static void mask_tile(T* x, int64_t rows, int64_t columns, bool diagonal) {
  const int64_t padded = round_up(columns, kLanes<T>);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = columns; j < padded; ++j) x[i * kTile + j] = nothing<T, Bounded>;
    if (diagonal) x[i * kTile + i] = nothing<T, Bounded>;
  }
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
static void accumulate_bounded(const T* x, int64_t rows, int64_t columns, bool diagonal, RowStatistics<T> of_rows,
                               RowStatistics<T> of_columns) {
  alignas(64) T down[kTile] = {};
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) sum_rows<T, 4>(x + i * kTile, columns, of_rows.sum + i, down);
  for (; i < rows; ++i) sum_rows<T, 1>(x + i * kTile, columns, of_rows.sum + i, down);
  if (!diagonal)
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

template <typename T>
static void accumulate_any(const T* x, int64_t rows, int64_t columns, bool diagonal, RowStatistics<T> of_rows,
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
  // A row that has seen nothing yet has the maximum −Inf, and −Inf − (−Inf) is NaN: it is shifted by 0 instead.
  for (int64_t j = 0; j < padded; ++j) {
    if (j < columns && !diagonal) {
      raise_max(column_max[j], of_columns.max + j, of_columns.sum + j);
      column_max[j] = of_columns.max[j];
    }
    if (column_max[j] == lowest) column_max[j] = 0;
  }
  for (int64_t i = 0; i < rows; ++i) {
    vec<T> total = {};
    const vec<T> shift = broadcast(of_rows.max[i] == lowest ? T(0) : of_rows.max[i]);
    for (int64_t j = 0; j < padded; j += kLanes<T>) {
      const vec<T> v = load(x + i * kTile + j);
      total += exp2v<true>(v - shift);
      if (!diagonal) store(down + j, load(down + j) + exp2v<true>(v - load(column_max + j)));
    }
    of_rows.sum[i] += sum_lanes<T>(total);
  }
  if (!diagonal)
    for (int64_t j = 0; j < columns; ++j) of_columns.sum[j] += down[j];
}

// W_ij = a_i·2^(x_ij − max_i) + a_j·2^(x_ij − max_j), with a = g/sum: the two softmaxes that s_ij takes part in.
template <typename T>
struct RowWeights {
  const T* max;
  const T* a;  // readable up to a whole number of vectors
};

template <typename T, bool Bounded>
static void weights(const T* x, int64_t rows, int64_t columns, RowWeights<T> of_rows, RowWeights<T> of_columns, T* w) {
  for (int64_t i = 0; i < rows; ++i) {
    const vec<T> a = broadcast(of_rows.a[i]), max = broadcast(of_rows.max[i]);
    for (int64_t j = 0; j < columns; j += kLanes<T>) {
      const vec<T> v = load(x + i * kTile + j), b = load(of_columns.a + j);
      if constexpr (Bounded)
        store(w + i * kTile + j, exp2v<false>(v) * (a + b));
      else
        store(w + i * kTile + j, exp2v<true>(v - max) * a + exp2v<true>(v - load(of_columns.max + j)) * b);
    }
  }
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
