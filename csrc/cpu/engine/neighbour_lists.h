// The `count` largest similarities of each row, kept while tiles of similarities pass by in any order.
//
// Entries are ordered: the larger first, NaN before every number (as torch.topk has it), the smaller index first among
// equals. That order is total, so the lists are the same whatever the order of the tiles, on any number of threads.
// A similarity of −∞ is none: it stands for pairs that take no part, and index −1 beside it for an entry not filled.
#pragma once
#include "tile_gemm.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
static inline bool precedes(T x, int64_t i, T y, int64_t j) {
  if (x > y) return true;
  if (x < y) return false;
  const bool x_nan = x != x, y_nan = y != y;
  return x_nan == y_nan ? i < j : x_nan;
}

// Into shorter lists, and so few at a time, similarities are taken one by one: most are refused by then.
inline constexpr int64_t kLongList = 64, kFew = 8;

template <typename T>
struct NeighbourLists {
  int64_t count;
  T* value;        // [rows][count]
  int64_t* index;  // [rows][count]

  void start(int64_t first, int64_t rows) const {
    for (int64_t at = first * count; at < (first + rows) * count; ++at) {
      value[at] = -static_cast<T>(__builtin_inf());
      index[at] = -1;
    }
  }

  // Whether a row's list may take one of some similarities, of which `top` is the largest and `first` the lowest index.
  bool may_take(int64_t row, T top, int64_t first) const {
    const int64_t last = (row + 1) * count - 1;
    return top > value[last] || (top == value[last] && first < index[last]);
  }

  void take(int64_t row, T x, int64_t place) const {
    T* const values = value + row * count;
    int64_t* const places = index + row * count;
    if (!precedes(x, place, values[count - 1], places[count - 1])) return;
    int64_t low = 0, high = count - 1;  // it belongs at the first entry that it precedes
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (precedes(x, place, values[middle], places[middle]))
        high = middle;
      else
        low = middle + 1;
    }
    const size_t behind = static_cast<size_t>(count - 1 - low);
    __builtin_memmove(values + low + 1, values + low, behind * sizeof(T));
    __builtin_memmove(places + low + 1, places + low, behind * sizeof(int64_t));
    values[low] = x;
    places[low] = place;
  }

  // Similarities x[0 … n) with n ≤ kTile of indices first, first + 1, ...: those below the last entry are passed over
  // without a branch.
  void take_all(int64_t row, const T* x, int64_t n, int64_t first) const {
    const T last = value[(row + 1) * count - 1];
    int32_t some[kTile];
    int64_t found = 0;
    for (int64_t j = 0; j < n; ++j) {
      some[found] = static_cast<int32_t>(j);
      found += !(x[j] < last);
    }
    if (count >= kLongList && found > kFew) return merge(row, x, some, found, first);
    for (int64_t k = 0; k < found; ++k) take(row, x[some[k]], first + some[k]);
  }

  // Many at once are sorted among themselves and merged from behind, each entry of the list moving once.
  void merge(int64_t row, const T* x, int32_t* some, int64_t found, int64_t first) const {
    T* const values = value + row * count;
    int64_t* const places = index + row * count;
    sort(x, some, found);
    int64_t old = count - 1, young = found - 1;  // of what is left, the last one of each
    auto old_is_last = [&] {
      return young < 0 || (old >= 0 && precedes(x[some[young]], first + some[young], values[old], places[old]));
    };
    for (int64_t left_out = 0; left_out < found; ++left_out) old_is_last() ? --old : --young;
    for (int64_t at = count - 1; young >= 0; --at) {
      const bool from_old = old_is_last();
      values[at] = from_old ? values[old] : x[some[young]];
      places[at] = from_old ? places[old] : first + some[young];
      from_old ? --old : --young;
    }
  }

  // By insertion: after the first few tiles little is found in one.
  static void sort(const T* x, int32_t* some, int64_t found) {
    for (int64_t k = 1; k < found; ++k) {
      const int32_t moved = some[k];
      int64_t at = k;
      for (; at > 0 && precedes(x[moved], moved, x[some[at - 1]], some[at - 1]); --at) some[at] = some[at - 1];
      some[at] = moved;
    }
  }
};

// The largest of each of G rows, and of each column so far; NaN is passed over.
template <typename T, int G, bool kColumnsToo>
static inline void largest_of(const T* x, int64_t columns, T* of_row, T* of_column) {
  vec<T> top[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) top[g] = broadcast(-static_cast<T>(__builtin_inf()));
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    vec<T> down = kColumnsToo ? load(of_column + j) : vec<T>{};
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const vec<T> v = load(x + g * kTile + j);
      top[g] = larger<T>(v, top[g]);
      if constexpr (kColumnsToo) down = larger<T>(v, down);
    }
    if constexpr (kColumnsToo) store(of_column + j, down);
  }
#pragma GCC unroll 4
  for (int g = 0; g < G; ++g) of_row[g] = max_lanes<T>(top[g]);
}

template <typename T, bool kColumnsToo>
static inline void largest_of_tile(const T* x, int64_t rows, int64_t columns, T* of_row, T* of_column) {
  for (int64_t j = 0; kColumnsToo && j < kTile; ++j) of_column[j] = -static_cast<T>(__builtin_inf());
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) largest_of<T, 4, kColumnsToo>(x + i * kTile, columns, of_row + i, of_column);
  for (; i < rows; ++i) largest_of<T, 1, kColumnsToo>(x + i * kTile, columns, of_row + i, of_column);
}

// Where a tile's rows stand in the lists and what their columns are called.
struct TilePlace {
  int64_t row, rows, column, columns;  // the first one, and how many
};

// The columns of a tile, a vector of them at a time: its rows are then read once, whichever of the columns are wanted.
template <typename T>
static void take_columns(const T* x, const TilePlace& at, bool finite, const T* of_column,
                         const NeighbourLists<T>& lists, T* down) {
  for (int64_t j = 0; j < at.columns; j += kLanes<T>) {
    int32_t wanted[kLanes<T>];
    int count = 0;
    for (int64_t c = j; c < at.columns && c < j + kLanes<T>; ++c)
      if (!finite || lists.may_take(at.column + c, of_column[c], at.row)) wanted[count++] = static_cast<int32_t>(c);
    for (int64_t i = 0; count > 0 && i < at.rows; ++i)
      for (int c = 0; c < count; ++c) down[c * kTile + i] = x[i * kTile + wanted[c]];
    for (int c = 0; c < count; ++c) lists.take_all(at.column + wanted[c], down + c * kTile, at.rows, at.row);
  }
}

// A tile x [rows × columns], whole vectors of any numbers behind its columns, into the lists of its rows and, if asked,
// into those of its columns, whose lists stand from `column` on. `finite`: it holds no NaN; `down`: kLanes·kTile
// numbers of scratch memory.
template <typename T, bool kColumnsToo>
static void take_tile(const T* x, const TilePlace& at, bool finite, const NeighbourLists<T>& lists, T* down) {
  alignas(64) T of_row[kTile], of_column[kTile];
  if (finite) largest_of_tile<T, kColumnsToo>(x, at.rows, at.columns, of_row, of_column);
  for (int64_t i = 0; i < at.rows; ++i)
    if (!finite || lists.may_take(at.row + i, of_row[i], at.column))
      lists.take_all(at.row + i, x + i * kTile, at.columns, at.column);
  if constexpr (kColumnsToo) take_columns(x, at, finite, of_column, lists, down);
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
