// The nearest neighbours of rows among themselves, each without itself. The similarities are symmetric: a tile above
// the diagonal serves the lists of its rows and, read down, those of its columns, so that N²·D operations do.
#pragma once
#include "common/l2_normalize.h"
#include "levels.h"
#include "neighbour_lists.h"
#include "packed_blocks.h"
#include "pair_schedule.h"
#include "tile_softmax.h"

namespace sslfast {

struct NeighbourInput {
  Rows q, k;  // [m, d], [n, d]; k has no data where q's rows are taken against themselves
  int64_t m, n, d;
  // [n], float, or double for double rows; or null. Added to the similarities of a column; of rows against themselves
  // to those of a row too, so that they stay symmetric: that moves all of a row alike.
  const void* bias;
  const int64_t* row_ids;  // [m] and
  const int64_t* col_ids;  // [n], or both null: pairs with equal ids take no part
  int64_t count;
};

// Divide each row by max(‖row‖, eps) first.
struct Normalization {
  double eps;
  void* inv_norm;  // [m]: 1 / max(‖row‖, eps); float, or double for double rows
};

namespace SSLFAST_CPU_LEVEL {
namespace {

// With finite norms no product is NaN (Cauchy–Schwarz). False for NaN.
inline bool is_finite(double largest_square) { return largest_square < __builtin_inf(); }

template <typename T>
void exclude_equal(const NeighbourInput& input, int64_t row, int64_t rows, int64_t column, int64_t columns, T* x) {
  each_equal(input.row_ids + row, rows, input.col_ids + column, columns,
             [&](int64_t r, int64_t c) { x[r * kTile + c] = nothing<T, false>; });
}

// The largest squared norm of a block, +∞ where its biases are not finite: then its similarities may be NaN.
template <typename T>
double bounding_square(double largest_square, const T* bias, int64_t count) {
  for (int64_t i = 0; bias != nullptr && i < count; ++i)
    if (!(bias[i] - bias[i] == 0)) return __builtin_inf();
  return largest_square;
}

template <typename T>
struct SelfNeighbours {
  const NeighbourInput& input;
  const Normalization* normalization;  // or null
  const Blocks<T> blocks;
  const SplitFactor<T> one{1.0};
  T *panels, *transposed, *scratch_rows;
  T* scratch_tiles;  // [workers][height + kLanes][kTile]: on the heap, because a thread's stack may be smaller
  IdRange* ranges;
  double* per_block;
  int64_t* done;

  SelfNeighbours(const NeighbourInput& in, const Normalization* unit, int64_t threads, Arena& arena)
      : input(in), normalization(unit), blocks(in.m, in.d) {
    panels = arena.take<T>(blocks.count * blocks.size);
    transposed = arena.take<T>(blocks.count * blocks.size);
    scratch_rows = arena.take<T>(blocks.count * blocks.padded);
    scratch_tiles = arena.take<T>(workers(threads) * (blocks.height + kLanes<T>)*kTile);
    ranges = arena.take<IdRange>(blocks.count);
    per_block = arena.take<double>(blocks.count);
    done = arena.take<int64_t>(blocks.count + 1);
  }

  const T* bias_from(int64_t i) const {
    return input.bias == nullptr ? nullptr : static_cast<const T*>(input.bias) + i;
  }
  int64_t workers(int64_t threads) const { return threads < blocks.count ? threads : blocks.count; }

  void run(const NeighbourLists<T>& lists, const Parallel& parallel) {
    auto row_factor = [&](int64_t index, T square) {
      if (normalization == nullptr) return T(1);
      return static_cast<T*>(normalization->inv_norm)[index] = inverse_norm(square, static_cast<T>(normalization->eps));
    };
    auto pack = [&](int64_t i) {
      const double square = pack_block({input.q, input.q, input.m}, blocks, i, panels + i * blocks.size,
                                       transposed + i * blocks.size, scratch_rows + i * blocks.padded, row_factor);
      per_block[i] = bounding_square(square, bias_from(blocks.first(i)), blocks.length(i));
      if (input.row_ids != nullptr) ranges[i] = range_of(input.row_ids + blocks.first(i), blocks.length(i));
      lists.start(blocks.first(i), blocks.length(i));
    };
    parallel_each(parallel, blocks.count, pack);
    each_pair(parallel, blocks.count, workers(parallel.threads), done, [&](int64_t worker, int64_t i, int64_t j) {
      tile(i, j, scratch_tiles + worker * (blocks.height + kLanes<T>)*kTile, lists);
    });
  }

  void tile(int64_t i, int64_t j, T* x, const NeighbourLists<T>& lists) const {
    const TilePlace at{blocks.first(i), blocks.length(i), blocks.first(j), blocks.length(j)};
    tile_similarity(panels + i * blocks.size, transposed + j * blocks.size, blocks.height, at.rows, at.columns,
                    blocks.d, one, x);
    if (input.bias != nullptr) add_both(x, at);
    if (i == j) mask_diagonal(x, at.rows, false);
    if (input.row_ids != nullptr && ranges[i].meets(ranges[j]))
      exclude_equal(input, at.row, at.rows, at.column, at.columns, x);
    const bool finite = is_finite(per_block[i]) && is_finite(per_block[j]);
    if (i == j)
      take_tile<T, false>(x, at, finite, lists, nullptr);
    else
      take_tile<T, true>(x, at, finite, lists, x + blocks.height * kTile);
  }

  // In the same order of additions for a pair and its mirror image.
  void add_both(T* x, const TilePlace& at) const {
    const T *of_row = bias_from(at.row), *of_column = bias_from(at.column);
    for (int64_t i = 0; i < at.rows; ++i)
      for (int64_t j = 0; j < at.columns; ++j) x[i * kTile + j] += of_row[i] + of_column[j];
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
