// Columns of a row-major matrix in panels [columns/kColumns][rows][kColumns]: their means and scales on the way in, the
// gradients through them on the way out. A panel holds whole columns, so each is finished while it is in the cache.
#pragma once
#include "packed_blocks.h"
#include "second_moment.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// Sums of this many rows are kept in T before they join a double: the error of a mean does not grow with the rows.
inline constexpr int64_t kSumRows = 64;

template <typename T>
using ColumnSums = double[kColumns<T>];

// sums[c] = Σ_r f(r, c / kLanes)[c % kLanes], f giving vectors.
template <typename T, typename F>
static inline void sum_columns(int64_t rows, ColumnSums<T>& sums, F&& f) {
  for (int c = 0; c < kColumns<T>; ++c) sums[c] = 0;
  for (int64_t first = 0; first < rows; first += kSumRows) {
    const int64_t end = first + kSumRows < rows ? first + kSumRows : rows;
    vec<T> part[kVectors] = {};
    for (int64_t r = first; r < end; ++r)
      for (int v = 0; v < kVectors; ++v) part[v] += f(r, v);
    for (int c = 0; c < kColumns<T>; ++c) sums[c] += static_cast<double>(part[c / kLanes<T>][c % kLanes<T>]);
  }
}

template <typename T>
static inline vec<T> at(const T* panel, int64_t row, int v) {
  return load(panel + row * kColumns<T> + v * kLanes<T>);
}

template <typename S, typename T>
static void read_panels_of(const void* data, int64_t rows, int64_t d, int64_t first, int64_t count, T* panels) {
  constexpr int C = kColumns<T>;
  const S* x = static_cast<const S*>(data) + first;
  const int64_t whole = (d - first) / C < count ? (d - first) / C : count;
  for (int64_t r = 0; r < rows; ++r, x += d) {
    for (int64_t p = 0; p < whole; ++p) {
      T* out = panels + (p * rows + r) * C;
      for (int c = 0; c < C; ++c) out[c] = static_cast<T>(widen(x[p * C + c]));
    }
    for (int64_t p = whole; p < count; ++p) {
      T* out = panels + (p * rows + r) * C;
      for (int c = 0; c < C; ++c) out[c] = first + p * C + c < d ? static_cast<T>(widen(x[p * C + c])) : T(0);
    }
  }
}

// Columns first, …, first + count·kColumns of `rows` into `count` panels; columns beyond d are zero.
template <typename T>
static void read_panels(const Rows& rows, int64_t n, int64_t d, int64_t first, int64_t count, T* panels) {
  switch (rows.type) {
    case ElementType::f32: return read_panels_of<float>(rows.data, n, d, first, count, panels);
    case ElementType::f64: return read_panels_of<double>(rows.data, n, d, first, count, panels);
    case ElementType::bf16: return read_panels_of<bf16>(rows.data, n, d, first, count, panels);
    case ElementType::f16: return read_panels_of<fp16>(rows.data, n, d, first, count, panels);
  }
}

template <typename S, typename T>
static void write_panels_of(const T* panels, int64_t rows, int64_t d, int64_t first, int64_t count, void* data) {
  constexpr int C = kColumns<T>;
  S* x = static_cast<S*>(data) + first;
  for (int64_t r = 0; r < rows; ++r, x += d)
    for (int64_t p = 0; p < count; ++p) {
      const T* in = panels + (p * rows + r) * C;
      const int64_t width = d - first - p * C < C ? d - first - p * C : C;
      for (int64_t c = 0; c < width; ++c) {
        if constexpr (sizeof(S) == sizeof(double))
          x[p * C + c] = static_cast<double>(in[c]);
        else
          narrow(static_cast<float>(in[c]), x + p * C + c);
      }
    }
}

template <typename T>
static void write_panels(const T* panels, int64_t n, int64_t d, int64_t first, int64_t count, ElementType type,
                         void* data) {
  switch (type) {
    case ElementType::f32: return write_panels_of<float>(panels, n, d, first, count, data);
    case ElementType::f64: return write_panels_of<double>(panels, n, d, first, count, data);
    case ElementType::bf16: return write_panels_of<bf16>(panels, n, d, first, count, data);
    case ElementType::f16: return write_panels_of<fp16>(panels, n, d, first, count, data);
  }
}

// Mean and factor of each column of a panel; `panel` is centred on the way.
template <typename T>
static void column_statistics(const MomentInput& input, T* panel, T* mean, T* factor) {
  constexpr int C = kColumns<T>;
  const int64_t n = input.n;
  ColumnSums<T> sums;
  for (int c = 0; c < C; ++c) mean[c] = 0, factor[c] = 1;
  if (input.center) {
    sum_columns<T>(n, sums, [&](int64_t r, int v) { return at(panel, r, v); });
    for (int c = 0; c < C; ++c) mean[c] = static_cast<T>(sums[c] / static_cast<double>(n));
    for (int64_t r = 0; r < n; ++r)
      for (int v = 0; v < kVectors; ++v)
        store(panel + r * C + v * kLanes<T>, at(panel, r, v) - load(mean + v * kLanes<T>));
  }
  if (input.scale == ColumnScale::none) return;
  sum_columns<T>(n, sums, [&](int64_t r, int v) { return at(panel, r, v) * at(panel, r, v); });
  for (int c = 0; c < C; ++c) {
    const double root =
        __builtin_sqrt(input.scale == ColumnScale::variance ? sums[c] / static_cast<double>(n) + input.eps : sums[c]);
    factor[c] = static_cast<T>(1.0 / (input.scale == ColumnScale::norm && root < input.eps ? input.eps : root));
  }
}

// x̂ = (x − mean)·factor in place; a panel that is centred already has mean null.
template <typename T>
static void normalize_panel(int64_t n, const T* mean, const T* factor, T* panel) {
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const vec<T> x = at(panel, r, v), m = mean == nullptr ? vec<T>{} : load(mean + v * kLanes<T>);
      store(panel + r * kColumns<T> + v * kLanes<T>, (x - m) * load(factor + v * kLanes<T>));
    }
}

// What turns s·(product) into dx for the kColumns columns of a panel.
template <typename T>
struct ColumnGradient {
  T product, distance;   // s, and ±2·d/d distance
  T along[kColumns<T>];  // weight of the partner's column: the diagonal's gradient
  const T *mean, *factor, *other_mean, *other_factor;
};

// dx̂ = s·g + along·partner, then through scale and centring: dx = factor·(dx̂ − mean(dx̂) − x̂·w·Σ dx̂ x̂), w = 1/n for a
// variance, 1 for a norm, 0 where the scale is constant; plus distance·(x − other). In place in `g`.
template <typename T>
static void finish_gradient(const MomentInput& input, const ColumnGradient<T>& of, const T* own, const T* partner,
                            const T* other, T* g) {
  constexpr int C = kColumns<T>;
  const int64_t n = input.n;
  const double rows = static_cast<double>(n);
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < kVectors; ++v)
      store(g + r * C + v * kLanes<T>, at(g, r, v) * of.product + at(partner, r, v) * load(of.along + v * kLanes<T>));
  alignas(64) T middle[C] = {}, weight[C] = {};
  ColumnSums<T> sums;
  if (input.center) {
    sum_columns<T>(n, sums, [&](int64_t r, int v) { return at(g, r, v); });
    for (int c = 0; c < C; ++c) middle[c] = static_cast<T>(sums[c] / rows);
  }
  if (input.scale != ColumnScale::none) {
    sum_columns<T>(n, sums, [&](int64_t r, int v) { return at(g, r, v) * at(own, r, v); });
    const T most = static_cast<T>(1.0 / input.eps);
    for (int c = 0; c < C; ++c) {
      const bool constant = input.scale == ColumnScale::norm && of.factor[c] >= most;
      weight[c] = constant ? T(0) : static_cast<T>(input.scale == ColumnScale::variance ? sums[c] / rows : sums[c]);
    }
  }
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t c = v * kLanes<T>;
      const vec<T> x = at(own, r, v), f = load(of.factor + c);
      vec<T> dx = f * (at(g, r, v) - load(middle + c) - x * load(weight + c));
      if (of.distance != 0) {
        // x − other = x̂/factor − ô/factor' + (mean − mean')
        const vec<T> apart = x / f - at(other, r, v) / load(of.other_factor + c);
        dx += of.distance * (apart + (load(of.mean + c) - load(of.other_mean + c)));
      }
      store(g + r * C + c, dx);
    }
}

// [rows][kColumns] of one panel into the columns `first`, …, first + kColumns − 1 of `out`, whose own panels hold rows:
// out[rows/kColumns][d][kColumns]; rows beyond n are zero.
template <typename T>
static void transpose_panel(const T* panel, int64_t n, int64_t d, int64_t first, T* out) {
  constexpr int C = kColumns<T>;
  const int64_t width = d - first < C ? d - first : C;
  for (int64_t j = 0; j < n; j += C, out += d * C) {
    const int64_t count = n - j < C ? n - j : C;
    for (int64_t k = 0; k < width; ++k) {
      const T* x = panel + j * C + k;
      T* to = out + (first + k) * C;
      for (int64_t c = 0; c < count; ++c) to[c] = x[c * C];
      for (int64_t c = count; c < C; ++c) to[c] = 0;
    }
  }
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
