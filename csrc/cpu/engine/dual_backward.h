// Gradients of second moments in dual form: with G the Gram matrix of the partner's rows,
//
//   dX̂ = s·(G X̂ − Ŷ diag(M_ii)) + Ŷ diag(d/d M_ii)
//
// by blocks of columns, each read, multiplied and taken through its scale and mean while it is in the cache.
#pragma once
#include "backward_columns.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct DualBackward {
  static constexpr int C = kColumns<T>;
  BackwardColumns<T> columns;
  const bool kept;  // whether the forward has kept the Gram matrices
  T* grams[2];      // [n/kRows][n][kRows]
  T *panels, *out;  // [workers] each
  T* recomputed;    // the Gram matrices, where they were not kept
  char* forward_memory;

  DualBackward(const MomentInput& input, bool matrices_kept, int64_t threads, Arena& arena)
      : columns(input, threads, arena), kept(matrices_kept), grams{}, recomputed(nullptr), forward_memory(nullptr) {
    const int64_t block = columns.width * columns.panel_size();
    for (int64_t v = 0; v < columns.views; ++v) grams[v] = arena.take<T>(groups() * kRows * columns.n);
    panels = arena.take<T>(threads * columns.views * block);
    out = arena.take<T>(threads * block);
    if (kept) return;
    recomputed = arena.take<T>(columns.views * columns.n * columns.n);
    Arena inner{nullptr};
    Forward<T>(input, threads, inner);
    forward_memory = arena.take<char>(inner.bytes);
  }

  int64_t groups() const { return (columns.n + kRows - 1) / kRows; }

  // A Gram matrix in the order in which the micro-kernel broadcasts its rows; it is symmetric, so columns serve.
  void pack_gram(const T* dense, int64_t v, int64_t group) const {
    T* packed = grams[v] + group * columns.n * kRows;
    const int64_t left = columns.n - group * kRows;
    for (int64_t m = 0; m < columns.n; ++m, packed += kRows)
      for (int64_t r = 0; r < kRows; ++r) packed[r] = r < left ? dense[m * columns.n + group * kRows + r] : T(0);
  }

  // out = G·x for `count` panels, a tile's height of rows at a time, so that their sums stay in the cache.
  void gram_product(const T* gram, const T* x, int64_t count, T* g) const {
    const int64_t n = columns.n, runs = (n + kDepth - 1) / kDepth, depth = round_up((n + runs - 1) / runs, C);
    for (int64_t block = 0; block < n; block += kTile)
      for (int64_t k = 0; k < n; k += depth) {
        const int64_t length = n - k < depth ? n - k : depth, end = block + kTile < n ? block + kTile : n;
        const bool sum_complete = k + depth >= n;  // the next step: the next rows, or the next part of the sum
        const int64_t next_k = sum_complete ? 0 : k + depth, next_row = sum_complete && end < n ? end : block;
        const int64_t next = (n - next_k < depth ? n - next_k : depth) * static_cast<int64_t>(sizeof(T));
        for (int64_t p = 0; p < count; ++p) {
          const T* b = x + p * columns.panel_size() + k * C;
          for (int64_t i = block; i < end; i += kRows) {
            prefetch_part(x + p * columns.panel_size() + next_k * C, next * C, (i - block) / kRows, kTile / kRows);
            prefetch_part(gram + (next_row + i - block) * n + next_k * kRows, next * kRows, p, count);
            const T* a = gram + i * n + k * kRows;
            T* sums = g + p * columns.panel_size() + i * C;
            if (k == 0)
              micro_rows<T, kVectors, 1, kRows, C, Store::replace>(end - i, a, b, 1, length, length, 0, sums, 0, 0);
            else
              micro_rows<T, kVectors, 1, kRows, C, Store::add>(end - i, a, b, 1, length, length, 0, sums, 0, 0);
          }
        }
      }
  }

  // From the product in `g` to the gradient, for the columns of one task; x: the views' panels of them.
  void finish(const MomentGradient& gradient, int64_t v, int64_t task, T* const x[2], T* g) const {
    const int64_t first = task * columns.width * C, count = columns.panels_of(task);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t place = p * columns.panel_size();
      const T *own = x[v] + place, *partner = x[columns.input.partner(v)] + place;
      ColumnGradient<T> column_gradient = columns.column_gradient(gradient, v, first + p * C);
      ColumnSums<T, 3> sums;
      column_gradient.sum(columns.input, own, partner, g + place, sums);
      column_gradient.project(columns.input, sums);
      column_gradient.finish(columns.n, own, partner, g + place);
    }
    write_panels(g, columns.panel_size(), 0, columns.n, columns.d, first, count, columns.input.views[0].type,
                 columns.target(gradient, v));
  }

  void run(const MomentSaved& saved, const MomentGradient& gradient, const Parallel& parallel) {
    columns.load_saved(saved, gradient);
    const T* matrices = static_cast<const T*>(saved.moments);
    if (!kept) {
      Arena inner{forward_memory};
      MomentSaved same = saved;  // the statistics are written over by the same ones
      same.moments = recomputed;
      Forward<T>(columns.input, parallel.threads, inner).run(same, parallel);
      matrices = recomputed;
    }
    const int64_t block = columns.width * columns.panel_size();
    each_task(parallel, columns.views * groups(), columns.next, [&](int64_t, int64_t task) {
      const int64_t v = task / groups();
      pack_gram(matrices + v * columns.n * columns.n, v, task % groups());
    });
    each_task(parallel, columns.tasks(), columns.next, [&](int64_t worker, int64_t task) {
      T* x[2];
      for (int64_t v = 0; v < columns.views; ++v) {
        x[v] = panels + (worker * columns.views + v) * block;
        columns.read(v, task, x[v], nullptr);
      }
      for (int64_t v = 0; v < columns.views; ++v) {
        if (gradient.views[v] == nullptr) continue;
        gram_product(grams[columns.input.partner(v)], x[v], columns.panels_of(task), out + worker * block);
        finish(gradient, v, task, x, out + worker * block);
      }
    });
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
