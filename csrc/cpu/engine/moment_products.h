// The products behind second moments: panels of columns or of rows, tiles of XᵀY, and the sums that are read off them.
#pragma once
#include "gram_tiles.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// What both passes need: the panels of all columns, and the columns' statistics.
template <typename T>
struct Moments {
  static constexpr int C = kColumns<T>;
  const MomentInput& input;
  const int64_t n, d, views, matrices, threads;
  const GramPlan<T> plan;  // of M, or of the Gram matrices
  const int64_t column_panels, padded;
  const int64_t width;          // panels of columns that are worked on together
  T *mean, *factor, *diagonal;  // [views, padded], [views, padded], [R, padded]
  int64_t* next;

  Moments(const MomentInput& in, int64_t thread_count, Arena& arena)
      : input(in),
        n(in.n),
        d(in.d),
        views(in.view_count()),
        matrices(in.matrix_count()),
        threads(thread_count),
        plan(in.dual ? GramPlan<T>(n, d, true) : GramPlan<T>(d, n, !in.cross)),
        column_panels((d + C - 1) / C),
        padded(column_panels * C),
        width(chosen_width()) {
    mean = arena.take<T>(views * padded);
    factor = arena.take<T>(views * padded);
    diagonal = arena.take<T>(matrices * padded);
    next = arena.take<int64_t>(1);
  }

  // A block of columns is no wider than a tile and, in dual form, where it is read for each product, no larger than a
  // megabyte; and every thread gets a few blocks.
  int64_t chosen_width() const {
    int64_t panels = kTile / C;
    const int64_t fits = (int64_t{1} << 20) / (n * C * static_cast<int64_t>(sizeof(T)));
    const int64_t share = (input.dual ? 1 : views) * column_panels / (4 * threads);
    if (input.dual && fits < panels) panels = fits;
    if (share < panels) panels = share;
    return panels < 1 ? 1 : panels;
  }
  int64_t tasks() const { return (column_panels + width - 1) / width; }
  int64_t panels_of(int64_t task) const {
    return column_panels - task * width < width ? column_panels - task * width : width;
  }
  int64_t panel_size() const { return panel_stride<T>(n); }
  int64_t products() const { return input.dual ? views : matrices; }

  // The panels of rows (dual) or of columns (primal) of one view.
  int64_t packed_size() const {
    return input.dual ? plan.padded_items() / C * panel_stride<T>(d) : column_panels * panel_size();
  }

  void copy_out(const T* from, int64_t count, void* to) const {
    for (int64_t v = 0; v < count; ++v)
      for (int64_t c = 0; c < d; ++c) static_cast<T*>(to)[v * d + c] = from[v * padded + c];
  }
  void copy_in(const void* from, int64_t count, T* to, T beyond) const {
    for (int64_t v = 0; v < count; ++v)
      for (int64_t c = 0; c < padded; ++c) to[v * padded + c] = c < d ? static_cast<const T*>(from)[v * d + c] : beyond;
  }
};

// Tiles of the products, their sums over slices, and what is read off them.
template <typename T>
struct Products {
  const Moments<T>& moments;
  const GramPlan<T>& plan;
  T* tiles;      // [workers] or, with slices, [slices][pairs]; of [products][tile]
  double* sums;  // [pairs][2]

  Products(const Moments<T>& shared, Arena& arena) : moments(shared), plan(moments.plan) {
    const int64_t places = plan.slices == 1 ? moments.threads : plan.slices * plan.pairs;
    tiles = arena.take<T>(places * moments.products() * plan.tile_size());
    sums = arena.take<double>(plan.pairs * 2);
  }
  T* tile(int64_t place, int64_t product) const {
    return tiles + (place * moments.products() + product) * plan.tile_size();
  }

  void compute(T* const packed[2], int64_t i, int64_t j, int64_t s, int64_t place) const {
    for (int64_t p = 0; p < moments.products(); ++p)
      plan.tile(packed[p], packed[moments.input.dual ? p : moments.input.partner(p)], i, j, s, tile(place, p));
  }

  // Copies tile (i, j), and its mirror image if the product is symmetric, into a dense matrix.
  void keep(const T* x, int64_t i, int64_t j, T* dense) const {
    const int64_t items = plan.blocks.rows, rows = plan.blocks.length(i), columns = plan.blocks.length(j);
    T* at = dense + plan.blocks.first(i) * items + plan.blocks.first(j);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = plan.symmetric && i == j ? r : 0; c < columns; ++c) at[r * items + c] = x[r * kTile + c];
    if (!plan.symmetric) return;
    T* mirror = dense + plan.blocks.first(j) * items + plan.blocks.first(i);
    if (i != j)
      transpose(x, kTile, rows, columns, mirror, items);
    else
      for (int64_t c = 0; c < columns; ++c)
        for (int64_t r = 0; r < c; ++r) mirror[c * items + r] = x[r * kTile + c];
  }

  // Σ x·y over the tile, weighted by how often its entries stand in the whole matrix.
  double dot(const T* x, const T* y, int64_t i, int64_t j, bool with_diagonal) const {
    const int64_t rows = plan.blocks.length(i), columns = plan.blocks.length(j);
    double total = 0, diagonal = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const T *a = x + r * kTile, *b = y + r * kTile;
      const int64_t first = plan.symmetric && i == j ? r + 1 : 0;
      vec<T> part = {};
      int64_t c = first;
      for (; c < columns && c % kLanes<T> != 0; ++c) total += static_cast<double>(a[c]) * static_cast<double>(b[c]);
      for (; c + kLanes<T> <= columns; c += kLanes<T>) part += load(a + c) * load(b + c);
      for (; c < columns; ++c) total += static_cast<double>(a[c]) * static_cast<double>(b[c]);
      total += static_cast<double>(sum_lanes<T>(part));
      if (i == j) diagonal += static_cast<double>(a[r]) * static_cast<double>(b[r]);
    }
    if (plan.symmetric) return 2 * total + (with_diagonal ? diagonal : 0);
    return total - diagonal;  // not symmetric: primal form, without the diagonal
  }

  void finish(int64_t pair, int64_t i, int64_t j, int64_t place, void* kept) const {
    const bool dual = moments.input.dual;
    const int64_t items = plan.blocks.rows;
    double* sum = sums + pair * 2;
    for (int64_t p = 0; p < moments.products(); ++p)
      if (kept != nullptr) keep(tile(place, p), i, j, static_cast<T*>(kept) + p * items * items);
    if (moments.input.cross && dual) {
      sum[0] = dot(tile(place, 0), tile(place, 1), i, j, true);
      return;
    }
    for (int64_t p = 0; p < moments.products(); ++p) sum[p] = dot(tile(place, p), tile(place, p), i, j, dual);
  }

  // ‖M‖² (dual) or its part off the diagonal (primal) of each matrix.
  void run(T* const packed[2], void* kept, const Parallel& parallel, double* total) const {
    each_task(parallel, plan.pairs * plan.slices, moments.next, [&](int64_t worker, int64_t task) {
      int64_t i, j;
      const int64_t pair = task % plan.pairs, s = task / plan.pairs;
      plan.place(pair, &i, &j);
      compute(packed, i, j, s, plan.slices == 1 ? worker : task);
      if (plan.slices == 1) finish(pair, i, j, worker, kept);
    });
    if (plan.slices > 1)
      each_task(parallel, plan.pairs, moments.next, [&](int64_t, int64_t pair) {
        int64_t i, j;
        plan.place(pair, &i, &j);
        const int64_t size = moments.products() * plan.tile_size();
        for (int64_t s = 1; s < plan.slices; ++s)
          for (int64_t k = 0; k < size; k += kLanes<T>)
            store(tile(pair, 0) + k, load(tile(pair, 0) + k) + load(tile(s * plan.pairs + pair, 0) + k));
        finish(pair, i, j, pair, kept);
      });
    for (int64_t r = 0; r < moments.matrices; ++r) {
      total[r] = 0;
      for (int64_t pair = 0; pair < plan.pairs; ++pair) total[r] += sums[pair * 2 + r];
    }
  }
};

template <typename T>
struct Forward {
  static constexpr int C = kColumns<T>;
  Moments<T> moments;
  T *packed[2], *columns;  // columns: dual form, [workers][views][width panels]
  double* distances;       // [column panels]
  Products<T> products;

  Forward(const MomentInput& input, int64_t threads, Arena& arena)
      : moments(input, threads, arena),
        packed{arena.take<T>(moments.packed_size()), arena.take<T>(moments.views == 2 ? moments.packed_size() : 0)},
        columns(arena.take<T>(input.dual ? threads * moments.views * moments.width * moments.panel_size() : 0)),
        distances(arena.take<double>(moments.column_panels)),
        products(moments, arena) {}

  // Reads, centres and scales the columns of one task, and packs them.
  void pack(int64_t worker, int64_t task) const {
    const MomentInput& input = moments.input;
    const int64_t first = task * moments.width * C, count = moments.panels_of(task), size = moments.panel_size();
    T* x[2];
    for (int64_t v = 0; v < moments.views; ++v) {
      x[v] = input.dual ? columns + (worker * moments.views + v) * moments.width * size
                        : packed[v] + task * moments.width * size;
      read_panels(input.views[v], moments.n, moments.d, first, count, size, x[v]);
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t begin = first + p * C;
      prepare(begin, x[0] + p * size, moments.views == 2 ? x[1] + p * size : nullptr, &distances[begin / C]);
      for (int64_t v = 0; input.dual && v < moments.views; ++v)
        transpose_panel(x[v] + p * size, moments.n, moments.d, begin, panel_stride<T>(moments.d), packed[v]);
    }
  }

  // Centres and scales one panel of each view; their statistics, the diagonal and ‖a − b‖² on the way.
  void prepare(int64_t begin, T* a, T* b, double* distance) const {
    const MomentInput& input = moments.input;
    T *panel[2] = {a, b}, *factor[2];
    ColumnSums<T, 3> sums;
    if (input.has_distance() || input.center)
      sum_columns<T, 3>(moments.n, sums, [&](int64_t r, int v, vec<T>* part) {
        const vec<T> x = panel_vector(a, r, v), y = b == nullptr ? x : panel_vector(b, r, v), apart = x - y;
        part[0] += x;
        part[1] += y;
        part[2] += apart * apart;
      });
    *distance = 0;
    for (int c = 0; input.has_distance() && c < C; ++c) *distance += sums[2][c];
    for (int64_t v = 0; v < moments.views; ++v) {
      ColumnSums<T, 1> squares;
      factor[v] = moments.factor + v * moments.padded + begin;
      center_panel(input, sums[v], panel[v], moments.mean + v * moments.padded + begin, squares);
      column_factors<T>(input, squares, factor[v]);
      for (int c = 0; !input.cross && c < C; ++c) {
        const double f = static_cast<double>(factor[v][c]);
        moments.diagonal[v * moments.padded + begin + c] = static_cast<T>(squares[0][c] * f * f);
      }
    }
    if (!input.cross && input.scale == ColumnScale::none) return;
    auto scaled = [&](int64_t view, int64_t r, int v) {
      const vec<T> x = panel_vector(panel[view], r, v) * load(factor[view] + v * kLanes<T>);
      put(panel[view], r, v, x);
      return x;
    };
    ColumnSums<T, 1> products;
    sum_columns<T, 1>(moments.n, products, [&](int64_t r, int v, vec<T>* part) {
      const vec<T> x = scaled(0, r, v);
      if (b != nullptr) part[0] += x * scaled(1, r, v);
    });
    for (int c = 0; input.cross && c < C; ++c) moments.diagonal[begin + c] = static_cast<T>(products[0][c]);
  }

  MomentSums run(const MomentSaved& saved, const Parallel& parallel) const {
    each_task(parallel, moments.tasks(), moments.next, [&](int64_t worker, int64_t task) { pack(worker, task); });
    MomentSums result{{0, 0}, 0};
    products.run(packed, saved.moments, parallel, result.off_diagonal);
    for (int64_t m = 0; moments.input.dual && m < moments.matrices; ++m)
      for (int64_t c = 0; c < moments.d; ++c) {
        const double entry = static_cast<double>(moments.diagonal[m * moments.padded + c]);
        result.off_diagonal[m] -= entry * entry;
      }
    for (double& off : result.off_diagonal)
      if (off < 0) off = 0;  // what rounding leaves of nothing
    for (int64_t p = 0; p < moments.column_panels; ++p) result.distance += distances[p];
    moments.copy_out(moments.mean, moments.views, saved.mean);
    moments.copy_out(moments.factor, moments.views, saved.factor);
    moments.copy_out(moments.diagonal, moments.matrices, saved.diagonal);
    return result;
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
