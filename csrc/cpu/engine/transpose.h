// Transposition through registers: kLanes × kLanes numbers at a time.
#pragma once
#include "vec.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

// One exchange of the transposition by halves: lanes whose number has the bit H change places between two rows.
template <typename T, int H>
static inline __attribute__((always_inline)) void exchange(vec<T>& a, vec<T>& b) {
#if defined(__clang__)
  vec<T> x = a, y = b;
  for (int l = 0; l < kLanes<T>; ++l) {
    x[l] = l & H ? b[l - H] : a[l];
    y[l] = l & H ? b[l] : a[l + H];
  }
  a = x;
  b = y;
#else
  typename Vec<T>::mask first, second;
  for (int l = 0; l < kLanes<T>; ++l) {
    first[l] = l & H ? kLanes<T> + l - H : l;
    second[l] = l & H ? kLanes<T> + l : l + H;
  }
  const vec<T> x = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = x;
#endif
}

template <typename T, int H>
static inline __attribute__((always_inline)) void exchange_all(vec<T>* rows) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if ((i & H) == 0) exchange<T, H>(rows[i], rows[i + H]);
    exchange_all<T, H / 2>(rows);
  }
}

// y[c][r] = x[r][c] for r < rows and c < columns; rows of x are x_stride numbers apart, those of y y_stride.
template <typename T>
static void transpose(const T* x, int64_t x_stride, int64_t rows, int64_t columns, T* y, int64_t y_stride) {
  constexpr int L = kLanes<T>;
  const int64_t whole_rows = rows / L * L, whole_columns = columns / L * L;
  for (int64_t r = 0; r < whole_rows; r += L)
    for (int64_t c = 0; c < whole_columns; c += L) {
      vec<T> block[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = load(x + (r + i) * x_stride + c);
      exchange_all<T, L / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(y + (c + i) * y_stride + r, block[i]);
    }
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t r = c < whole_columns ? whole_rows : 0; r < rows; ++r) y[c * y_stride + r] = x[r * x_stride + c];
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
