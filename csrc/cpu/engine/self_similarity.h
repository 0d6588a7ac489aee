// Rows z against themselves without the matrix x_ij = z_i·z_j·log2(e)·scale. With row statistics max_i and sum_i,
// sum_i = Σ_j 2^(x_ij − max_i) over the pairs that are not excluded, lse_i = ln 2·(max_i + log2 sum_i), and p(i) the
// column of row i's positive:
//
//   backward  G_ij = g_i P_ij + gp_i [j = p(i)],  P_ij = 2^(x_ij − max_i)/sum_i,  W = G + Gᵀ,  dz = scale·W z
//             dscale = ½ Σ_i z_i·(W z)_i
//
// x is symmetric, so a tile x_IJ serves rows I and, transposed, rows J: half the products forward (½U of U = 2·M²·D),
// half of them again backward, and W z in full: 2U in all. Tiles that fit the cache from the forward are not
// recomputed.
#pragma once
#include "common/l2_normalize.h"
#include "levels.h"
#include "packed_blocks.h"
#include "pair_schedule.h"
#include "tile_softmax.h"

namespace sslfast {

struct SelfInput {
  RowSource rows;
  int64_t m, d;
  double scale;
  bool normalize;            // divide each row by max(‖row‖, kNormEps) first
  bool leave_out_itself;     // exclude i = j
  const int64_t* ids;        // [m] or null: exclude pairs with equal ids
  const int64_t* positives;  // [m] or null: p(i), or a number outside [0, m) for none
};

// Arrays of float, or of double for double rows.
struct SelfSaved {
  void* inv_norm;      // [m] 1 / max(‖z_i‖, kNormEps); null if not normalising
  void* row_max;       // [m]
  void* row_sum;       // [m]
  void* tiles;         // similarity tiles kept for the backward, as many as fit
  int64_t tiles_size;  // in numbers
};

inline constexpr double kNormEps = 1e-12;

namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct SelfSimilarity {
  const SelfInput& input;
  const Blocks<T> blocks;
  const int64_t slots;          // tiles that the cache holds: the first ones in the order of slot()
  const SplitFactor<T> factor;  // log2(e)·scale
  T *inv_norm, *row_max, *row_sum, *tiles;
  T *panels, *transposed, *grad_panels;  // [blocks][block]
  T *max, *a, *scratch_rows;
  T* scratch_tiles;   // [workers][height·kTile]: on the heap, because a thread's stack may be smaller than a tile
  IdRange* ranges;    // [blocks]
  double* per_block;  // [blocks]
  int64_t* done;      // [blocks + 1]
  bool bounded;

  SelfSimilarity(const SelfInput& in, const SelfSaved& saved, bool backward, int64_t threads, Arena& arena)
      : input(in),
        blocks(in.m, in.d),
        slots(saved.tiles_size / (blocks.height * kTile)),
        factor(kLog2e * in.scale),
        inv_norm(static_cast<T*>(saved.inv_norm)),
        row_max(static_cast<T*>(saved.row_max)),
        row_sum(static_cast<T*>(saved.row_sum)),
        tiles(static_cast<T*>(saved.tiles)) {
    const int64_t all = blocks.count * blocks.size;
    panels = arena.take<T>(all);
    transposed = backward && all_kept() ? nullptr : arena.take<T>(all);
    grad_panels = arena.take<T>(backward ? all : 0);
    max = arena.take<T>(in.m + kTile);
    a = arena.take<T>(in.m + kTile);
    scratch_rows = arena.take<T>(blocks.count * blocks.padded);
    scratch_tiles = arena.take<T>(workers(threads) * blocks.height * kTile);
    ranges = arena.take<IdRange>(blocks.count);
    per_block = arena.take<double>(blocks.count);
    done = arena.take<int64_t>(blocks.count + 1);
  }

  // A number for the pair i ≤ j that does not depend on the schedule, so that forward and backward agree on it.
  static int64_t slot(int64_t i, int64_t j) { return j * (j + 1) / 2 + i; }
  bool kept(int64_t i, int64_t j) const { return slot(i, j) < slots; }
  bool all_kept() const { return kept(blocks.count - 1, blocks.count - 1); }
  T* kept_tile(int64_t i, int64_t j) const { return tiles + slot(i, j) * blocks.height * kTile; }

  // Backward: the norms are known, and no transposed rows are needed if every tile was kept.
  // `also(i)` is done for each block in the same parallel region.
  template <typename F>
  void pack(const Parallel& parallel, bool backward, F&& also) {
    auto row_factor = [&](int64_t index, T square) {
      if (!input.normalize) return T(1);
      if (!backward) inv_norm[index] = inverse_norm(square, static_cast<T>(kNormEps));
      return inv_norm[index];
    };
    auto body = [&](int64_t i) {
      T* t = transposed == nullptr ? nullptr : transposed + i * blocks.size;
      per_block[i] =
          pack_block(input.rows, blocks, i, panels + i * blocks.size, t, scratch_rows + i * blocks.padded, row_factor);
      if (input.ids != nullptr) ranges[i] = range_of(input.ids + blocks.first(i), blocks.length(i));
      also(i);
    };
    parallel_each(parallel, blocks.count, body);
    double largest = 0;
    for (int64_t i = 0; i < blocks.count; ++i) largest = larger_norm(largest, per_block[i]);
    const double limit = kLog2e * (input.scale < 0 ? -input.scale : input.scale) * largest;
    bounded = limit <= kBoundedLimit;  // false for NaN
  }

  // No more tiles than blocks are worked on at a time.
  int64_t workers(int64_t threads) const { return threads < blocks.count ? threads : blocks.count; }

  template <typename F>
  void each_tile(const Parallel& parallel, F&& tile) {
    each_pair(parallel, blocks.count, workers(parallel.threads), done, [&](int64_t worker, int64_t i, int64_t j) {
      tile(i, j, scratch_tiles + worker * blocks.height * kTile);
    });
  }

  // Calls f(row, place in tile x_IJ) for every row of I or J whose positive meets it there.
  template <typename F>
  void each_positive(int64_t i, int64_t j, F&& f) const {
    if (input.positives == nullptr) return;
    for (int64_t r = 0; r < blocks.length(i); ++r) {
      const int64_t c = input.positives[blocks.first(i) + r] - blocks.first(j);
      if (c >= 0 && c < blocks.length(j)) f(blocks.first(i) + r, r * kTile + c);
    }
    if (i == j) return;
    for (int64_t c = 0; c < blocks.length(j); ++c) {
      const int64_t r = input.positives[blocks.first(j) + c] - blocks.first(i);
      if (r >= 0 && r < blocks.length(i)) f(blocks.first(j) + c, r * kTile + c);
    }
  }

  void similarity(int64_t i, int64_t j, T* x) const {
    tile_similarity(panels + i * blocks.size, transposed + j * blocks.size, blocks.height, blocks.length(i),
                    blocks.length(j), blocks.d, factor, x);
  }

  void mask(int64_t i, int64_t j, T* x) const {
    const int64_t rows = blocks.length(i), columns = blocks.length(j);
    if (columns % kLanes<T> != 0) mask_padding(x, rows, columns, bounded);
    if (i == j && input.leave_out_itself) mask_diagonal(x, rows, bounded);
    if (input.ids != nullptr && ranges[i].meets(ranges[j]))
      each_equal(input.ids + blocks.first(i), rows, input.ids + blocks.first(j), columns,
                 [&](int64_t r, int64_t c) { x[r * kTile + c] = nothing_of<T>(bounded); });
  }

  // Rows and columns of the tile without their own positives, which are not negatives.
  void largest(int64_t i, int64_t j, T* x, T* hardest) const {
    const int64_t rows = blocks.length(i), columns = blocks.length(j);
    for (int side = 0; side < (i == j ? 1 : 2); ++side) {
      const int64_t first = blocks.first(side == 0 ? i : j), count = side == 0 ? rows : columns;
      T saved[kTile];
      auto place = [&](int64_t row) { return row - first; };
      auto own = [&](int64_t row) { return row >= first && row < first + count; };
      each_positive(i, j, [&](int64_t row, int64_t at) {
        if (!own(row)) return;
        saved[place(row)] = x[at];
        x[at] = nothing_of<T>(bounded);
      });
      if (side == 0)
        largest_of_rows(x, rows, columns, hardest + first);
      else
        largest_of_columns(x, rows, columns, hardest + first);
      each_positive(i, j, [&](int64_t row, int64_t at) {
        if (own(row)) x[at] = saved[place(row)];
      });
    }
  }

  // Fills row_max and row_sum, and positive[row] and hardest[row] in base 2 where they are wanted.
  void forward(const Parallel& parallel, T* positive, T* hardest) {
    pack(parallel, false, [](int64_t) {});
    constexpr T lowest = -static_cast<T>(__builtin_inf());
    for (int64_t row = 0; row < blocks.rows; ++row) {
      row_max[row] = bounded ? T(0) : lowest;
      row_sum[row] = 0;
      if (positive != nullptr) positive[row] = 0;
      if (hardest != nullptr) hardest[row] = lowest;
    }
    each_tile(parallel, [&](int64_t i, int64_t j, T* scratch) {
      T* x = kept(i, j) ? kept_tile(i, j) : scratch;
      similarity(i, j, x);
      if (positive != nullptr) each_positive(i, j, [&](int64_t row, int64_t at) { positive[row] = x[at]; });
      mask(i, j, x);
      if (hardest != nullptr) largest(i, j, x, hardest);
      const RowStatistics<T> of_rows{row_max + blocks.first(i), row_sum + blocks.first(i)};
      const RowStatistics<T> of_columns{row_max + blocks.first(j), row_sum + blocks.first(j)};
      if (bounded)
        accumulate_bounded(x, blocks.length(i), blocks.length(j), i == j, of_rows, of_columns);
      else
        accumulate_any(x, blocks.length(i), blocks.length(j), i == j, of_rows, of_columns);
    });
  }

  // dz from the gradients g and gp (null for none). With normalisation, dz = inv_norm·(dẑ − (dẑ·ẑ)ẑ), dz = inv_norm·dẑ
  // where the norm was below eps. Returns dscale.
  double backward(const Parallel& parallel, const T* grad_row, const T* grad_positive, const RowTarget& dz) {
    pack(parallel, true, [&](int64_t i) {
      T* grad = grad_panels + i * blocks.size;
      for (int64_t k = 0; k < blocks.size; ++k) grad[k] = 0;
    });
    const bool folded = bounded && foldable(grad_row, row_max, row_sum, blocks.rows);
    for (int64_t row = 0; row < blocks.rows; ++row) prepare_weight(grad_row, row_max, row_sum, row, folded, a, max);
    each_tile(parallel, [&](int64_t i, int64_t j, T* w) {
      const T* x = kept(i, j) ? kept_tile(i, j) : w;
      if (x == w) {
        similarity(i, j, w);
        mask(i, j, w);
      }
      const RowWeights<T> of_rows{max + blocks.first(i), a + blocks.first(i)};
      const RowWeights<T> of_columns{max + blocks.first(j), a + blocks.first(j)};
      if (folded)
        weights<T, true>(x, blocks.length(i), blocks.length(j), false, of_rows, of_columns, w);
      else
        weights<T, false>(x, blocks.length(i), blocks.length(j), false, of_rows, of_columns, w);
      if (grad_positive != nullptr)
        each_positive(i, j, [&](int64_t row, int64_t at) {
          w[at] += grad_positive[row];
          if (i == j) w[at % kTile * kTile + at / kTile] += grad_positive[row];
        });
      tile_product<T, false>(w, panels + j * blocks.size, blocks.height, blocks.length(i), blocks.length(j), blocks.d,
                             grad_panels + i * blocks.size, blocks.height);
      if (i != j)
        tile_product<T, true>(w, panels + i * blocks.size, blocks.height, blocks.length(j), blocks.length(i), blocks.d,
                              grad_panels + j * blocks.size, blocks.height);
    });
    auto finish = [&](int64_t i) { per_block[i] = finish_block(i, dz); };
    parallel_each(parallel, blocks.count, finish);
    double total = 0;
    for (int64_t i = 0; i < blocks.count; ++i) total += per_block[i];
    return total / 2;
  }

  // Writes dz of block i; returns Σ z·(W z).
  double finish_block(int64_t i, const RowTarget& dz) const {
    T* row = scratch_rows + i * blocks.padded;
    double total = 0;
    for (int64_t r = 0; r < blocks.length(i); ++r) {
      const int64_t index = blocks.first(i) + r;
      const T *z = panels + i * blocks.size, *g = grad_panels + i * blocks.size;
      const T radial = dot_in_panels(z, g, r, blocks);
      total += radial;
      T row_scale = static_cast<T>(input.scale);
      from_panels(g, r, blocks, T(1), row);
      if (input.normalize) {
        const T removed = projection_weight(radial, inv_norm[index], static_cast<T>(kNormEps));
        row_scale *= inv_norm[index];
        const T* at = z + r * kColumns<T>;
        for (int64_t k = 0; k < blocks.padded; k += kColumns<T>, at += blocks.height * kColumns<T>)
          for (int c = 0; c < kColumns<T>; ++c) row[k + c] -= removed * at[c];
      }
      for (int64_t k = 0; k < blocks.padded; ++k) row[k] *= row_scale;
      write_target(row, dz, index, blocks.d);
    }
    return total;
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
