// Row and column log-sum-exp of q against k on the CPU, without the M × N matrix; docs/similarity_lse.md. With
// x_ij = (scale·q_i·k_j + bias_j)·log2(e) over the pairs that are not excluded:
//
//   forward   sum_i = Σ_j 2^(x_ij − max_i),   row_lse_i = ln 2·(max_i + log2 sum_i);   columns likewise
//   backward  W_ij = g_i 2^(x_ij − max_i)/sum_i + h_j 2^(x_ij − max_j)/sum_j + gp_i [j = p(i)]
//             dq = scale·W k,   dk = scale·Wᵀ q,   dbias_j = Σ_i W_ij,   dscale = Σ_i q_i·(W k)_i
//
// U = 2·M·N·D operations forward and 3U backward, or 2U where all tiles fit the cache from the forward.
#include <cmath>

#include "cpu/engine/cross_similarity.h"

namespace sslfast {

// Arrays of float, or of double for double rows.
struct CrossSaved {
  void *row_max, *row_sum;  // [m]
  void *col_max, *col_sum;  // [n], null where columns are not wanted
  void* tiles;              // similarity tiles kept for the backward, as many as fit
  int64_t tiles_size;       // in numbers
};

// Null where not wanted; natural logarithms.
struct CrossOutput {
  void *row_lse, *col_lse, *positive, *hardest;
};

// Gradients of the outputs, null for none.
struct CrossGiven {
  const void *row, *col, *positive;
};

struct CrossNeeds {
  bool q, k, bias;
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t similarity_lse_workspace(const CrossInput& input, int64_t tiles_size, bool backward,
                                                 const CrossNeeds& needs, int64_t threads))
SSLFAST_DECLARE(void similarity_lse_forward(const CrossInput& input, const CrossSaved& saved, const CrossOutput& output,
                                            void* workspace, const Parallel& parallel))
SSLFAST_DECLARE(void similarity_lse_backward(const CrossInput& input, const CrossSaved& saved, const CrossGiven& given,
                                             const CrossNeeds& needs, CrossGradient& gradient, void* workspace,
                                             const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct CrossLse {
  const CrossInput& input;
  const CrossSaved& saved;
  const int64_t columns_of_tiles, tile_numbers, slots;
  CrossSimilarity<T> cross;
  T *row_a, *row_shift, *col_a, *col_shift;
  bool bounded;

  CrossLse(const CrossInput& in, const CrossSaved& kept, bool backward, const CrossNeeds& needs, int64_t threads,
           Arena& arena)
      : input(in),
        saved(kept),
        columns_of_tiles(Blocks<T>(in.n, in.d).count),
        tile_numbers(Blocks<T>(in.m, in.d).height * kTile),
        slots(kept.tiles_size / tile_numbers),
        cross(in, kLog2e, !backward || slots < columns_of_tiles * Blocks<T>(in.m, in.d).count, backward && needs.q,
              backward && needs.k, threads, arena) {
    row_a = arena.take<T>(backward ? in.m + kTile : 0);
    row_shift = arena.take<T>(backward ? in.m + kTile : 0);
    col_a = arena.take<T>(backward ? in.n + kTile : 0);
    col_shift = arena.take<T>(backward ? in.n + kTile : 0);
  }

  T* kept_tile(int64_t i, int64_t j) const {
    const int64_t slot = i * columns_of_tiles + j;
    return slot < slots ? static_cast<T*>(saved.tiles) + slot * tile_numbers : nullptr;
  }

  void mask(int64_t i, int64_t j, T* x) const {
    const int64_t rows = cross.of_q.length(i), columns = cross.of_k.length(j);
    if (columns % kLanes<T> != 0) mask_padding(x, rows, columns, bounded);
    cross.each_equal_id(i, j, [&](int64_t r, int64_t c) { x[r * kTile + c] = nothing_of<T>(bounded); });
  }

  // The largest negative of each row: the positive steps aside while the tile is searched.
  void search(int64_t i, int64_t j, T* x, T* hardest) const {
    T aside[kTile];
    const int64_t first = cross.of_q.first(i);
    cross.each_positive(i, j, [&](int64_t row, int64_t at) {
      aside[row - first] = x[at];
      x[at] = nothing_of<T>(bounded);
    });
    largest_of_rows(x, cross.of_q.length(i), cross.of_k.length(j), hardest + first);
    cross.each_positive(i, j, [&](int64_t row, int64_t at) { x[at] = aside[row - first]; });
  }

  static void start(T* max, T* sum, int64_t count, bool bounded) {
    for (int64_t i = 0; max != nullptr && i < count; ++i) {
      max[i] = bounded ? T(0) : -static_cast<T>(__builtin_inf());
      sum[i] = 0;
    }
  }

  void forward(const CrossOutput& output, const Parallel& parallel) {
    cross.pack(parallel, kLog2e);
    bounded = cross.limit <= kBoundedLimit;  // false for NaN
    T *positive = static_cast<T*>(output.positive), *hardest = static_cast<T*>(output.hardest);
    T *row_max = static_cast<T*>(saved.row_max), *row_sum = static_cast<T*>(saved.row_sum);
    T *col_max = static_cast<T*>(saved.col_max), *col_sum = static_cast<T*>(saved.col_sum);
    start(row_max, row_sum, input.m, bounded);
    start(col_max, col_sum, input.n, bounded);
    for (int64_t i = 0; i < input.m; ++i) {
      if (positive != nullptr) positive[i] = 0;
      if (hardest != nullptr) hardest[i] = -static_cast<T>(__builtin_inf());
    }
    cross.each_tile(parallel, [&](int64_t i, int64_t j, T* scratch) {
      T* x = kept_tile(i, j) == nullptr ? scratch : kept_tile(i, j);
      cross.similarity(i, j, x);
      if (positive != nullptr) cross.each_positive(i, j, [&](int64_t row, int64_t at) { positive[row] = x[at]; });
      mask(i, j, x);
      if (hardest != nullptr) search(i, j, x, hardest);
      const int64_t r = cross.of_q.first(i), c = cross.of_k.first(j);
      const bool rows_only = col_max == nullptr;
      const RowStatistics<T> of_rows{row_max + r, row_sum + r};
      const RowStatistics<T> of_columns{rows_only ? nullptr : col_max + c, rows_only ? nullptr : col_sum + c};
      if (bounded)
        accumulate_bounded(x, cross.of_q.length(i), cross.of_k.length(j), rows_only, of_rows, of_columns);
      else
        accumulate_any(x, cross.of_q.length(i), cross.of_k.length(j), rows_only, of_rows, of_columns);
    });
    natural_lse(row_max, row_sum, input.m, static_cast<T*>(output.row_lse));
    natural_lse(col_max, col_sum, input.n, static_cast<T*>(output.col_lse));
    natural_logits(positive, input.m, false);
    natural_logits(hardest, input.m, bounded);
  }

  void backward(const CrossGiven& given, CrossGradient& gradient, const Parallel& parallel) {
    cross.pack(parallel, kLog2e);
    bounded = cross.limit <= kBoundedLimit;
    const T *row_max = static_cast<const T*>(saved.row_max), *row_sum = static_cast<const T*>(saved.row_sum);
    const T *col_max = static_cast<const T*>(saved.col_max), *col_sum = static_cast<const T*>(saved.col_sum);
    const T *g = static_cast<const T*>(given.row), *h = static_cast<const T*>(given.col);
    const T* gp = static_cast<const T*>(given.positive);
    T* dbias = static_cast<T*>(gradient.dbias);
    const bool folded = bounded && foldable(g, row_max, row_sum, input.m) && foldable(h, col_max, col_sum, input.n);
    // Statistics of more columns than these may have large maxima, and relative to such a one the finite stand-in for
    // an excluded pair is not nothing: recomputed tiles then hold −∞. Kept tiles come with maxima of 0, which fold.
    bounded = folded;
    for (int64_t i = 0; i < input.m; ++i) prepare_weight(g, row_max, row_sum, i, folded, row_a, row_shift);
    for (int64_t j = 0; j < input.n; ++j) prepare_weight(h, col_max, col_sum, j, folded, col_a, col_shift);
    if (dbias != nullptr) cross.clear(dbias, input.n);
    cross.each_tile(parallel, [&](int64_t i, int64_t j, T* w) {
      const T* x = kept_tile(i, j) == nullptr ? w : kept_tile(i, j);
      if (x == w) {
        cross.similarity(i, j, w);
        mask(i, j, w);
      }
      const RowWeights<T> of_rows{row_shift + cross.of_q.first(i), row_a + cross.of_q.first(i)};
      const RowWeights<T> of_columns{col_shift + cross.of_k.first(j), col_a + cross.of_k.first(j)};
      if (folded)
        weights<T, true>(x, cross.of_q.length(i), cross.of_k.length(j), h == nullptr, of_rows, of_columns, w);
      else
        weights<T, false>(x, cross.of_q.length(i), cross.of_k.length(j), h == nullptr, of_rows, of_columns, w);
      if (gp != nullptr) cross.each_positive(i, j, [&](int64_t row, int64_t at) { w[at] += gp[row]; });
      if (dbias != nullptr) cross.column_sums(i, j, w, dbias);
      cross.products(i, j, w);
    });
    cross.write_gradients(parallel, gradient);
  }
};

}  // namespace

int64_t similarity_lse_workspace(const CrossInput& input, int64_t tiles_size, bool backward, const CrossNeeds& needs,
                                 int64_t threads) {
  Arena arena{nullptr};
  const CrossSaved saved{nullptr, nullptr, nullptr, nullptr, nullptr, tiles_size};
  with_accumulator(input.q.type, [&](auto t) { CrossLse<decltype(t)>(input, saved, backward, needs, threads, arena); });
  return arena.bytes;
}

void similarity_lse_forward(const CrossInput& input, const CrossSaved& saved, const CrossOutput& output, void* memory,
                            const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  const CrossNeeds none{false, false, false};
  with_accumulator(input.q.type, [&](auto t) {
    CrossLse<decltype(t)>(input, saved, false, none, parallel.threads, arena).forward(output, parallel);
  });
}

void similarity_lse_backward(const CrossInput& input, const CrossSaved& saved, const CrossGiven& given,
                             const CrossNeeds& needs, CrossGradient& gradient, void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  with_accumulator(input.q.type, [&](auto t) {
    CrossLse<decltype(t)>(input, saved, true, needs, parallel.threads, arena).backward(given, gradient, parallel);
  });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/cross_operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_lse_cpu(
    const Tensor& q, const Tensor& k, const Tensor& scale, const MaybeTensor& bias, const MaybeTensor& row_ids,
    const MaybeTensor& col_ids, const MaybeTensor& positives, bool columns, bool hardest, int64_t tile_cache) {
  const CrossArguments given(q, k, scale, bias, row_ids, col_ids, positives);
  const int64_t m = given.input.m, n = columns ? given.input.n : 0;
  Tensor row_lse = given.vector(m), col_lse = given.vector(n), positive = given.vector(positives.has_value() ? m : 0);
  Tensor negative = given.vector(hardest ? m : 0), row_max = given.vector(m), row_sum = given.vector(m);
  Tensor col_max = given.vector(n), col_sum = given.vector(n);
  Tensor tiles = tile_cache_of(given.q, tile_cache, given.kind);
  const CrossSaved saved{data_or_null(row_max), data_or_null(row_sum), data_or_null(col_max),
                         data_or_null(col_sum), data_or_null(tiles),   tile_cache};
  const CrossOutput output{data_or_null(row_lse), data_or_null(col_lse), data_or_null(positive),
                           data_or_null(negative)};
  const CrossNeeds none{false, false, false};
  const Parallel parallel = torch_parallel();
  Tensor memory =
      scratch(given.q, SSLFAST_CALL(similarity_lse_workspace, given.input, tile_cache, false, none, parallel.threads));
  SSLFAST_CALL(similarity_lse_forward, given.input, saved, output, aligned(memory), parallel);
  return {row_lse, col_lse, positive, negative, row_max, row_sum, col_max, col_sum, tiles};
}

// Row or column statistics as the forward returned them: needed where their gradient is given.
void check_statistics(const Tensor& max, const Tensor& sum, const char* name, const MaybeTensor& grad, int64_t length,
                      const CrossArguments& given) {
  if (!grad.has_value()) return;
  check_tensor(*grad, name, {length}, given.kind, given.q);
  check_tensor(max, "the maxima", {length}, given.kind, given.q);
  check_tensor(sum, "the sums", {length}, given.kind, given.q);
  SSLFAST_CHECK(max.is_contiguous() && sum.is_contiguous(), "maxima and sums must be as similarity_lse returned them");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> similarity_lse_backward_cpu(
    const MaybeTensor& grad_row_any, const MaybeTensor& grad_col_any, const MaybeTensor& grad_positive_any,
    const Tensor& q, const Tensor& k, const Tensor& scale, const MaybeTensor& bias, const MaybeTensor& row_ids,
    const MaybeTensor& col_ids, const MaybeTensor& positives, const Tensor& row_max, const Tensor& row_sum,
    const Tensor& col_max, const Tensor& col_sum, const Tensor& tiles, bool need_q, bool need_k, bool need_bias) {
  const CrossArguments given(q, k, scale, bias, row_ids, col_ids, positives);
  const MaybeTensor grad_row = contiguous_or_none(grad_row_any), grad_col = contiguous_or_none(grad_col_any),
                    grad_positive = contiguous_or_none(grad_positive_any);
  check_statistics(row_max, row_sum, "grad_row", grad_row, given.input.m, given);
  check_statistics(col_max, col_sum, "grad_col", grad_col, given.input.n, given);
  check_optional(grad_positive, "grad_positive", given.input.m, given.kind, given.q);
  check_tensor(tiles, "tiles", {tiles.numel()}, given.kind, given.q);
  const CrossSaved saved{read_only(row_max), read_only(row_sum), read_only(col_max),
                         read_only(col_sum), read_only(tiles),   tiles.numel()};
  Tensor dq = given.gradient(given.q, need_q), dk = given.gradient(given.k, need_k);
  Tensor dscale = given.number(), dbias = given.vector(need_bias ? given.input.n : 0);
  CrossGradient gradient{data_or_null(dq), data_or_null(dk), data_or_null(dbias), 0};
  const CrossGiven grads{data_or_null(grad_row), data_or_null(grad_col), data_or_null(grad_positive)};
  const CrossNeeds needs{need_q, need_k, need_bias};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(
      given.q, SSLFAST_CALL(similarity_lse_workspace, given.input, tiles.numel(), true, needs, parallel.threads));
  SSLFAST_CALL(similarity_lse_backward, given.input, saved, grads, needs, gradient, aligned(memory), parallel);
  set_scalar(dscale, gradient.dscale);
  return {dq, dk, dscale, dbias};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, similarity_lse, similarity_lse_backward)
#endif  // SSLFAST_CPU_DISPATCH
