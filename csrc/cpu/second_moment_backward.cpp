// The gradients of second moments on the CPU: see second_moment.h. With s = 2·d/d off (4· for a matrix with itself),
// Ŷ the partner's columns and M the matrix between a view's partner and itself,
//
//   dX̂ = s·Ŷ offdiag(M) + Ŷ diag(d/d M_ii)  =  s·(ŶŶᵀ X̂ − Ŷ diag(M_ii)) + …
//
// by blocks of columns, each block then taken through its scale and mean. A product without the matrix in memory
// computes its tiles again, by blocks that are used and forgotten.
#include "moment_products.h"

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
    out = arena.take<T>(threads * block);
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

  void read(int64_t v, int64_t task, T* x) const {
    const int64_t first = task * of.width * C, count = of.panels_of(task);
    read_panels(of.input.views[v], of.n, of.d, first, count, of.panel_size(), x);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t place = v * of.padded + first + p * C;
      if (of.input.center || of.input.scale != ColumnScale::none)
        normalize_panel(of.n, of.mean + place, of.factor + place, x + p * of.panel_size());
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

  // out = Ŷ·offdiag(M) for the columns of `count` panels from `first` on, a tile's height of rows at a time.
  void moment_product(const T* dense, int64_t v, int64_t first, int64_t count, T* scratch, T* strips, T* g) const {
    const T* y = packed[of.input.partner(v)];
    const int64_t size = strip_size();
    for (int64_t k = 0; k < of.d; k += kDepth)
      pack_moments(dense, v, k, of.d - k < kDepth ? of.d - k : kDepth, first, count, scratch,
                   strips + k / kDepth * size);
    for (int64_t block = 0; block < of.n; block += kTile)
      for (int64_t k = 0; k < of.d; k += kDepth) {
        const int64_t depth = of.d - k < kDepth ? of.d - k : kDepth, end = block + kTile < of.n ? block + kTile : of.n;
        const int64_t chunks = (depth + C - 1) / C, last = depth - (chunks - 1) * C;
        const bool down = k + kDepth >= of.d;  // the next step: the next rows, or the next part of the sum
        const int64_t next_k = down ? 0 : k + kDepth, next_row = down ? block + kTile : block;
        const int64_t line = C * static_cast<int64_t>(sizeof(T)), steps = (kTile + kRows - 1) / kRows;
        const int64_t next_rows = of.n - next_row < kTile ? of.n - next_row : kTile;
        for (int64_t p = 0; p < count; ++p) {
          const T *b = strips + k / kDepth * size + p * kDepth * C, *next_b = strips + next_k / kDepth * size;
          for (int64_t i = block; i < end; i += kRows) {
            const int64_t step = (i - block) / kRows;
            prefetch_part(next_b + p * kDepth * C, kDepth * line, step, steps);
            for (int64_t q = p; next_rows > 0 && q < kDepth / C && next_k + q * C < of.d; q += count)
              prefetch_part(y + (next_k / C + q) * of.panel_size() + next_row * C, next_rows * line, step, steps);
            const T* a = y + k / C * of.panel_size() + i * C;
            T* to = g + p * of.panel_size() + i * C;
            if (k == 0)
              micro_rows<T, kVectors, C, 1, C, Store::replace>(end - i, a, b, chunks, C, last, of.panel_size(), to, 0,
                                                               0);
            else
              micro_rows<T, kVectors, C, 1, C, Store::add>(end - i, a, b, chunks, C, last, of.panel_size(), to, 0, 0);
          }
        }
      }
  }

  // From the product in `g` to the gradient, for the columns of one task; x: the views' panels of them.
  void finish(const MomentGradient& gradient, int64_t v, int64_t task, T* const x[2], T* g) const {
    const MomentInput& input = of.input;
    const int64_t first = task * of.width * C, count = of.panels_of(task), m = input.cross ? 0 : v;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t at = first + p * C, place = p * of.panel_size();
      ColumnGradient<T> of_columns{};
      of_columns.product = static_cast<T>((input.cross ? 2 : 4) * gradient.off_diagonal[m]);
      for (int c = 0; c < C; ++c) {
        T along = (input.cross ? 1 : 2) * on[m * of.padded + at + c];
        if (input.dual) along -= of_columns.product * of.diagonal[m * of.padded + at + c];
        of_columns.along[c] = along;
      }
      of_columns.factor = of.factor + v * of.padded + at;
      finish_gradient(input, of_columns, x[v] + place, x[input.partner(v)] + place, g + place);
    }
    const bool pair = input.has_distance();
    const ColumnTarget target{input.views[v].data, input.views[pair ? 1 - v : v].data, pair ? 2 * gradient.distance : 0,
                              gradient.views[v]};
    write_panels(g, of.panel_size(), of.n, of.d, first, count, input.views[0].type, target);
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
        read(v, task, x[v]);
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
      read(v, task % tasks, packed[v] + task % tasks * block);
    });
    each_task(parallel, of.views * tasks, of.next, [&](int64_t worker, int64_t task) {
      const int64_t v = task / tasks, columns = task % tasks;
      if (gradient.views[v] == nullptr) return;
      const int64_t m = of.input.cross ? 0 : v;
      const T* dense = moments == nullptr ? nullptr : moments + m * of.d * of.d;
      T* g = out + worker * block;
      moment_product(dense, v, columns * of.width * C, of.panels_of(columns), tile + worker * kTile * kTile,
                     strip + worker * strips() * strip_size(), g);
      T* x[2] = {packed[0] + columns * block, packed[of.views - 1] + columns * block};
      finish(gradient, v, columns, x, g);
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
