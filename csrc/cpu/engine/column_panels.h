// Columns of a row-major matrix in panels [columns/kColumns][rows][kColumns]: their means and scales on the way in, the
// gradients through them on the way out. A panel holds whole columns, so each is finished while it is in the cache.
#pragma once
#include "cpu/second_moment.h"
#include "packed_blocks.h"
#include "transpose.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// Numbers from one panel of `rows` rows to the next. Tiles read a chunk of rows from several panels at once; were these
// a power of two apart, as without gaps at 2048 rows, all would fall into the same few sets of the caches.
template <typename T>
static inline int64_t panel_stride(int64_t rows) {
  constexpr int64_t kPage = 4096, kWay = 128 << 10, kChunk = 24 << 10;  // of the first level, of the second, one chunk
  int64_t bytes = round_up(rows * kColumns<T> * static_cast<int64_t>(sizeof(T)), kPage) + kPage * 3 / 8;
  while (bytes > kWay && (bytes % kWay < kChunk || bytes % kWay > kWay - kChunk)) bytes += kPage;
  return bytes / static_cast<int64_t>(sizeof(T));
}

// Sums of this many rows are kept in T before they join a double: the error of a mean does not grow with the rows.
inline constexpr int64_t kSumRows = 64;

template <typename T, int K>
using ColumnSums = double[K][kColumns<T>];

// sums[k][c] = Σ_r of the K vectors that f(r, v, part) adds to `part`, where c = v·kLanes + lane.
template <typename T, int K, typename F>
static inline void sum_columns(int64_t rows, ColumnSums<T, K>& sums, F&& f) {
  for (int k = 0; k < K; ++k)
    for (int c = 0; c < kColumns<T>; ++c) sums[k][c] = 0;
  for (int64_t first = 0; first < rows; first += kSumRows) {
    const int64_t end = first + kSumRows < rows ? first + kSumRows : rows;
    vec<T> part[kVectors][K] = {};
    for (int64_t r = first; r < end; ++r)
      for (int v = 0; v < kVectors; ++v) f(r, v, part[v]);
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < kColumns<T>; ++c) sums[k][c] += static_cast<double>(part[c / kLanes<T>][k][c % kLanes<T>]);
  }
}

template <typename T>
static inline vec<T> panel_vector(const T* panel, int64_t row, int v) {
  return load(panel + row * kColumns<T> + v * kLanes<T>);
}

template <typename S, typename T>
static void read_panels_of(const void* data, int64_t rows, int64_t d, int64_t first, int64_t count, int64_t stride,
                           T* panels) {
  constexpr int C = kColumns<T>;
  const S* x = static_cast<const S*>(data) + first;
  const int64_t whole = (d - first) / C < count ? (d - first) / C : count;
  for (int64_t r = 0; r < rows; ++r, x += d) {
    for (int64_t p = 0; p < whole; ++p) {
      T* out = panels + p * stride + r * C;
      for (int c = 0; c < C; ++c) out[c] = static_cast<T>(widen(x[p * C + c]));
    }
    for (int64_t p = whole; p < count; ++p) {
      T* out = panels + p * stride + r * C;
      for (int c = 0; c < C; ++c) out[c] = first + p * C + c < d ? static_cast<T>(widen(x[p * C + c])) : T(0);
    }
  }
}

// Columns first, …, first + count·kColumns of `rows` into `count` panels; columns beyond d are zero.
template <typename T>
static void read_panels(const Rows& rows, int64_t n, int64_t d, int64_t first, int64_t count, int64_t stride,
                        T* panels) {
  switch (rows.type) {
    case ElementType::f32: return read_panels_of<float>(rows.data, n, d, first, count, stride, panels);
    case ElementType::f64: return read_panels_of<double>(rows.data, n, d, first, count, stride, panels);
    case ElementType::bf16: return read_panels_of<bf16>(rows.data, n, d, first, count, stride, panels);
    case ElementType::f16: return read_panels_of<fp16>(rows.data, n, d, first, count, stride, panels);
  }
}

// Where `rows` rows from `row` on, of the columns from `first` on, of a gradient go: dx = panel + distance·(x − other),
// from the rows themselves, so that one that is not finite stays alone.
struct ColumnTarget {
  const void *x, *other;
  double distance;  // 0: neither row is read
  void* dx;
};

template <typename S, typename T>
static void write_panels_of(const T* panels, int64_t stride, int64_t row, int64_t rows, int64_t d, int64_t first,
                            int64_t count, const ColumnTarget& to) {
  constexpr int C = kColumns<T>;
  const int64_t begin_at = row * d + first;
  S* dx = static_cast<S*>(to.dx) + begin_at;
  const S *x = static_cast<const S*>(to.x) + begin_at, *other = static_cast<const S*>(to.other) + begin_at;
  const T distance = static_cast<T>(to.distance);
  for (int64_t r = 0; r < rows; ++r, dx += d, x += d, other += d) {
    for (int64_t p = 0; p < count; ++p) {
      const T* in = panels + p * stride + r * C;
      const int64_t begin = p * C, width = d - first - begin < C ? d - first - begin : C;
      alignas(64) T out[C];
      for (int64_t c = 0; c < width; ++c) out[c] = in[c];
      if (distance != 0)
        for (int64_t c = 0; c < width; ++c)
          out[c] += distance * (static_cast<T>(widen(x[begin + c])) - static_cast<T>(widen(other[begin + c])));
      for (int64_t c = 0; c < width; ++c) {
        if constexpr (sizeof(S) == sizeof(double))
          dx[begin + c] = static_cast<double>(out[c]);
        else
          narrow(static_cast<float>(out[c]), dx + begin + c);
      }
    }
  }
}

template <typename T>
static void write_panels(const T* panels, int64_t stride, int64_t row, int64_t rows, int64_t d, int64_t first,
                         int64_t count, ElementType type, const ColumnTarget& to) {
  switch (type) {
    case ElementType::f32: return write_panels_of<float>(panels, stride, row, rows, d, first, count, to);
    case ElementType::f64: return write_panels_of<double>(panels, stride, row, rows, d, first, count, to);
    case ElementType::bf16: return write_panels_of<bf16>(panels, stride, row, rows, d, first, count, to);
    case ElementType::f16: return write_panels_of<fp16>(panels, stride, row, rows, d, first, count, to);
  }
}

template <typename T>
static inline void put(T* panel, int64_t row, int v, vec<T> x) {
  store(panel + row * kColumns<T> + v * kLanes<T>, x);
}

// From Σ x (if centring) to the mean of each column, x minus it in place, and squares[c] = Σ x² of what is left.
template <typename T>
static void center_panel(const MomentInput& input, const double* sums, T* panel, T* mean, ColumnSums<T, 1>& squares) {
  for (int c = 0; c < kColumns<T>; ++c)
    mean[c] = input.center ? static_cast<T>(sums[c] / static_cast<double>(input.n)) : T(0);
  sum_columns<T, 1>(input.n, squares, [&](int64_t r, int v, vec<T>* part) {
    vec<T> x = panel_vector(panel, r, v);
    if (input.center) put(panel, r, v, x -= load(mean + v * kLanes<T>));
    part[0] += x * x;
  });
}

// The factor of each column, 1 / sqrt(Σ x²/n + eps) or 1 / max(sqrt(Σ x²), eps).
template <typename T>
static void column_factors(const MomentInput& input, const ColumnSums<T, 1>& squares, T* factor) {
  for (int c = 0; c < kColumns<T>; ++c) {
    const double square = squares[0][c];
    if (input.scale == ColumnScale::none) {
      factor[c] = 1;
    } else if (input.scale == ColumnScale::variance) {
      factor[c] = static_cast<T>(1 / __builtin_sqrt(square / static_cast<double>(input.n) + input.eps));
    } else {
      const double norm = __builtin_sqrt(square);
      factor[c] = static_cast<T>(1 / (norm < input.eps ? input.eps : norm));
    }
  }
}

// x̂ = (x − mean)·factor in place.
template <typename T>
static void normalize_panel(int64_t n, const T* mean, const T* factor, T* panel) {
  for (int64_t r = 0; r < n; ++r)
    for (int v = 0; v < kVectors; ++v)
      put(panel, r, v, (panel_vector(panel, r, v) - load(mean + v * kLanes<T>)) * load(factor + v * kLanes<T>));
}

// What turns s·g, g a product, into dx for the kColumns columns of a panel: with dx̂ = s·g + diagonal_weight·partner,
//
//   dx = factor·(y − mean(y)),   y = dx̂ − weight·x̂,   weight = Σ dx̂ x̂ / n for a variance, Σ dx̂ x̂ for a norm,
//                                                              0 where the scale is constant.
template <typename T>
struct ColumnGradient {
  T product;                                   // s
  T diagonal_weight[kColumns<T>];              // weight of the partner's column: the diagonal's gradient
  T middle[kColumns<T>], weight[kColumns<T>];  // mean(y), and weight
  const T* factor;

  // From Σ dx̂, Σ dx̂ x̂ and Σ x̂. The last is a rounding error, but where means were large it is not small beside the
  // others, so it is counted.
  void project(const MomentInput& input, const ColumnSums<T, 3>& sums) {
    const double rows = static_cast<double>(input.n);
    const T largest = static_cast<T>(1.0 / input.eps);
    for (int c = 0; c < kColumns<T>; ++c) {
      double w = 0;
      if (input.scale == ColumnScale::variance) w = sums[1][c] / rows;
      if (input.scale == ColumnScale::norm && factor[c] < largest) w = sums[1][c];
      weight[c] = static_cast<T>(w);
      middle[c] = input.center ? static_cast<T>((sums[0][c] - w * sums[2][c]) / rows) : T(0);
    }
  }

  vec<T> prepared(const T* partner, const T* g, int64_t r, int v) const {
    return panel_vector(g, r, v) * product + panel_vector(partner, r, v) * load(diagonal_weight + v * kLanes<T>);
  }

  // The sums of a whole panel.
  void sum(const MomentInput& input, const T* own, const T* partner, const T* g, ColumnSums<T, 3>& sums) const {
    sum_columns<T, 3>(input.n, sums, [&](int64_t r, int v, vec<T>* part) {
      const vec<T> x = panel_vector(own, r, v), dx = prepared(partner, g, r, v);
      part[0] += dx;
      part[1] += dx * x;
      part[2] += x;
    });
  }

  // g becomes dx, for some rows.
  void finish(int64_t rows, const T* own, const T* partner, T* g) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t c = v * kLanes<T>;
        const vec<T> y = prepared(partner, g, r, v) - panel_vector(own, r, v) * load(weight + c) - load(middle + c);
        put(g, r, v, load(factor + c) * y);
      }
  }
};

// One panel of columns, [n][kColumns], into the places first, …, first + kColumns − 1 of panels of rows, `stride`
// numbers apart: out[n/kColumns][d][kColumns]; rows beyond n are zero.
template <typename T>
static void transpose_panel(const T* panel, int64_t n, int64_t d, int64_t first, int64_t stride, T* out) {
  constexpr int C = kColumns<T>;
  const int64_t width = d - first < C ? d - first : C;
  for (int64_t j = 0; j < n; j += C, out += stride) {
    const int64_t count = n - j < C ? n - j : C;
    T* to = out + first * C;
    transpose(panel + j * C, C, count, width, to, C);
    for (int64_t k = 0; k < width && count < C; ++k)
      for (int64_t c = count; c < C; ++c) to[k * C + c] = 0;
  }
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
