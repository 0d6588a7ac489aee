// Softmax along the prototypes of tiles [prototypes × columns] (leading dimension kTile), when the prototypes come in
// blocks: of every block the exponentials relative to its own maximum, once, and a factor for each block and column
// when all blocks have been seen.
#pragma once
#include "tile_softmax.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// What the exponents of a column are relative to, lane by lane: see shift_of.
template <typename T>
inline vec<T> shifts_of(vec<T> max) {
  const vec<T> infinity = broadcast(static_cast<T>(__builtin_inf())), zero = {};
  return max == infinity || max == -infinity ? zero : max;
}
// The same as a number that other blocks' are compared with: −∞ stays, and takes the block's sum of nothing to nothing.
template <typename T>
inline vec<T> references_of(vec<T> max) {
  const vec<T> infinity = broadcast(static_cast<T>(__builtin_inf())), zero = {};
  return max == infinity ? zero : max;
}

// y[k][j] += log2(e)·bias[k]: a bias in units of the logits.
template <typename T>
inline void add_row_bias(T* y, int64_t rows, int64_t columns, const T* bias) {
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t j = 0; j < columns; ++j) y[k * kTile + j] += bias[k] * T(kLog2e);
}

// The largest of `rows` numbers in each of a vector's columns.
template <typename T>
inline vec<T> column_maximum(const T* x, int64_t rows) {
  const vec<T> lowest = broadcast(-static_cast<T>(__builtin_inf()));
  vec<T> top[4] = {lowest, lowest, lowest, lowest};
  int64_t k = 0;
  for (; k + 4 <= rows; k += 4)
    for (int u = 0; u < 4; ++u) top[u] = larger<T>(load(x + (k + u) * kTile), top[u]);
  for (; k < rows; ++k) top[0] = larger<T>(load(x + k * kTile), top[0]);
  return larger<T>(larger<T>(top[0], top[1]), larger<T>(top[2], top[3]));
}

// Exponentials of one vector of columns, relative to their maximum in this block, into e (or nowhere); their sum; and
// Σ_k p_kn x_kn with P tiles of earlier exponentials p.
template <typename T, int P>
inline void observe_columns(const T* x, int64_t rows, vec<T> shift, T* e, int64_t lde, vec<T>* sum, const T* const* p,
                            int64_t ldp, vec<T>* cross) {
  vec<T> total = {}, with[P + 1] = {};
  for (int64_t k = 0; k < rows; ++k) {
    const vec<T> v = load(x + k * kTile), exponential = exp2v<true>(v - shift);
    total += exponential;
    if (e != nullptr) store(e + k * lde, exponential);
    for (int t = 0; t < P; ++t) with[t] += load(p[t] + k * ldp) * v;
  }
  *sum = total;
  for (int t = 0; t < P; ++t) cross[t] = with[t];
}

// Σ_k p_kn x_kn alone.
template <typename T>
inline vec<T> cross_columns(const T* x, int64_t rows, const T* p, int64_t ldp) {
  vec<T> total = {};
  for (int64_t k = 0; k < rows; ++k) total += load(p + k * ldp) * load(x + k * kTile);
  return total;
}

// From the blocks' maxima and sums of `columns` columns: max, the column's maximum over all blocks, total =
// Σ 2^(x − max), and, in place of each block's sum, 2^(its maximum − max). Block b's numbers lie `stride` further than
// block b − 1's.
template <typename T>
void merge_blocks(T* block_max, T* block_sum, int64_t stride, int64_t blocks, int64_t columns, T* max, T* total) {
  for (int64_t j = 0; j < columns; j += kLanes<T>) {
    vec<T> top = broadcast(-static_cast<T>(__builtin_inf()));
    for (int64_t b = 0; b < blocks; ++b) top = larger<T>(load(block_max + b * stride + j), top);
    const vec<T> shift = shifts_of<T>(top);
    vec<T> sum = {}, lost = {};  // compensated: hundreds of blocks
    for (int64_t b = 0; b < blocks; ++b) {
      const vec<T> factor = exp2v<true>(load(block_max + b * stride + j) - shift);
      const vec<T> term = load(block_sum + b * stride + j) * factor - lost, next = sum + term;
      lost = (next - sum) - term;
      sum = next;
      store(block_sum + b * stride + j, factor);
    }
    store(max + j, shift);
    store(total + j, sum + sum * T(0));  // an infinite logit makes its softmax NaN, as in PyTorch
  }
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
