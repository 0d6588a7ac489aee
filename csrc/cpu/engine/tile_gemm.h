// The packed micro-kernel that every tiled CPU operation uses, and the two layouts it reads.
//
// A micro-tile of C, kRows × kColumns numbers, stays in registers while k runs: per k one packed row of B (kVectors
// vectors) and kRows broadcast numbers of A, so kRows·kVectors multiply-adds for kVectors loads. With 24 accumulators
// the multiply-add units are never idle (latency 4, one or two a cycle), which 16 or fewer leave unproven.
//
// Rows of Z are kept in blocks of at most kTile rows, twice:
//   panels     [D/kColumns][height][kColumns]  row-major pieces: B of W·Z, the accumulators of dZ, and A of Z·Zᵀ
//   transposed [height/kColumns][D][kColumns]  the same rows with k outermost: B of Z·Zᵀ
// with one height, a multiple of kColumns, for all blocks of a problem. So every stride in the kernel's inner loop is a
// compile-time constant and every load of B is sequential.
#pragma once
#include <cstdint>

#include "arena.h"
#include "vec.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

// Most rows in a block, and the leading dimension of a tile: at 192 rows a tile (144 KiB) and six blocks at D = 128 fit
// in 1 MiB of second-level cache.
inline constexpr int kTile = 192;
inline constexpr int kRows = kManyRegisters ? 12 : 6;
inline constexpr int kVectors = 2;
template <typename T>
inline constexpr int kColumns = kVectors * kLanes<T>;

// Numbers in one block of either layout.
template <typename T>
static inline int64_t block_size(int64_t height, int64_t d) {
  return height * round_up(d, kColumns<T>);
}

// What a micro-tile does with its accumulators.
enum class Store { scaled, add, replace };

// C[rows × vectors·lanes] (+)= Σ_k A[i][k]·B[k][·] over `chunks` runs of `run` values of k, A moving by `jump` from
// run to run and the last run being `last` long. Scaled: C = acc·high + acc·low, a scale with twice the precision.
// C's leading dimension is kLdc, or one that is known at run time.
template <typename T, int R, int V, int kRowStride, int kStep, int kLdc, Store kStore>
static inline __attribute__((always_inline)) void micro_tile(const T* a, const T* b, int64_t chunks, int64_t run,
                                                             int64_t last, int64_t jump, T* c, T high, T low,
                                                             int64_t ldc = kLdc) {
  vec<T> acc[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      acc[i][v] = vec<T>{};
      if constexpr (kStore == Store::add) __builtin_prefetch(c + i * ldc + v * kLanes<T>, 1);
    }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, a += jump) {
    const int64_t length = chunk + 1 == chunks ? last : run;
    const T* x = a;
    for (int64_t k = 0; k < length; ++k, x += kStep, b += kColumns<T>) {
      vec<T> row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[i][v] += x[i * kRowStride] * row[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* out = c + i * ldc + v * kLanes<T>;
      if constexpr (kStore == Store::scaled)
        store(out, acc[i][v] * high + acc[i][v] * low);
      else if constexpr (kStore == Store::replace)
        store(out, acc[i][v]);
      else
        store(out, load(out) + acc[i][v]);
    }
}

// micro_tile for the `rows` ≤ kRows rows that are left at a tile's lower edge: one instantiation per height.
template <typename T, int V, int kRowStride, int kStep, int kLdc, Store kStore, int R = kRows>
static inline void micro_rows(int64_t rows, const T* a, const T* b, int64_t chunks, int64_t run, int64_t last,
                              int64_t jump, T* c, T high, T low, int64_t ldc = kLdc) {
  if (rows >= R)
    micro_tile<T, R, V, kRowStride, kStep, kLdc, kStore>(a, b, chunks, run, last, jump, c, high, low, ldc);
  else if constexpr (R > 1)
    micro_rows<T, V, kRowStride, kStep, kLdc, kStore, R - 1>(rows, a, b, chunks, run, last, jump, c, high, low, ldc);
}

// A factor in two parts, with twice the precision of T. Both have its sign and, unless it is zero, neither is zero: an
// infinite sum times both is then infinite, where ∞·0 and ∞ − ∞ would be NaN.
template <typename T>
struct SplitFactor {
  static constexpr T kUlp = static_cast<T>(sizeof(T) == 4 ? 0x1p-24 : 0x1p-53);
  T high, low;

  explicit SplitFactor(double factor) : high(static_cast<T>(factor)) {
    if (__builtin_fabs(static_cast<double>(high)) > __builtin_fabs(factor)) high *= 1 - kUlp;  // the number before it
    low = static_cast<T>(factor - static_cast<double>(high));
    // Too small to count beside `high`, too large to make subnormal products.
    if (low == 0) low = high * static_cast<T>(sizeof(T) == 4 ? 0x1p-60 : 0x1p-200);
  }
};

// S[rows × columns] = (Z_I Z_Jᵀ)·factor, row-major with leading dimension kTile, columns rounded up to kColumns.
template <typename T>
static void tile_similarity(const T* panels_i, const T* transposed_j, int64_t height, int64_t rows, int64_t columns,
                            int64_t d, const SplitFactor<T>& factor, T* s) {
  constexpr int C = kColumns<T>;
  const int64_t chunks = (d + C - 1) / C, last = d - (chunks - 1) * C;
  for (int64_t j = 0; j < columns; j += C)
    for (int64_t i = 0; i < rows; i += kRows)
      micro_rows<T, kVectors, C, 1, kTile, Store::scaled>(rows - i, panels_i + i * C, transposed_j + j * d, chunks, C,
                                                          last, height * C, s + i * kTile + j, factor.high, factor.low);
}

// out[rows × d] += W·Z, with W read as stored (kTransposed = false: W [rows × depth]) or transposed (W [depth × rows]);
// Z in panels of blocks of `height` rows, out in panels of blocks of `out_height`.
template <typename T, bool kTransposed>
static void tile_product(const T* w, const T* panels, int64_t height, int64_t rows, int64_t depth, int64_t d, T* out,
                         int64_t out_height) {
  constexpr int C = kColumns<T>, kRowStride = kTransposed ? 1 : kTile, kStep = kTransposed ? kTile : 1;
  for (int64_t first = 0; first < d; first += C) {
    const T* b = panels + first * height;
    T* c = out + first * out_height;
    for (int64_t i = 0; i < rows; i += kRows) {
      const T* a = w + i * kRowStride;
      if (d - first > kLanes<T>)
        micro_rows<T, kVectors, kRowStride, kStep, C, Store::add>(rows - i, a, b, 1, depth, depth, 0, c + i * C, 0, 0);
      else  // half a panel is left: half the work
        micro_rows<T, 1, kRowStride, kStep, C, Store::add>(rows - i, a, b, 1, depth, depth, 0, c + i * C, 0, 0);
    }
  }
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
