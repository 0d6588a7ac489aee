// Rows of features h against prototypes w [K, D] in tiles whose rows are prototypes and whose columns are features,
//
//   x_kn = (w_k·h_n)·factor,   dw_k += Σ_n G_kn h_n,   dh_n += Σ_k G_kn w_k.
//
// Of the two, only the features are needed in the transposed layout: they are few and are packed once, while the
// prototypes, of which there may be a hundred thousand, are copied as they lie, a block at a time, and never held
// twice. Sums along the prototypes are then sums in a vector's lane.
#pragma once
#include "levels.h"
#include "packed_blocks.h"
#include "tile_softmax.h"

namespace sslfast {

// w_k: rows as they are, or gain_k·v_k/max(‖v_k‖, kLeastNorm) of rows v.
struct Prototypes {
  Rows rows;         // [K, D]
  const void* gain;  // [K] in the accumulator's type, or null for ones
  bool normalize;
};
inline constexpr double kLeastNorm = 1e-12;

// Several views of the same samples: row v·samples + b of [views, samples, D].
struct Views {
  Rows rows;
  int64_t count;
};

namespace SSLFAST_CPU_LEVEL {
namespace {

// 1/max(‖v‖, kLeastNorm), NaN where the square is.
template <typename T>
inline T inverse_norm(T square) {
  const T norm = static_cast<T>(__builtin_sqrt(square));
  return norm < T(kLeastNorm) ? T(1) / T(kLeastNorm) : T(1) / norm;
}

template <typename T>
inline T gain_of(const Prototypes& prototypes, int64_t k) {
  return prototypes.gain == nullptr ? T(1) : static_cast<const T*>(prototypes.gain)[k];
}

// Block `b` of prototypes in panels.
template <typename T>
void pack_prototypes(const Prototypes& prototypes, const Blocks<T>& blocks, int64_t b, T* panels, T* row) {
  const RowSource source{prototypes.rows, prototypes.rows, blocks.rows};
  pack_block(source, blocks, b, panels, static_cast<T*>(nullptr), row, [&](int64_t k, T square) {
    return prototypes.normalize ? gain_of<T>(prototypes, k) * inverse_norm(square) : T(1);
  });
}

// The features of a tile: column v·count + b is view v of sample order[b]. In panels [D/kColumns][height][kColumns] and
// transposed [height/kColumns][D][kColumns].
template <typename T>
struct FeaturePlan {
  int64_t views, samples, d, padded, height, size;

  FeaturePlan(int64_t of_views, int64_t all, int64_t in_tile, int64_t width)
      : views(of_views),
        samples(all),
        d(width),
        padded(round_up(width, kColumns<T>)),
        height(round_up(of_views * in_tile, kColumns<T>)),
        size(block_size<T>(height, width)) {}

  void pack(const Rows& rows, const int64_t* order, int64_t count, T* panels, T* transposed, T* row) const {
    for (int64_t k = 0; k < padded; ++k) row[k] = 0;
    for (int64_t v = 0; v < views; ++v)
      for (int64_t b = 0; b < count; ++b) {
        read_row(rows, v * samples + order[b], d, row);
        to_panels(row, T(1), padded, height, panels + (v * count + b) * kColumns<T>);
      }
    transpose_panels(panels, height, views * count, d, transposed);
  }
};

// As tile_similarity, with a leading dimension of s that is known at run time: a multiple of kColumns.
template <typename T>
void tile_similarity_rows(const T* panels, const T* transposed, int64_t height, int64_t rows, int64_t columns,
                          int64_t d, const SplitFactor<T>& factor, T* s, int64_t lds) {
  constexpr int C = kColumns<T>;
  const int64_t chunks = (d + C - 1) / C, last = d - (chunks - 1) * C;
  for (int64_t j = 0; j < columns; j += C)
    for (int64_t i = 0; i < rows; i += kRows)
      micro_rows<T, kVectors, C, 1, 0, Store::scaled>(rows - i, panels + i * C, transposed + j * d, chunks, C, last,
                                                      height * C, s + i * lds + j, factor.high, factor.low, lds);
}

// out[rows × d] (+)= G·H: G [rows × depth] with leading dimension kTile, H in panels of `height`, out row-major without
// gaps. `edge`: scratch [rows × kColumns] for the last features, where they are no whole panel.
template <typename T, Store kStore>
void product_into_rows(const T* g, const T* panels, int64_t height, int64_t rows, int64_t depth, int64_t d, T* out,
                       T* edge) {
  constexpr int C = kColumns<T>;
  for (int64_t first = 0; first < d; first += C) {
    const bool whole = d - first >= C;
    for (int64_t i = 0; i < rows; i += kRows) {
      const T *a = g + i * kTile, *b = panels + first * height;
      if (whole)
        micro_rows<T, kVectors, kTile, 1, 0, kStore>(rows - i, a, b, 1, depth, depth, 0, out + i * d + first, 0, 0, d);
      else
        micro_rows<T, kVectors, kTile, 1, C, Store::replace>(rows - i, a, b, 1, depth, depth, 0, edge + i * C, 0, 0);
    }
    for (int64_t i = 0; !whole && i < rows; ++i)
      for (int64_t k = first; k < d; ++k)
        out[i * d + k] = (kStore == Store::add ? out[i * d + k] : T(0)) + edge[i * C + k - first];
  }
}

// From d/dw to d/dv and d/dgain, in place, for rows `first` … `first` + `count`; dw and dgain begin at `first`:
//   dv = gain·r·(dw − v̂ <v̂, dw>),   dgain = <v̂, dw>,   v̂ = r·v,   r = 1/max(‖v‖, kLeastNorm),
// and where the norm is below that the divisor is a constant.
template <typename T>
void through_normalization(const Prototypes& prototypes, int64_t first, int64_t count, int64_t d, T* dw, T* dgain,
                           T* row) {
  const int64_t padded = round_up(d, kColumns<T>);
  for (int64_t k = 0; k < padded; ++k) row[k] = 0;
  for (int64_t i = 0; i < count; ++i, dw += d) {
    read_row(prototypes.rows, first + i, d, row);
    const T square = dot(row, row, padded), r = inverse_norm(square), gain = gain_of<T>(prototypes, first + i);
    T along = 0;
    for (int64_t k = 0; k < d; ++k) along += row[k] * dw[k];
    if (dgain != nullptr) dgain[i] = r * along;
    const T back = r * r < T(1) / T(kLeastNorm * kLeastNorm) ? r * r * along : T(0);
    for (int64_t k = 0; k < d; ++k) dw[k] = gain * r * (dw[k] - back * row[k]);
  }
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
