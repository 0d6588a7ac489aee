// The largest dot products of every row on the CPU, without the M × N matrix; docs/nearest_neighbours.md. A bias for
// each column, −½‖k_j‖², makes of them the smallest distances.
//
// Rows against themselves: s is symmetric, so a tile above the diagonal serves the lists of its rows and, read down, of
// its columns: N²·D operations. q against k: 2·M·N·D, with k packed a few blocks at a time.
#include "cpu/engine/key_chunks.h"
#include "cpu/engine/self_neighbours.h"

namespace sslfast {

// [m][count]; float, or double for double rows.
struct NeighbourOutput {
  void* similarity;
  int64_t* index;
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t nearest_neighbours_workspace(const NeighbourInput& input, int64_t threads))
SSLFAST_DECLARE(void nearest_neighbours(const NeighbourInput& input, const NeighbourOutput& output, void* workspace,
                                        const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct CrossNeighbours {
  const NeighbourInput& input;
  const Blocks<T> of_q, of_k;
  const int64_t splits, chunk;
  const SplitFactor<T> one{1.0};
  T *q_panels, *k_panels, *k_transposed, *scratch_rows, *scratch_tiles;
  T* values;  // [splits − 1][m][count]: the lists of the other splits
  int64_t* places;
  IdRange *row_ranges, *col_ranges;
  double *of_q_block, *of_k_block;  // largest squared norms; of k those of the chunk
  int64_t* next;

  CrossNeighbours(const NeighbourInput& in, int64_t threads, Arena& arena)
      : input(in),
        of_q(in.m, in.d),
        of_k(in.n, in.d),
        splits(split_count(of_q, of_k, threads)),
        chunk(chunk_count(of_k)) {
    q_panels = arena.take<T>(of_q.count * of_q.size);
    k_panels = arena.take<T>(chunk * of_k.size);
    k_transposed = arena.take<T>(chunk * of_k.size);
    scratch_rows = arena.take<T>((of_q.count + chunk) * of_q.padded);
    scratch_tiles = arena.take<T>((threads < tasks() ? threads : tasks()) * of_q.height * kTile);
    values = arena.take<T>((splits - 1) * in.m * in.count);
    places = arena.take<int64_t>((splits - 1) * in.m * in.count);
    row_ranges = arena.take<IdRange>(of_q.count);
    col_ranges = arena.take<IdRange>(chunk);
    of_q_block = arena.take<double>(of_q.count);
    of_k_block = arena.take<double>(chunk);
    next = arena.take<int64_t>(1);
  }

  int64_t tasks() const { return of_q.count * splits; }
  const T* bias_from(int64_t j) const {
    return input.bias == nullptr ? nullptr : static_cast<const T*>(input.bias) + j;
  }

  // The lists of split s: of the first one those that are returned.
  NeighbourLists<T> of_split(const NeighbourLists<T>& lists, int64_t s) const {
    const int64_t skipped = (s - 1) * input.m * input.count;
    return s == 0 ? lists : NeighbourLists<T>{input.count, values + skipped, places + skipped};
  }

  void run(const NeighbourLists<T>& lists, const Parallel& parallel) {
    auto one_each = [](int64_t, T) { return T(1); };
    auto pack_q = [&](int64_t i) {
      of_q_block[i] = pack_block({input.q, input.q, input.m}, of_q, i, q_panels + i * of_q.size,
                                 static_cast<T*>(nullptr), scratch_rows + i * of_q.padded, one_each);
      if (input.row_ids != nullptr) row_ranges[i] = range_of(input.row_ids + of_q.first(i), of_q.length(i));
      for (int64_t s = 0; s < splits; ++s) of_split(lists, s).start(of_q.first(i), of_q.length(i));
    };
    parallel_each(parallel, of_q.count, pack_q);
    for (int64_t first = 0; first < of_k.count; first += chunk) {
      const int64_t left = of_k.count - first, present = left < chunk ? left : chunk;
      auto pack_k = [&](int64_t b) {
        const double square =
            pack_block({input.k, input.k, input.n}, of_k, first + b, k_panels + b * of_k.size,
                       k_transposed + b * of_k.size, scratch_rows + (of_q.count + b) * of_q.padded, one_each);
        of_k_block[b] = bounding_square(square, bias_from(of_k.first(first + b)), of_k.length(first + b));
        if (input.col_ids == nullptr) return;
        col_ranges[b] = range_of(input.col_ids + of_k.first(first + b), of_k.length(first + b));
      };
      parallel_each(parallel, present, pack_k);
      each_task(parallel, tasks(), next, [&](int64_t worker, int64_t task) {
        const int64_t i = task / splits, s = task % splits;
        for (int64_t b = s; b < present; b += splits)
          tile(i, first + b, b, scratch_tiles + worker * of_q.height * kTile, of_split(lists, s));
      });
    }
    auto merge = [&](int64_t i) {
      for (int64_t s = 1; s < splits; ++s) merge_lists(i, of_split(lists, s), lists);
    };
    parallel_each(parallel, of_q.count, merge);
  }

  // Row block i against block j of k, which is block b of the chunk.
  void tile(int64_t i, int64_t j, int64_t b, T* x, const NeighbourLists<T>& lists) const {
    const TilePlace at{of_q.first(i), of_q.length(i), of_k.first(j), of_k.length(j)};
    tile_similarity(q_panels + i * of_q.size, k_transposed + b * of_k.size, of_q.height, at.rows, at.columns, input.d,
                    one, x);
    if (input.bias != nullptr) add_bias(x, at.rows, at.columns, bias_from(at.column));
    if (input.row_ids != nullptr && row_ranges[i].meets(col_ranges[b]))
      exclude_equal(input, at.row, at.rows, at.column, at.columns, x);
    take_tile<T, false>(x, at, is_finite(of_q_block[i]) && is_finite(of_k_block[b]), lists, nullptr);
  }

  void merge_lists(int64_t i, const NeighbourLists<T>& from, const NeighbourLists<T>& into) const {
    for (int64_t row = of_q.first(i); row < of_q.first(i) + of_q.length(i); ++row)
      for (int64_t at = row * input.count; at < (row + 1) * input.count && from.index[at] >= 0; ++at)
        into.take(row, from.value[at], from.index[at]);
  }
};

// f(search) with the one that the input asks for.
template <typename T, typename F>
void with_search(const NeighbourInput& input, int64_t threads, Arena& arena, F&& f) {
  if (input.k.data == nullptr) {
    SelfNeighbours<T> search(input, nullptr, threads, arena);
    f(search);
  } else {
    CrossNeighbours<T> search(input, threads, arena);
    f(search);
  }
}

}  // namespace

int64_t nearest_neighbours_workspace(const NeighbourInput& input, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.q.type, [&](auto t) { with_search<decltype(t)>(input, threads, arena, [](auto&) {}); });
  return arena.bytes;
}

void nearest_neighbours(const NeighbourInput& input, const NeighbourOutput& output, void* memory,
                        const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  with_accumulator(input.q.type, [&](auto t) {
    using T = decltype(t);
    const NeighbourLists<T> lists{input.count, static_cast<T*>(output.similarity), output.index};
    with_search<T>(input, parallel.threads, arena, [&](auto& search) { search.run(lists, parallel); });
  });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor> nearest_neighbours(const Tensor& q_any, const MaybeTensor& k_any,
                                              const MaybeTensor& bias_any, const MaybeTensor& row_ids_any,
                                              const MaybeTensor& col_ids_any, int64_t count) {
  const Tensor q = as_contiguous(q_any), k = k_any.has_value() ? as_contiguous(*k_any) : q;
  const MaybeTensor bias = contiguous_or_none(bias_any);
  const MaybeTensor row_ids = contiguous_or_none(row_ids_any), col_ids = contiguous_or_none(col_ids_any);
  SSLFAST_CHECK(q.dim() == 2 && k.dim() == 2 && q.size(1) == k.size(1) && q.scalar_type() == k.scalar_type(),
                "q and k must be two-dimensional with the same width and dtype");
  SSLFAST_CHECK(q.size(1) > 0 && k.size(0) > 0, "q must have features and k rows");
  SSLFAST_CHECK(count > 0, "count must be positive, got ", count);
  SSLFAST_CHECK(row_ids.has_value() == (col_ids.has_value() || (!k_any.has_value() && row_ids.has_value())),
                "row_ids and col_ids must be given together");
  check_optional(bias, "bias", k.size(0), accumulator_type(q), q);
  check_optional(row_ids, "row_ids", q.size(0), ScalarType::Long, q);
  check_optional(col_ids, "col_ids", k.size(0), ScalarType::Long, q);
  Tensor similarity = allocate(q, {q.size(0), count}, accumulator_type(q));
  Tensor index = allocate(q, {q.size(0), count}, ScalarType::Long);
  if (q.size(0) == 0) return {similarity, index};
  const ElementType type = element_type(q, "q");
  const NeighbourInput input{{q.const_data_ptr(), type},
                             {k_any.has_value() ? k.const_data_ptr() : nullptr, type},
                             q.size(0),
                             k.size(0),
                             q.size(1),
                             data_or_null(bias),
                             static_cast<const int64_t*>(data_or_null(row_ids)),
                             static_cast<const int64_t*>(data_or_null(k_any.has_value() ? col_ids : row_ids)),
                             count};
  const NeighbourOutput output{similarity.mutable_data_ptr(), mutable_data<int64_t>(index)};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(q, SSLFAST_CALL(nearest_neighbours_workspace, input, parallel.threads));
  SSLFAST_CALL(nearest_neighbours, input, output, aligned(memory), parallel);
  return {similarity, index};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) { m.impl("nearest_neighbours", TORCH_BOX(&sslfast::nearest_neighbours)); }
#endif  // SSLFAST_CPU_DISPATCH
