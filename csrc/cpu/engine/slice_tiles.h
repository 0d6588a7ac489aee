// Projections of several views on slices, tile by tile: p = z·A of a block of rows of one view and a block of columns
// of A, in quarter turns a step of the knots, by the micro-kernel of tile_gemm.h. No view is in two blocks.
#pragma once
#include "angles.h"
#include "levels.h"
#include "packed_blocks.h"
#include "transpose.h"

namespace sslfast {

// z [views, rows, d] of any type and slices [d, count] in its accumulator's; the knots are t_k = k·step, k = 1 … knots.
struct SliceInput {
  Rows z;
  const void* slices;
  int64_t views, rows, d, count, knots;  // count: of the slices
  double step;
};

namespace SSLFAST_CPU_LEVEL {
namespace {

// Knots are taken in groups of eight, 8j + 1 … 8j + 8, around the pivot P = 8j + 4: with the multiples b = 1 … 4 of the
// angle, cos((P ± b)θ) = cos Pθ cos bθ ∓ sin Pθ sin bθ and sin((P ± b)θ) = sin Pθ cos bθ ± cos Pθ sin bθ, so four
// products serve four numbers.
inline constexpr int64_t kGroup = 8, kPivot = 4;

static inline int64_t group_count(int64_t knots) { return (knots + kGroup - 1) / kGroup; }

// Rows of a column of vectors that are worked on while they lie in the first-level cache.
inline constexpr int64_t kStripe = 32;

template <typename T>
struct SliceTiles {
  const SliceInput& input;
  const Blocks<T> of_view, of_slices;
  const SplitFactor<T> factor;  // quarter turns of a step for a projection of 1
  T *z_panels, *transposed, *panels, *row_scratch;

  // `backward`: the slices are also wanted as B of a product.
  SliceTiles(const SliceInput& in, bool backward, Arena& arena)
      : input(in), of_view(in.rows, in.d), of_slices(in.count, in.d), factor(in.step * 0.63661977236758134308) {  // 2/π
    z_panels = arena.take<T>(in.views * of_view.count * of_view.size);
    transposed = arena.take<T>(of_slices.count * of_slices.height * in.d);
    panels = backward ? arena.take<T>(of_slices.count * of_slices.size) : nullptr;
    row_scratch = arena.take<T>(in.views * of_view.count * of_view.padded);
  }

  int64_t blocks() const { return input.views * of_view.count; }
  int64_t width() const { return of_slices.count * of_slices.height; }  // slices in whole blocks

  // `block` counts through all views.
  void pack_rows(int64_t block) const {
    const int64_t view = block / of_view.count, i = block % of_view.count;
    T* row = row_scratch + block * of_view.padded;
    for (int64_t k = input.d; k < of_view.padded; ++k) row[k] = 0;
    for (int64_t r = 0; r < of_view.length(i); ++r) {
      read_row(input.z, view * input.rows + of_view.first(i) + r, input.d, row);
      to_panels(row, T(1), of_view.padded, of_view.height, z_panels + block * of_view.size + r * kColumns<T>);
    }
  }

  void pack_slices(int64_t j) const {
    constexpr int C = kColumns<T>;
    const T* a = static_cast<const T*>(input.slices) + of_slices.first(j);
    const int64_t length = of_slices.length(j), stride = input.count;
    T* out = transposed + j * of_slices.height * input.d;
    for (int64_t s = 0; s < length; s += C, out += C * input.d)
      for (int64_t k = 0; k < input.d; ++k) {
        const int64_t left = length - s < C ? length - s : C;
        for (int64_t c = 0; c < left; ++c) out[k * C + c] = a[k * stride + s + c];
        for (int64_t c = left; c < C; ++c) out[k * C + c] = 0;
      }
    if (panels == nullptr) return;
    out = panels + j * of_slices.size;
    for (int64_t first = 0; first < input.d; first += C, out += of_slices.height * C) {
      const int64_t left = input.d - first < C ? input.d - first : C;
      for (int64_t x = 0; left < C && x < length * C; ++x) out[x] = 0;
      transpose(a + first * stride, stride, left, length, out, C);
    }
  }

  void pack(const Parallel& parallel) const {
    auto body = [&](int64_t task) {
      if (task < blocks())
        pack_rows(task);
      else
        pack_slices(task - blocks());
    };
    parallel_each(parallel, blocks() + of_slices.count, body);
  }

  // The angles of row block `block` on slice block j; leading dimension kTile.
  void angles(int64_t block, int64_t j, T* x) const {
    tile_similarity(z_panels + block * of_view.size, transposed + j * of_slices.height * input.d, of_view.height,
                    of_view.length(block % of_view.count), of_slices.length(j), input.d, factor, x);
  }
};

// Brings the angles of `rows` vectors, kTile numbers apart, within ±kSmall, where one of them is beyond it.
template <typename T>
static inline void tame(T* x, int64_t rows) {
  using I = typename Vec<T>::mask;
  const vec<T> limit = broadcast(AngleLimits<T>::kSmall);
  I most = {};
  for (int64_t r = 0; r < rows; ++r) {
    const vec<T> v = load(x + r * kTile);
    most |= ~((v <= limit) & (v >= -limit));  // NaN is no smaller either
  }
  bool some = false;
  for (int l = 0; l < kLanes<T>; ++l) some |= most[l] != 0;
  if (!some) return;
  for (int64_t r = 0; r < rows; ++r) store(x + r * kTile, within_few_turns<T>(load(x + r * kTile)));
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
