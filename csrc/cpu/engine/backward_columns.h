// What the gradients of second moments have in common in both forms: the columns' panels, the gradients of the
// diagonal, and what a panel of columns takes beside its product.
#pragma once
#include "moment_products.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct BackwardColumns : Moments<T> {
  using Moments<T>::C, Moments<T>::input, Moments<T>::n, Moments<T>::d, Moments<T>::views, Moments<T>::matrices;
  using Moments<T>::padded, Moments<T>::width, Moments<T>::mean, Moments<T>::factor, Moments<T>::diagonal;
  using Moments<T>::panels_of, Moments<T>::panel_size, Moments<T>::copy_in;
  T* grad_diagonal;  // [R, padded], incoming

  BackwardColumns(const MomentInput& in, int64_t thread_count, Arena& arena)
      : Moments<T>(in, thread_count, arena), grad_diagonal(arena.take<T>(matrices * padded)) {}

  void load_saved(const MomentSaved& saved, const MomentGradient& gradient) {
    copy_in(saved.mean, views, mean, T(0));
    copy_in(saved.factor, views, factor, T(1));
    copy_in(saved.diagonal, matrices, diagonal, T(0));
    copy_in(gradient.diagonal, matrices, grad_diagonal, T(0));
  }

  // x̂ of the columns of one task; Σ x̂ of each into `sums` if it is not null.
  void read(int64_t v, int64_t task, T* x, double* column_sums) const {
    const int64_t first = task * width * C, count = panels_of(task);
    read_panels(input.views[v], n, d, first, count, panel_size(), x);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t place = v * padded + first + p * C;
      T* panel = x + p * panel_size();
      if (input.center || input.scale != ColumnScale::none) normalize_panel(n, mean + place, factor + place, panel);
      if (column_sums == nullptr) continue;
      ColumnSums<T, 1> sums;
      sum_columns<T, 1>(n, sums, [&](int64_t r, int u, vec<T>* part) { part[0] += panel_vector(panel, r, u); });
      for (int c = 0; c < C; ++c) column_sums[place + c] = sums[0][c];
    }
  }

  // What a panel of columns from `first` on takes beside the product.
  ColumnGradient<T> column_gradient(const MomentGradient& gradient, int64_t v, int64_t first) const {
    const int64_t m = input.cross ? 0 : v;
    ColumnGradient<T> columns{};
    columns.product = static_cast<T>((input.cross ? 2 : 4) * gradient.off_diagonal[m]);
    for (int c = 0; c < C; ++c) {
      T weight = (input.cross ? 1 : 2) * grad_diagonal[m * padded + first + c];
      if (input.dual) weight -= columns.product * diagonal[m * padded + first + c];
      columns.diagonal_weight[c] = weight;
    }
    columns.factor = factor + v * padded + first;
    return columns;
  }

  ColumnTarget target(const MomentGradient& gradient, int64_t v) const {
    const bool pair = input.has_distance();
    return {input.views[v].data, input.views[pair ? 1 - v : v].data, pair ? 2 * gradient.distance : 0,
            gradient.views[v]};
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
