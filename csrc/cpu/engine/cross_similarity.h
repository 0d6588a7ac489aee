// Rows q against rows k without the matrix x_ij = (scale·q_i·k_j)·units (+ bias_j): packing, tiles, and the products of
// the backward, dq = scale·W k and dk = scale·Wᵀ q, for any weights W that a tile of x gives.
#pragma once
#include "grid_schedule.h"
#include "levels.h"
#include "packed_blocks.h"
#include "tile_softmax.h"

namespace sslfast {

struct CrossInput {
  Rows q, k;  // [m, d], [n, d]
  int64_t m, n, d;
  double scale;
  const void* bias;          // [n] float, or double for double rows; or null
  const int64_t* row_ids;    // [m] and
  const int64_t* col_ids;    // [n], or both null
  const int64_t* positives;  // [m] or null: a column, or a number outside [0, n) for none
};

// Where the gradients go: float, or double for double rows; null where none is wanted.
struct CrossGradient {
  void *dq, *dk;  // [m, d], [n, d]
  void* dbias;    // [n]
  double dscale;
};

namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct CrossSimilarity {
  const CrossInput& input;
  const Blocks<T> of_q, of_k;
  const SplitFactor<T> factor;  // units·scale
  T *q_panels, *k_panels, *k_transposed, *dq_panels, *dk_panels, *scratch_rows;
  T* scratch_tiles;  // [workers][height·kTile]: on the heap, because a thread's stack may be smaller than a tile
  T* bias;           // in x's units, readable up to a whole number of vectors; null for none
  IdRange *row_ranges, *col_ranges;
  double* per_block;  // [blocks of q, then of k]
  int64_t* done;
  double limit;  // no |x| is larger (Cauchy–Schwarz); NaN if a row holds one

  // `recompute`: tiles are computed, so k is wanted in the transposed layout too.
  CrossSimilarity(const CrossInput& in, double units, bool recompute, bool need_q, bool need_k, int64_t threads,
                  Arena& arena)
      : input(in), of_q(in.m, in.d), of_k(in.n, in.d), factor(units * in.scale) {
    const int64_t size_q = of_q.count * of_q.size, size_k = of_k.count * of_k.size;
    q_panels = arena.take<T>(size_q);
    k_panels = arena.take<T>(size_k);
    k_transposed = recompute ? arena.take<T>(size_k) : nullptr;
    dq_panels = need_q ? arena.take<T>(size_q) : nullptr;
    dk_panels = need_k ? arena.take<T>(size_k) : nullptr;
    scratch_rows = arena.take<T>((of_q.count + of_k.count) * of_q.padded);
    scratch_tiles = arena.take<T>(workers(threads) * of_q.height * kTile);
    bias = in.bias == nullptr ? nullptr : arena.take<T>(in.n + kTile);
    row_ranges = arena.take<IdRange>(of_q.count);
    col_ranges = arena.take<IdRange>(of_k.count);
    per_block = arena.take<double>(of_q.count + of_k.count);
    done = arena.take<int64_t>(of_q.count + of_k.count + 1);
  }

  void pack(const Parallel& parallel, double units) {
    auto one = [](int64_t, T) { return T(1); };
    auto body = [&](int64_t b) {
      T* row = scratch_rows + b * of_q.padded;
      if (b < of_q.count) {
        per_block[b] = pack_block({input.q, input.q, input.m}, of_q, b, q_panels + b * of_q.size,
                                  static_cast<T*>(nullptr), row, one);
        if (input.row_ids != nullptr) row_ranges[b] = range_of(input.row_ids + of_q.first(b), of_q.length(b));
        if (dq_panels != nullptr) clear(dq_panels + b * of_q.size, of_q.size);
        return;
      }
      const int64_t j = b - of_q.count;
      T* transposed = k_transposed == nullptr ? nullptr : k_transposed + j * of_k.size;
      per_block[b] = pack_block({input.k, input.k, input.n}, of_k, j, k_panels + j * of_k.size, transposed, row, one);
      if (input.col_ids != nullptr) col_ranges[j] = range_of(input.col_ids + of_k.first(j), of_k.length(j));
      if (dk_panels != nullptr) clear(dk_panels + j * of_k.size, of_k.size);
    };
    parallel_each(parallel, of_q.count + of_k.count, body);
    double largest_q = 0, largest_k = 0, largest_bias = 0;
    for (int64_t b = 0; b < of_q.count; ++b) largest_q = larger_norm(largest_q, per_block[b]);
    for (int64_t b = 0; b < of_k.count; ++b) largest_k = larger_norm(largest_k, per_block[of_q.count + b]);
    for (int64_t j = 0; bias != nullptr && j < input.n; ++j) {
      bias[j] = static_cast<const T*>(input.bias)[j] * static_cast<T>(units);
      largest_bias = larger_norm(largest_bias, bias[j] < 0 ? -bias[j] : bias[j]);
    }
    const double scale = units * (input.scale < 0 ? -input.scale : input.scale);
    limit = scale * __builtin_sqrt(largest_q) * __builtin_sqrt(largest_k) + largest_bias;
  }

  static void clear(T* x, int64_t count) {
    for (int64_t k = 0; k < count; ++k) x[k] = 0;
  }

  // No more tiles than blocks on the shorter side are worked on at a time.
  int64_t workers(int64_t threads) const {
    const int64_t shorter = of_q.count < of_k.count ? of_q.count : of_k.count;
    return threads < shorter ? threads : shorter;
  }

  // Calls tile(i, j, scratch) for every tile, alone on its rows and columns.
  template <typename F>
  void each_tile(const Parallel& parallel, F&& tile) {
    for (int64_t b = 0; b <= of_q.count + of_k.count; ++b) done[b] = 0;
    const GridSchedule schedule = GridSchedule::make(of_q.count, of_k.count, parallel.threads, done);
    auto body = [&](int64_t worker) {
      T* scratch = scratch_tiles + worker * of_q.height * kTile;
      schedule.work([&](int64_t i, int64_t j) { tile(i, j, scratch); });
    };
    parallel_each(parallel, workers(parallel.threads), body);
  }

  // x of a tile, with bias, without exclusions.
  void similarity(int64_t i, int64_t j, T* x) const {
    tile_similarity(q_panels + i * of_q.size, k_transposed + j * of_k.size, of_q.height, of_q.length(i), of_k.length(j),
                    input.d, factor, x);
    if (bias != nullptr) add_bias(x, of_q.length(i), of_k.length(j), bias + of_k.first(j));
  }

  // Calls f(row in the tile, column in the tile) for every pair with equal ids.
  template <typename F>
  void each_equal_id(int64_t i, int64_t j, F&& f) const {
    if (input.row_ids != nullptr && row_ranges[i].meets(col_ranges[j]))
      each_equal(input.row_ids + of_q.first(i), of_q.length(i), input.col_ids + of_k.first(j), of_k.length(j), f);
  }

  // Calls f(row, place in the tile) for every row whose positive is in it.
  template <typename F>
  void each_positive(int64_t i, int64_t j, F&& f) const {
    if (input.positives == nullptr) return;
    for (int64_t r = 0; r < of_q.length(i); ++r) {
      const int64_t c = input.positives[of_q.first(i) + r] - of_k.first(j);
      if (c >= 0 && c < of_k.length(j)) f(of_q.first(i) + r, r * kTile + c);
    }
  }

  void products(int64_t i, int64_t j, const T* w) const {
    if (dq_panels != nullptr)
      tile_product<T, false>(w, k_panels + j * of_k.size, of_k.height, of_q.length(i), of_k.length(j), input.d,
                             dq_panels + i * of_q.size, of_q.height);
    if (dk_panels != nullptr)
      tile_product<T, true>(w, q_panels + i * of_q.size, of_q.height, of_k.length(j), of_q.length(i), input.d,
                            dk_panels + j * of_k.size, of_k.height);
  }

  // Σ_i W_ij of a tile into sums[j].
  void column_sums(int64_t i, int64_t j, const T* w, T* sums) const {
    const int64_t columns = of_k.length(j);
    alignas(64) T down[kTile] = {};
    for (int64_t r = 0; r < of_q.length(i); ++r)
      for (int64_t c = 0; c < columns; ++c) down[c] += w[r * kTile + c];
    for (int64_t c = 0; c < columns; ++c) sums[of_k.first(j) + c] += down[c];
  }

  // Writes dq and dk from their panels; dscale = Σ_i q_i·(W k)_i = Σ_j k_j·(Wᵀ q)_j, from whichever there is.
  void write_gradients(const Parallel& parallel, CrossGradient& gradient) {
    auto body = [&](int64_t b) {
      const bool is_q = b < of_q.count;
      const Blocks<T>& blocks = is_q ? of_q : of_k;
      const int64_t i = is_q ? b : b - of_q.count;
      const T *x = (is_q ? q_panels : k_panels) + i * blocks.size, *g = is_q ? dq_panels : dk_panels;
      per_block[b] = 0;
      if (g == nullptr) return;
      g += i * blocks.size;
      const bool sum_scale = is_q || dq_panels == nullptr;
      T *row = scratch_rows + b * of_q.padded, *out = static_cast<T*>(is_q ? gradient.dq : gradient.dk);
      for (int64_t r = 0; r < blocks.length(i); ++r) {
        if (sum_scale) per_block[b] += static_cast<double>(dot_in_panels(x, g, r, blocks));
        from_panels(g, r, blocks, static_cast<T>(input.scale), row);
        narrow_row<T>(row, out, blocks.first(i) + r, input.d);
      }
    };
    parallel_each(parallel, of_q.count + of_k.count, body);
    gradient.dscale = 0;
    for (int64_t b = 0; b < of_q.count + of_k.count; ++b) gradient.dscale += per_block[b];
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
