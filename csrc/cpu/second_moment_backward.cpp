// The gradients of second moments on the CPU: see second_moment.h. With s = 2·d/d off (4· for a matrix with itself),
// Ŷ the partner's columns and M the matrix between a view's partner and itself,
//
//   dX̂ = s·Ŷ offdiag(M) + Ŷ diag(d/d M_ii)  =  s·(ŶŶᵀ X̂ − Ŷ diag(M_ii)) + …
//
// by blocks of columns, each block then taken through its scale and mean. A product without the matrix in memory
// computes its tiles again, by blocks that are used and forgotten.
#include "cpu/engine/moment_products.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct Backward {
  static constexpr int C = kColumns<T>;
  Moments<T> of;
  const bool kept;
  T* packed[2];                    // primal form: panels of columns
  T* grams[2];                     // dual form: [n/kRows][n][kRows]
  T* again;                        // dual form, where nothing was kept: the Gram matrices
  double* totals;                  // [views, padded], primal form: Σ x̂ of each column
  T* on;                           // [R, padded] incoming gradients of the diagonal
  T *panels, *out, *strip, *tile;  // [workers] each
  char* forward_memory;

  Backward(const MomentInput& input, bool have, int64_t threads, Arena& arena)
      : of(input, threads, arena), kept(have), packed{}, grams{}, again(nullptr), forward_memory(nullptr) {
    const bool dual = input.dual;
    const int64_t block = of.width * of.panel_size(), groups = (of.n + kRows - 1) / kRows;
    for (int64_t v = 0; v < of.views; ++v) {
      packed[v] = arena.take<T>(dual ? 0 : of.packed_size());
      grams[v] = arena.take<T>(dual ? groups * kRows * of.n : 0);
    }
    on = arena.take<T>(of.matrices * of.padded);
    panels = arena.take<T>(dual ? threads * of.views * block : 0);
    out = arena.take<T>(threads * (dual ? block : kTile * of.width * C));
    totals = arena.take<double>(dual ? 0 : of.views * of.padded);
    strip = arena.take<T>(dual ? 0 : threads * strips() * strip_size());
    tile = arena.take<T>(dual || kept ? 0 : threads * kTile * kTile);
    if (!dual || kept) return;
    again = arena.take<T>(of.views * of.n * of.n);
    Arena inner{nullptr};
    Forward<T>(input, threads, inner);
    forward_memory = arena.take<char>(inner.bytes);
  }

  // kDepth rows of M for the columns of one task, and how many such strips there are.
  int64_t strip_size() const { return kDepth * of.width * C; }
  int64_t strips() const { return (of.d + kDepth - 1) / kDepth; }

  // x̂ of the columns of one task; Σ x̂ of each into `sums` if it is not null.
  void read(int64_t v, int64_t task, T* x, double* column_sums) const {
    const int64_t first = task * of.width * C, count = of.panels_of(task);
    read_panels(of.input.views[v], of.n, of.d, first, count, of.panel_size(), x);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t place = v * of.padded + first + p * C;
      T* panel = x + p * of.panel_size();
      if (of.input.center || of.input.scale != ColumnScale::none)
        normalize_panel(of.n, of.mean + place, of.factor + place, panel);
      if (column_sums == nullptr) continue;
      ColumnSums<T, 1> sums;
      sum_columns<T, 1>(of.n, sums, [&](int64_t r, int u, vec<T>* part) { part[0] += at(panel, r, u); });
      for (int c = 0; c < C; ++c) column_sums[place + c] = sums[0][c];
    }
  }

  // A Gram matrix in the order in which the micro-kernel broadcasts its rows; it is symmetric, so columns serve.
  void pack_gram(const T* dense, int64_t v, int64_t group) const {
    T* to = grams[v] + group * of.n * kRows;
    const int64_t left = of.n - group * kRows;
    for (int64_t m = 0; m < of.n; ++m, to += kRows)
      for (int64_t r = 0; r < kRows; ++r) to[r] = r < left ? dense[m * of.n + group * kRows + r] : T(0);
  }

  // out = G·x for `count` panels, a tile's height of rows at a time, so that their sums stay in the cache.
  void gram_product(const T* gram, const T* x, int64_t count, T* g) const {
    const int64_t n = of.n, runs = (n + kDepth - 1) / kDepth, depth = round_up((n + runs - 1) / runs, C);
    for (int64_t block = 0; block < n; block += kTile)
      for (int64_t k = 0; k < n; k += depth) {
        const int64_t length = n - k < depth ? n - k : depth, end = block + kTile < n ? block + kTile : n;
        const bool down = k + depth >= n;  // the next step: the next rows, or the next part of the sum
        const int64_t next_k = down ? 0 : k + depth, next_row = down && end < n ? end : block;
        const int64_t next = (n - next_k < depth ? n - next_k : depth) * static_cast<int64_t>(sizeof(T));
        for (int64_t p = 0; p < count; ++p) {
          const T* b = x + p * of.panel_size() + k * C;
          for (int64_t i = block; i < end; i += kRows) {
            prefetch_part(x + p * of.panel_size() + next_k * C, next * C, (i - block) / kRows, kTile / kRows);
            prefetch_part(gram + (next_row + i - block) * n + next_k * kRows, next * kRows, p, count);
            const T* a = gram + i * n + k * kRows;
            T* to = g + p * of.panel_size() + i * C;
            if (k == 0)
              micro_rows<T, kVectors, 1, kRows, C, Store::replace>(end - i, a, b, 1, length, length, 0, to, 0, 0);
            else
              micro_rows<T, kVectors, 1, kRows, C, Store::add>(end - i, a, b, 1, length, length, 0, to, 0, 0);
          }
        }
      }
  }

  // Rows [k, k + depth) of offdiag(M), M between the partner's columns and the block's, in strips [count][kDepth][C].
  void pack_moments(const T* dense, int64_t v, int64_t k, int64_t depth, int64_t first, int64_t count, T* scratch,
                    T* to) const {
    const int64_t partner = of.input.partner(v), d = of.d;
    if (dense == nullptr) {
      for (int64_t r = 0; r < depth; ++r)
        for (int64_t c = 0; c < count * C; ++c) scratch[r * kTile + c] = 0;
      tile_gram(packed[partner] + k / C * of.panel_size(), packed[v] + first / C * of.panel_size(), of.panel_size(),
                depth, count * C, 0, of.n, false, scratch);
    }
    for (int64_t p = 0; p < count; ++p) {
      const int64_t begin = first + p * C, width = d - begin < C ? d - begin : C;
      T* at = to + p * kDepth * C;
      if (dense != nullptr && of.input.cross && v == 0)  // the rows of M are this view's columns
        transpose(dense + begin * d + k, d, width, depth, at, C);
      else
        for (int64_t r = 0; r < depth; ++r) {
          const T* row = dense == nullptr ? scratch + r * kTile + p * C : dense + (k + r) * d + begin;
          for (int64_t c = 0; c < width; ++c) at[r * C + c] = row[c];
        }
      for (int64_t r = 0; r < depth && width < C; ++r)
        for (int64_t c = width; c < C; ++c) at[r * C + c] = 0;
      for (int64_t r = begin < k ? 0 : begin - k; r < depth && k + r < begin + width; ++r)
        at[r * C + k + r - begin] = 0;
    }
  }

  // What a panel of columns from `first` on takes beside the product.
  ColumnGradient<T> column_gradient(const MomentGradient& gradient, int64_t v, int64_t first) const {
    const MomentInput& input = of.input;
    const int64_t m = input.cross ? 0 : v;
    ColumnGradient<T> columns{};
    columns.product = static_cast<T>((input.cross ? 2 : 4) * gradient.off_diagonal[m]);
    for (int c = 0; c < C; ++c) {
      T along = (input.cross ? 1 : 2) * on[m * of.padded + first + c];
      if (input.dual) along -= columns.product * of.diagonal[m * of.padded + first + c];
      columns.along[c] = along;
    }
    columns.factor = of.factor + v * of.padded + first;
    return columns;
  }

  ColumnTarget target(const MomentGradient& gradient, int64_t v) const {
    const bool pair = of.input.has_distance();
    return {of.input.views[v].data, of.input.views[pair ? 1 - v : v].data, pair ? 2 * gradient.distance : 0,
            gradient.views[v]};
  }

  // Dual form: from the product in `g` to the gradient, for the columns of one task; x: the views' panels of them.
  void finish(const MomentGradient& gradient, int64_t v, int64_t task, T* const x[2], T* g) const {
    const int64_t first = task * of.width * C, count = of.panels_of(task);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t place = p * of.panel_size();
      const T *own = x[v] + place, *partner = x[of.input.partner(v)] + place;
      ColumnGradient<T> columns = column_gradient(gradient, v, first + p * C);
      ColumnSums<T, 3> sums;
      columns.sum(of.input, own, partner, g + place, sums);
      columns.project(of.input, sums);
      columns.finish(of.n, own, partner, g + place);
    }
    write_panels(g, of.panel_size(), 0, of.n, of.d, first, count, of.input.views[0].type, target(gradient, v));
  }

  // Primal form: what Σ dx̂ and Σ dx̂ x̂ are without the products, from the strips W = offdiag(M) of one panel:
  // Σ_n g = Σ_k W_k Σ_n ŷ_k and Σ_n g x̂ = Σ_k W_k².
  void sums_of_strips(const ColumnGradient<T>& columns, int64_t v, int64_t first, const T* strips, int64_t p,
                      ColumnSums<T, 3>& sums) const {
    const int64_t partner = of.input.partner(v), m = of.input.cross ? 0 : v;
    double product[C] = {}, square[C] = {};
    for (int64_t k = 0; k < of.d; ++k) {
      const T* w = strips + k / kDepth * strip_size() + (p * kDepth + k % kDepth) * C;
      const double y = totals[partner * of.padded + k];
      for (int c = 0; c < C; ++c) {
        const double x = static_cast<double>(w[c]);
        product[c] += x * y;
        square[c] += x * x;
      }
    }
    const double s = static_cast<double>(columns.product);
    for (int c = 0; c < C; ++c) {
      const double along = static_cast<double>(columns.along[c]);
      sums[0][c] = s * product[c] + along * totals[partner * of.padded + first + c];
      sums[1][c] = s * square[c] + along * static_cast<double>(of.diagonal[m * of.padded + first + c]);
      sums[2][c] = totals[v * of.padded + first + c];
    }
  }

  // Primal form: dX for the columns of `count` panels from `first` on, Ŷ·offdiag(M) and what follows by a tile's height
  // of rows at a time.
  void columns_of(const T* dense, const MomentGradient& gradient, int64_t v, int64_t first, int64_t count, T* scratch,
                  T* strips, T* g) const {
    const T *y = packed[of.input.partner(v)], *own = packed[v] + first / C * of.panel_size();
    const T* partner = y + first / C * of.panel_size();
    const int64_t size = strip_size();
    for (int64_t k = 0; k < of.d; k += kDepth)
      pack_moments(dense, v, k, of.d - k < kDepth ? of.d - k : kDepth, first, count, scratch,
                   strips + k / kDepth * size);
    ColumnGradient<T> columns[kTile / C];
    for (int64_t p = 0; p < count; ++p) {
      ColumnSums<T, 3> sums;
      columns[p] = column_gradient(gradient, v, first + p * C);
      sums_of_strips(columns[p], v, first + p * C, strips, p, sums);
      columns[p].project(of.input, sums);
    }
    for (int64_t block = 0; block < of.n; block += kTile) {
      const int64_t rows = of.n - block < kTile ? of.n - block : kTile;
      for (int64_t k = 0; k < of.d; k += kDepth) block_product(y, block, rows, k, count, strips, g);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t place = p * of.panel_size() + block * C;
        columns[p].finish(rows, own + place, partner + place, g + p * kTile * C);
      }
      write_panels(g, kTile * C, block, rows, of.d, first, count, of.input.views[0].type, target(gradient, v));
    }
  }

  // g (+)= Ŷ[block rows][k …]·W[k …], g in panels of kTile rows; meanwhile the next step's operands are asked for.
  void block_product(const T* y, int64_t block, int64_t rows, int64_t k, int64_t count, const T* strips, T* g) const {
    const int64_t depth = of.d - k < kDepth ? of.d - k : kDepth, size = strip_size();
    const int64_t chunks = (depth + C - 1) / C, last = depth - (chunks - 1) * C;
    const bool down = k + kDepth >= of.d;
    const int64_t next_k = down ? 0 : k + kDepth, next_row = down ? block + kTile : block;
    const int64_t line = C * static_cast<int64_t>(sizeof(T)), steps = (kTile + kRows - 1) / kRows;
    const int64_t next_rows = of.n - next_row < kTile ? of.n - next_row : kTile;
    for (int64_t p = 0; p < count; ++p) {
      const T *b = strips + k / kDepth * size + p * kDepth * C, *next_b = strips + next_k / kDepth * size;
      for (int64_t i = 0; i < rows; i += kRows) {
        prefetch_part(next_b + p * kDepth * C, kDepth * line, i / kRows, steps);
        for (int64_t q = p; next_rows > 0 && q < kDepth / C && next_k + q * C < of.d; q += count)
          prefetch_part(y + (next_k / C + q) * of.panel_size() + next_row * C, next_rows * line, i / kRows, steps);
        const T* a = y + k / C * of.panel_size() + (block + i) * C;
        T* to = g + (p * kTile + i) * C;
        if (k == 0)
          micro_rows<T, kVectors, C, 1, C, Store::replace>(rows - i, a, b, chunks, C, last, of.panel_size(), to, 0, 0);
        else
          micro_rows<T, kVectors, C, 1, C, Store::add>(rows - i, a, b, chunks, C, last, of.panel_size(), to, 0, 0);
      }
    }
  }

  void run(const MomentSaved& saved, const MomentGradient& gradient, const Parallel& parallel) {
    const MomentInput& input = of.input;
    of.copy_in(saved.mean, of.views, of.mean, T(0));
    of.copy_in(saved.factor, of.views, of.factor, T(1));
    of.copy_in(saved.diagonal, of.matrices, of.diagonal, T(0));
    of.copy_in(gradient.diagonal, of.matrices, on, T(0));
    if (input.dual)
      run_dual(saved, gradient, parallel);
    else
      run_primal(static_cast<const T*>(saved.moments), gradient, parallel);
  }

  void run_dual(const MomentSaved& saved, const MomentGradient& gradient, const Parallel& parallel) const {
    const T* dense = static_cast<const T*>(saved.moments);
    if (!kept) {
      Arena inner{forward_memory};
      MomentSaved same = saved;  // the statistics are written over by the same ones
      same.moments = again;
      Forward<T>(of.input, parallel.threads, inner).run(same, parallel);
      dense = again;
    }
    const int64_t groups = (of.n + kRows - 1) / kRows, block = of.width * of.panel_size();
    each_task(parallel, of.views * groups, of.next, [&](int64_t, int64_t task) {
      const int64_t v = task / groups;
      pack_gram(dense + v * of.n * of.n, v, task % groups);
    });
    each_task(parallel, of.tasks(), of.next, [&](int64_t worker, int64_t task) {
      T* x[2];
      for (int64_t v = 0; v < of.views; ++v) {
        x[v] = panels + (worker * of.views + v) * block;
        read(v, task, x[v], nullptr);
      }
      for (int64_t v = 0; v < of.views; ++v) {
        if (gradient.views[v] == nullptr) continue;
        gram_product(grams[of.input.partner(v)], x[v], of.panels_of(task), out + worker * block);
        finish(gradient, v, task, x, out + worker * block);
      }
    });
  }

  void run_primal(const T* moments, const MomentGradient& gradient, const Parallel& parallel) const {
    const int64_t tasks = of.tasks(), block = of.width * of.panel_size();
    each_task(parallel, of.views * tasks, of.next, [&](int64_t, int64_t task) {
      const int64_t v = task / tasks;
      read(v, task % tasks, packed[v] + task % tasks * block, totals);
    });
    each_task(parallel, of.views * tasks, of.next, [&](int64_t worker, int64_t task) {
      const int64_t v = task / tasks, columns = task % tasks, m = of.input.cross ? 0 : v;
      if (gradient.views[v] == nullptr) return;
      const T* dense = moments == nullptr ? nullptr : moments + m * of.d * of.d;
      columns_of(dense, gradient, v, columns * of.width * C, of.panels_of(columns), tile + worker * kTile * kTile,
                 strip + worker * strips() * strip_size(), out + worker * kTile * of.width * C);
    });
  }
};

}  // namespace

int64_t second_moment_backward_workspace(const MomentInput& input, bool kept, int64_t threads) {
  Arena arena{nullptr};
  if (input.views[0].type == ElementType::f64)
    Backward<double>(input, kept, threads, arena);
  else
    Backward<float>(input, kept, threads, arena);
  return arena.bytes;
}

void second_moment_backward(const MomentInput& input, const MomentSaved& saved, const MomentGradient& gradient,
                            void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  const bool kept = saved.moments != nullptr;
  if (input.views[0].type == ElementType::f64)
    Backward<double>(input, kept, parallel.threads, arena).run(saved, gradient, parallel);
  else
    Backward<float>(input, kept, parallel.threads, arena).run(saved, gradient, parallel);
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
