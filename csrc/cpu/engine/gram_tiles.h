// Products of panels over their long side, Σ_k X[k][i]·Y[k][j], by tiles of items i, j: moment matrices of columns
// (panels of columns, k = row) and Gram matrices of rows (panels of rows, k = feature) alike.
#pragma once
#include "column_panels.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// Values of k at a time: a strip of Y, kDepth × kColumns numbers, stays in the first-level cache.
inline constexpr int64_t kDepth = 192;

// Tasks wanted of a product.
inline constexpr int64_t kTasks = 32;

// The rows of a panel in groups that are as even as they can be: 32 as 11 + 11 + 10 where kRows is 12.
template <typename T>
inline constexpr int kGroups = (kColumns<T> + kRows - 1) / kRows;
template <typename T>
inline constexpr int kGroupRows = (kColumns<T> + kGroups<T> - 1) / kGroups<T>;

// Asks for part `part` of `parts` of the `bytes` bytes from `p` on, into the second-level cache: a share of what the
// next step reads, at each call of this one.
static inline void prefetch_part(const void* p, int64_t bytes, int64_t part, int64_t parts) {
  const int64_t share = (bytes / 64 + parts - 1) / parts, begin = part * share;
  const int64_t end = begin + share < bytes / 64 ? begin + share : bytes / 64;
  for (int64_t line = begin; line < end; ++line) __builtin_prefetch(static_cast<const char*>(p) + line * 64, 0, 2);
}

// out[rows × columns] += Σ_k x[k][i]·y[k][j] over k in [begin, end); leading dimension kTile, columns rounded up to
// whole panels. Panels are `stride` numbers apart. `upper`: only what is needed on and above the diagonal.
template <typename T>
static void tile_gram(const T* x, const T* y, int64_t stride, int64_t rows, int64_t columns, int64_t begin, int64_t end,
                      bool upper, T* out) {
  constexpr int C = kColumns<T>, G = kGroupRows<T>;
  for (int64_t k = begin; k < end; k += kDepth) {
    const int64_t depth = end - k < kDepth ? end - k : kDepth, after = k + depth;
    const int64_t bytes = (end - after < kDepth ? end - after : kDepth) * C * static_cast<int64_t>(sizeof(T));
    for (int64_t j = 0; j < columns; j += C) {
      const T* b = y + j / C * stride + k * C;
      for (int64_t i = 0; i < rows && !(upper && i > j); i += C) {
        const T* a = x + i / C * stride + k * C;
        prefetch_part(y + j / C * stride + after * C, bytes, i / C, (rows + C - 1) / C);
        prefetch_part(x + i / C * stride + after * C, bytes, j / C, (columns + C - 1) / C);
        for (int64_t r = 0; r < C && i + r < rows; r += G) {
          const int64_t left = rows - i - r < C - r ? rows - i - r : C - r;
          micro_rows<T, kVectors, 1, C, kTile, Store::add>(left < G ? left : G, a + r, b, 1, depth, depth, 0,
                                                           out + (i + r) * kTile + j, 0, 0);
        }
      }
    }
  }
}

// Which tiles a product has, and how its sum over k is cut: from the sizes alone, so that results do not depend on the
// number of threads.
template <typename T>
struct GramPlan {
  Blocks<T> blocks;  // of items
  int64_t depth;     // values of k
  bool symmetric;
  int64_t pairs, slices, slice;

  // Tiles as large as they can be: each is read with two strips, so large ones read less; cutting the sum makes up for
  // their number, until there are enough for several threads.
  GramPlan(int64_t items, int64_t k, bool is_symmetric) : blocks(items, 1), depth(k), symmetric(is_symmetric) {
    const int64_t fewest = (items + kTile - 1) / kTile;
    blocks.height = round_up((items + fewest - 1) / fewest, kColumns<T>);
    blocks.count = (items + blocks.height - 1) / blocks.height;
    pairs = symmetric ? blocks.count * (blocks.count + 1) / 2 : blocks.count * blocks.count;
    const int64_t limit = (k + 511) / 512, wanted = (kTasks + pairs - 1) / pairs;
    slices = wanted < limit ? wanted : limit;
    slice = round_up((k + slices - 1) / slices, kColumns<T>);
    slices = (k + slice - 1) / slice;
  }
  int64_t padded_items() const { return round_up(blocks.rows, kColumns<T>); }
  int64_t tile_size() const { return blocks.height * kTile; }

  // The blocks (i, j) of a pair; i ≤ j if symmetric.
  void place(int64_t pair, int64_t* i, int64_t* j) const {
    if (!symmetric) {
      *i = pair / blocks.count;
      *j = pair % blocks.count;
      return;
    }
    *j = 0;
    while ((*j + 1) * (*j + 2) / 2 <= pair) ++*j;
    *i = pair - *j * (*j + 1) / 2;
  }

  // The part of tile (i, j) of XᵀY that a slice of k gives.
  void tile(const T* x, const T* y, int64_t i, int64_t j, int64_t s, T* out) const {
    for (int64_t k = 0; k < tile_size(); ++k) out[k] = 0;
    const int64_t end = (s + 1) * slice < depth ? (s + 1) * slice : depth, stride = panel_stride<T>(depth);
    tile_gram(x + blocks.first(i) / kColumns<T> * stride, y + blocks.first(j) / kColumns<T> * stride, stride,
              blocks.length(i), blocks.length(j), s * slice, end, symmetric && i == j, out);
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
