// Gradients of second moments in primal form: with M the matrix between a view's partner and itself,
//
//   dX̂ = s·Ŷ offdiag(M) + Ŷ diag(d/d M_ii)
//
// by blocks of columns, each taken through its scale and mean. Where M was not kept, its tiles are computed again, by
// blocks that are used and forgotten.
#pragma once
#include "backward_columns.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct PrimalBackward {
  static constexpr int C = kColumns<T>;
  BackwardColumns<T> columns;
  T* packed[2];             // panels of columns
  double* totals;           // [views, padded]: Σ x̂ of each column
  T *out, *strips, *tiles;  // [workers] each

  PrimalBackward(const MomentInput& input, bool matrices_kept, int64_t threads, Arena& arena)
      : columns(input, threads, arena), packed{} {
    for (int64_t v = 0; v < columns.views; ++v) packed[v] = arena.take<T>(columns.packed_size());
    out = arena.take<T>(threads * kTile * columns.width * C);
    totals = arena.take<double>(columns.views * columns.padded);
    strips = arena.take<T>(threads * strip_count() * strip_size());
    tiles = arena.take<T>(matrices_kept ? 0 : threads * kTile * kTile);
  }

  // kDepth rows of M for the columns of one task, and how many such strips there are.
  int64_t strip_size() const { return kDepth * columns.width * C; }
  int64_t strip_count() const { return (columns.d + kDepth - 1) / kDepth; }

  // Rows [k, k + depth) of offdiag(M), M between the partner's columns and the block's, in strips [count][kDepth][C].
  void pack_moments(const T* dense, int64_t v, int64_t k, int64_t depth, int64_t first, int64_t count, T* scratch,
                    T* strips) const {
    const int64_t partner = columns.input.partner(v), d = columns.d;
    if (dense == nullptr) {
      for (int64_t r = 0; r < depth; ++r)
        for (int64_t c = 0; c < count * C; ++c) scratch[r * kTile + c] = 0;
      tile_gram(packed[partner] + k / C * columns.panel_size(), packed[v] + first / C * columns.panel_size(),
                columns.panel_size(), depth, count * C, 0, columns.n, false, scratch);
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t begin = first + p * C, width = d - begin < C ? d - begin : C;
      T* strip = strips + p * kDepth * C;
      if (dense != nullptr && columns.input.cross && v == 0)  // the rows of M are this view's columns
        transpose(dense + begin * d + k, d, width, depth, strip, C);
      else
        for (int64_t r = 0; r < depth; ++r) {
          const T* row = dense == nullptr ? scratch + r * kTile + p * C : dense + (k + r) * d + begin;
          for (int64_t c = 0; c < width; ++c) strip[r * C + c] = row[c];
        }
      for (int64_t r = 0; r < depth && width < C; ++r)
        for (int64_t c = width; c < C; ++c) strip[r * C + c] = 0;
      for (int64_t r = begin < k ? 0 : begin - k; r < depth && k + r < begin + width; ++r)
        strip[r * C + k + r - begin] = 0;
    }
  }

  // What Σ dx̂ and Σ dx̂ x̂ are without the products, from the strips W = offdiag(M) of one panel:
  // Σ_n g = Σ_k W_k Σ_n ŷ_k and Σ_n g x̂ = Σ_k W_k².
  void sums_of_strips(const ColumnGradient<T>& column_gradient, int64_t v, int64_t first, const T* strips, int64_t p,
                      ColumnSums<T, 3>& sums) const {
    const int64_t partner = columns.input.partner(v), m = columns.input.cross ? 0 : v;
    double product[C] = {}, square[C] = {};
    for (int64_t k = 0; k < columns.d; ++k) {
      const T* w = strips + k / kDepth * strip_size() + (p * kDepth + k % kDepth) * C;
      const double y = totals[partner * columns.padded + k];
      for (int c = 0; c < C; ++c) {
        const double x = static_cast<double>(w[c]);
        product[c] += x * y;
        square[c] += x * x;
      }
    }
    const double s = static_cast<double>(column_gradient.product);
    for (int c = 0; c < C; ++c) {
      const double weight = static_cast<double>(column_gradient.diagonal_weight[c]);
      sums[0][c] = s * product[c] + weight * totals[partner * columns.padded + first + c];
      sums[1][c] = s * square[c] + weight * static_cast<double>(columns.diagonal[m * columns.padded + first + c]);
      sums[2][c] = totals[v * columns.padded + first + c];
    }
  }

  // dX for the columns of `count` panels from `first` on, Ŷ·offdiag(M) and what follows by a tile's height
  // of rows at a time.
  void gradient_block(const T* dense, const MomentGradient& gradient, int64_t v, int64_t first, int64_t count,
                      T* scratch, T* strips, T* g) const {
    const T *y = packed[columns.input.partner(v)], *own = packed[v] + first / C * columns.panel_size();
    const T* partner = y + first / C * columns.panel_size();
    const int64_t size = strip_size();
    for (int64_t k = 0; k < columns.d; k += kDepth)
      pack_moments(dense, v, k, columns.d - k < kDepth ? columns.d - k : kDepth, first, count, scratch,
                   strips + k / kDepth * size);
    ColumnGradient<T> column_gradients[kTile / C];
    for (int64_t p = 0; p < count; ++p) {
      ColumnSums<T, 3> sums;
      column_gradients[p] = columns.column_gradient(gradient, v, first + p * C);
      sums_of_strips(column_gradients[p], v, first + p * C, strips, p, sums);
      column_gradients[p].project(columns.input, sums);
    }
    for (int64_t block = 0; block < columns.n; block += kTile) {
      const int64_t rows = columns.n - block < kTile ? columns.n - block : kTile;
      for (int64_t k = 0; k < columns.d; k += kDepth) block_product(y, block, rows, k, count, strips, g);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t place = p * columns.panel_size() + block * C;
        column_gradients[p].finish(rows, own + place, partner + place, g + p * kTile * C);
      }
      write_panels(g, kTile * C, block, rows, columns.d, first, count, columns.input.views[0].type,
                   columns.target(gradient, v));
    }
  }

  // g (+)= Ŷ[block rows][k …]·W[k …], g in panels of kTile rows; meanwhile the next step's operands are asked for.
  void block_product(const T* y, int64_t block, int64_t rows, int64_t k, int64_t count, const T* strips, T* g) const {
    const int64_t depth = columns.d - k < kDepth ? columns.d - k : kDepth, size = strip_size();
    const int64_t chunks = (depth + C - 1) / C, last = depth - (chunks - 1) * C;
    const bool sum_complete = k + kDepth >= columns.d;
    const int64_t next_k = sum_complete ? 0 : k + kDepth, next_row = sum_complete ? block + kTile : block;
    const int64_t line = C * static_cast<int64_t>(sizeof(T)), steps = (kTile + kRows - 1) / kRows;
    const int64_t next_rows = columns.n - next_row < kTile ? columns.n - next_row : kTile;
    for (int64_t p = 0; p < count; ++p) {
      const T *b = strips + k / kDepth * size + p * kDepth * C, *next_b = strips + next_k / kDepth * size;
      for (int64_t i = 0; i < rows; i += kRows) {
        prefetch_part(next_b + p * kDepth * C, kDepth * line, i / kRows, steps);
        for (int64_t q = p; next_rows > 0 && q < kDepth / C && next_k + q * C < columns.d; q += count)
          prefetch_part(y + (next_k / C + q) * columns.panel_size() + next_row * C, next_rows * line, i / kRows, steps);
        const T* a = y + k / C * columns.panel_size() + (block + i) * C;
        T* sums = g + (p * kTile + i) * C;
        if (k == 0)
          micro_rows<T, kVectors, C, 1, C, Store::replace>(rows - i, a, b, chunks, C, last, columns.panel_size(), sums,
                                                           0, 0);
        else
          micro_rows<T, kVectors, C, 1, C, Store::add>(rows - i, a, b, chunks, C, last, columns.panel_size(), sums, 0,
                                                       0);
      }
    }
  }

  void run(const MomentSaved& saved, const MomentGradient& gradient, const Parallel& parallel) {
    columns.load_saved(saved, gradient);
    const T* matrices = static_cast<const T*>(saved.moments);
    const int64_t tasks = columns.tasks(), block = columns.width * columns.panel_size();
    each_task(parallel, columns.views * tasks, columns.next, [&](int64_t, int64_t task) {
      const int64_t v = task / tasks;
      columns.read(v, task % tasks, packed[v] + task % tasks * block, totals);
    });
    each_task(parallel, columns.views * tasks, columns.next, [&](int64_t worker, int64_t task) {
      const int64_t v = task / tasks, block_number = task % tasks, m = columns.input.cross ? 0 : v;
      if (gradient.views[v] == nullptr) return;
      const T* dense = matrices == nullptr ? nullptr : matrices + m * columns.d * columns.d;
      gradient_block(dense, gradient, v, block_number * columns.width * C, columns.panels_of(block_number),
                     tiles + worker * kTile * kTile, strips + worker * strip_count() * strip_size(),
                     out + worker * kTile * columns.width * C);
    });
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
