// Rows of a matrix, normalised on the way, in the two block layouts of tile_gemm.h.
#pragma once
#include <cstdint>

#include "common/half.h"
#include "tile_gemm.h"

namespace sslfast {

enum class ElementType { f32, f64, bf16, f16 };

// f(T{}) with the type T of sums over elements of `type`: double for double, else float.
template <typename F>
static inline auto with_accumulator(ElementType type, F&& f) {
  return type == ElementType::f64 ? f(double{}) : f(float{});
}

// A row-major [rows, d] matrix of any supported element type.
struct Rows {
  const void* data;
  ElementType type;
};

namespace SSLFAST_CPU_LEVEL {

template <typename S, typename T>
static inline void widen_row(const void* data, int64_t row, int64_t d, T* out) {
  const S* x = static_cast<const S*>(data) + row * d;
  for (int64_t k = 0; k < d; ++k) out[k] = static_cast<T>(widen(x[k]));
}

template <typename T>
static void read_row(const Rows& rows, int64_t row, int64_t d, T* out) {
  switch (rows.type) {
    case ElementType::f32: return widen_row<float>(rows.data, row, d, out);
    case ElementType::f64: return widen_row<double>(rows.data, row, d, out);
    case ElementType::bf16: return widen_row<bf16>(rows.data, row, d, out);
    case ElementType::f16: return widen_row<fp16>(rows.data, row, d, out);
  }
}

template <typename S, typename T>
static inline void narrow_row(const T* x, void* data, int64_t row, int64_t d) {
  S* out = static_cast<S*>(data) + row * d;
  for (int64_t k = 0; k < d; ++k) {
    if constexpr (sizeof(S) == sizeof(double))
      out[k] = static_cast<double>(x[k]);
    else
      narrow(static_cast<float>(x[k]), out + k);
  }
}

template <typename T>
static void write_row(const T* x, void* data, ElementType type, int64_t row, int64_t d) {
  switch (type) {
    case ElementType::f32: return narrow_row<float>(x, data, row, d);
    case ElementType::f64: return narrow_row<double>(x, data, row, d);
    case ElementType::bf16: return narrow_row<bf16>(x, data, row, d);
    case ElementType::f16: return narrow_row<fp16>(x, data, row, d);
  }
}

// Σ x·y over n numbers that are zero beyond the end of the last vector.
template <typename T>
static inline T dot(const T* x, const T* y, int64_t n) {
  vec<T> sum[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes<T> <= n; k += 4 * kLanes<T>)
    for (int u = 0; u < 4; ++u) sum[u] += load(x + k + u * kLanes<T>) * load(y + k + u * kLanes<T>);
  for (; k < n; k += kLanes<T>) sum[0] += load(x + k) * load(y + k);
  return sum_lanes<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// One row into a block's panels: piece p of it goes to row[p·height·kColumns].
template <typename T>
static inline void to_panels(const T* x, T factor, int64_t padded, int64_t height, T* row) {
  for (int64_t k = 0; k < padded; k += kColumns<T>, row += height * kColumns<T>)
    for (int c = 0; c < kColumns<T>; c += kLanes<T>) store(row + c, load(x + k + c) * factor);
}

// Column panels of a block with k outermost, from its row panels; columns beyond `rows` are zero.
template <typename T>
static void transpose_panels(const T* panels, int64_t height, int64_t rows, int64_t d, T* transposed) {
  constexpr int C = kColumns<T>;
  for (int64_t j = 0; j < rows; j += C, transposed += d * C) {
    const int64_t count = rows - j < C ? rows - j : C;
    for (int64_t k = 0; k < d; ++k) {
      const T* x = panels + k / C * height * C + j * C + k % C;
      T* out = transposed + k * C;
      for (int64_t c = 0; c < count; ++c) out[c] = x[c * C];
      for (int64_t c = count; c < C; ++c) out[c] = 0;
    }
  }
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
