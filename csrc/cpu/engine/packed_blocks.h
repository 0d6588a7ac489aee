// A matrix cut into blocks of rows in the layouts of tile_gemm.h, and the scratch memory that holds them.
#pragma once
#include <cstdint>

#include "packed_rows.h"

namespace sslfast {

// Rows below `split` come from `first`, the others from `second` (two views of a batch, without copying them together).
struct RowSource {
  Rows first, second;
  int64_t split;
};

// Where rows of the same numbering are written to.
struct RowTarget {
  void *first, *second;
  int64_t split;
  ElementType type;
};

namespace SSLFAST_CPU_LEVEL {

// Fewer rows than this in a block, and the products of the backward are too short to pay for loading their sums.
inline constexpr int64_t kLeastHeight = 64;

// Block height and sizes: from the matrix alone, so that forward and backward agree. Eight blocks (where there are rows
// for it) leave work for several threads.
template <typename T>
struct Blocks {
  int64_t rows, d, height, count, size, padded;  // size: numbers in a block; padded: d in whole panels

  Blocks(int64_t m, int64_t width) : rows(m), d(width) {
    const int64_t eighth = round_up((rows + 7) / 8 < kLeastHeight ? kLeastHeight : (rows + 7) / 8, kColumns<T>);
    height = rows < 16 * kTile && eighth < kTile ? eighth : kTile;
    count = (rows + height - 1) / height;
    size = block_size<T>(height, d);
    padded = round_up(d, kColumns<T>);
  }
  int64_t first(int64_t i) const { return i * height; }
  int64_t length(int64_t i) const { return rows - first(i) < height ? rows - first(i) : height; }
};

template <typename T>
static inline void read_source(const RowSource& source, int64_t index, int64_t d, T* out) {
  if (index < source.split)
    read_row(source.first, index, d, out);
  else
    read_row(source.second, index - source.split, d, out);
}

template <typename T>
static inline void write_target(const T* row, const RowTarget& target, int64_t index, int64_t d) {
  if (index < target.split)
    write_row(row, target.first, target.type, index, d);
  else
    write_row(row, target.second, target.type, index - target.split, d);
}

// The larger of two squared norms, NaN if one is NaN.
static inline double larger_norm(double a, double b) { return a == a && !(b <= a) ? b : a; }

// Packs block i; `factor(index, square)` multiplies a row of that squared norm. Without a place for it, not in the
// transposed layout. `row`: scratch of `padded` numbers. Returns the largest squared norm of a packed row.
template <typename T, typename Factor>
static double pack_block(const RowSource& source, const Blocks<T>& blocks, int64_t i, T* panels, T* transposed, T* row,
                         Factor&& factor) {
  double largest = 0;
  for (int64_t k = 0; k < blocks.padded; ++k) row[k] = 0;
  for (int64_t r = 0; r < blocks.length(i); ++r) {
    const int64_t index = blocks.first(i) + r;
    read_source(source, index, blocks.d, row);
    const T square = dot(row, row, blocks.padded);
    const T f = factor(index, square);
    largest = larger_norm(largest, static_cast<double>(square) * f * f);
    to_panels(row, f, blocks.padded, blocks.height, panels + r * kColumns<T>);
  }
  if (transposed != nullptr) transpose_panels(panels, blocks.height, blocks.length(i), blocks.d, transposed);
  return largest;
}

// Row r of a block in panels, copied out.
template <typename T>
static inline void from_panels(const T* panels, int64_t r, const Blocks<T>& blocks, T factor, T* row) {
  const T* at = panels + r * kColumns<T>;
  for (int64_t k = 0; k < blocks.padded; k += kColumns<T>, at += blocks.height * kColumns<T>)
    for (int c = 0; c < kColumns<T>; c += kLanes<T>) store(row + k + c, load(at + c) * factor);
}

// x·y of row r of two blocks in panels.
template <typename T>
static inline T dot_in_panels(const T* x, const T* y, int64_t r, const Blocks<T>& blocks) {
  T sum = 0;
  for (int64_t at = r * kColumns<T>; at < blocks.size; at += blocks.height * kColumns<T>)
    sum += dot(x + at, y + at, kColumns<T>);
  return sum;
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
