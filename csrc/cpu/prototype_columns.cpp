// Column sums of a teacher's rows against K prototypes on the CPU, which is what an iteration of Sinkhorn–Knopp needs,
// without a matrix of rows × K; docs/prototype_cross_entropy.md. In base 2, y_kn = (u_k·h_n)·log2(e)/τ:
//
//   without a bias   L_k = log2 Σ_n 2^y_kn
//   with a bias      r_n = log2 Σ_k 2^(y_kn + f_k),   L_k = log2 Σ_n 2^(y_kn + f_k − r_n) − f_k
//                    and for those who want it, of each row −Σ_k p log p and the arg max
//
// Rows are the columns of tiles whose rows are prototypes. A row's softmax needs all prototypes before any column can
// be summed, so the second form takes the rows a chunk at a time: every block's exponentials relative to the block's
// maximum are stored, the blocks are merged, and then each is multiplied and summed. A part of the blocks keeps its
// logits from the visit without a bias for those with one, which compute the other blocks' again. A block of prototypes
// belongs to one thread, so no sum depends on the order of the threads.
#include "cpu/prototype_columns.h"

#include "cpu/engine/prototype_softmax.h"
#include "cpu/engine/prototype_tiling.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct Columns {
  const ColumnsInput& in;
  const ColumnsOutput& out;
  const bool softmax;
  const Blocks<T> of_k;
  const RowTiling<T> tiling;
  const FeaturePlan<T> features;
  const int64_t splits, workers, stride;  // stride: numbers that a block and a tile leave
  const SplitFactor<T> factor;            // log2(e)/τ
  int64_t *order, *next;                  // rows that take part
  T *transposed, *statistics, *merged, *chunk, *bias, *top, *sum, *scratch;
  int64_t scratch_size = 0;

  Columns(const ColumnsInput& input, const ColumnsOutput& output, int64_t threads, Arena& arena)
      : in(input),
        out(output),
        softmax(input.bias != nullptr),
        of_k(input.prototypes, input.d),
        tiling(input.rows, of_k, output.keep, softmax),
        features(1, input.rows, tiling.width, input.d),
        splits(split_count(of_k.count, threads)),
        workers(threads),
        stride(tiling.width * (input.by_row ? 4 : 2)),
        factor(kLog2e / input.temperature) {
    order = arena.take<int64_t>(in.rows);
    next = arena.take<int64_t>(1);
    transposed = arena.take<T>(tiling.in_chunk * features.size);
    statistics = arena.take<T>(softmax ? tiling.in_chunk * of_k.count * stride : 0);
    merged = arena.take<T>(softmax ? tiling.in_chunk * 2 * tiling.width : 0);
    chunk = arena.take<T>(softmax ? tiling.in_chunk * (of_k.count - tiling.kept) * tiling.size : 0);
    bias = arena.take<T>(softmax ? in.prototypes : 0);
    top = arena.take<T>(of_k.count * of_k.height + kLanes<T>);
    sum = arena.take<T>(of_k.count * of_k.height + kLanes<T>);
    const int64_t before = arena.bytes;
    Scratch(*this, arena);
    scratch_size = (arena.bytes - before) / static_cast<int64_t>(sizeof(T));
    arena.bytes = before;
    scratch = arena.take<T>(workers * scratch_size);
  }

  // Of a worker: a tile, a block of prototypes, the features of a tile, a row, and a block's maxima and sums.
  struct Scratch {
    T *tile, *block, *panels, *row, *top, *sum;

    Scratch(const Columns& of, Arena& arena) {
      tile = arena.template take<T>(of.tiling.size);
      block = arena.template take<T>(of.of_k.size);
      panels = arena.template take<T>(of.features.size);
      row = arena.template take<T>(of.of_k.padded);
      top = arena.template take<T>(of.of_k.height + kLanes<T>);
      sum = arena.template take<T>(of.of_k.height + kLanes<T>);
    }
  };
  Scratch scratch_of(int64_t worker) const {
    Arena arena{reinterpret_cast<char*>(scratch + worker * scratch_size)};
    return Scratch(*this, arena);
  }

  // What block b leaves of a tile of the chunk, [width] each.
  struct Statistics {
    T *max, *sum, *cross, *best;  // cross: Σ 2^(z − max)·z;  best: the place of the maximum in the block
  };
  Statistics statistics_of(int64_t slot, int64_t b) const {
    T* at = statistics + (slot * of_k.count + b) * stride;
    return {at, at + tiling.width, at + 2 * tiling.width, at + 3 * tiling.width};
  }
  // Where the logits of a tile and a block whose logits are kept lie, and the exponentials of one whose are not.
  T* kept_of(int64_t tile, int64_t b) const {
    return static_cast<T*>(out.kept) + (tile * tiling.kept + tiling.kept_before(b)) * tiling.size;
  }
  T* chunk_of(int64_t slot, int64_t b) const {
    return chunk + (slot * (of_k.count - tiling.kept) + b - tiling.kept_before(b)) * tiling.size;
  }
  static int64_t whole(int64_t some) { return round_up(some, kLanes<T>); }

  // y of a block, which is packed, and some rows; −∞ beyond the last of them.
  void logits(const T* block, int64_t b, int64_t slot, int64_t some, T* y) const {
    tile_similarity_rows(block, transposed + slot * features.size, of_k.height, of_k.length(b), some, in.d, factor, y,
                         tiling.width);
    for (int64_t k = 0; k < of_k.length(b); ++k)
      for (int64_t j = some; j < whole(some); ++j) y[k * tiling.width + j] = -static_cast<T>(__builtin_inf());
  }

  // Without a bias: maxima and sums of a block's columns of the logits, into the running ones.
  void sum_columns(int64_t b, const T* y, int64_t some, const Scratch& mine) const {
    const int64_t rows_k = of_k.length(b);
    T *most = top + of_k.first(b), *total = sum + of_k.first(b);
    for (int64_t k = 0; k < rows_k; ++k) {
      vec<T> a = load(y + k * tiling.width);
      for (int64_t j = kLanes<T>; j < whole(some); j += kLanes<T>) a = larger<T>(load(y + k * tiling.width + j), a);
      mine.top[k] = max_lanes<T>(a);
    }
    for (int64_t k = 0; k < rows_k; k += kLanes<T>) {
      const vec<T> before = load(most + k), after = larger<T>(load(mine.top + k), before);
      store(total + k, load(total + k) * exp2v<true>(before - shifts_of<T>(after)));
      store(most + k, references_of<T>(after));
    }
    for (int64_t k = 0; k < rows_k; ++k) {
      const vec<T> shift = shifts_of<T>(broadcast(most[k]));
      vec<T> part = {};
      for (int64_t j = 0; j < whole(some); j += kLanes<T>) part += exp2v<true>(load(y + k * tiling.width + j) - shift);
      total[k] += sum_lanes<T>(part);
    }
  }

  // With a bias: exponentials of a tile relative to the block's maxima, in their logits' place where `keep_logits` is
  // false, and what they leave.
  template <bool keep_logits, bool by_row>
  void observe(int64_t b, T* y, int64_t some, const Statistics& found) const {
    const int64_t rows_k = of_k.length(b);
    const T* f = bias + of_k.first(b);
    for (int64_t j = 0; j < whole(some); j += kLanes<T>) {
      vec<T> most = broadcast(-static_cast<T>(__builtin_inf())), best = {}, total = {}, cross = {};
      for (int64_t k = 0; k < rows_k; ++k) {
        const vec<T> z = load(y + k * tiling.width + j) + f[k];
        if constexpr (by_row) best = z > most ? broadcast(static_cast<T>(k)) : best;
        most = larger<T>(z, most);
      }
      const vec<T> shift = shifts_of<T>(most);
      for (int64_t k = 0; k < rows_k; ++k) {
        const vec<T> z = load(y + k * tiling.width + j) + f[k], e = exp2v<true>(z - shift);
        total += e;
        if constexpr (by_row) cross += e * z;
        if constexpr (!keep_logits) store(y + k * tiling.width + j, e);
      }
      store(found.max + j, references_of<T>(most));
      store(found.sum + j, total);
      if constexpr (by_row) store(found.cross + j, cross), store(found.best + j, best);
    }
  }

  // In place of each block's sums what its exponentials are multiplied by, and of the tile's rows the maxima and
  // 1/Σ 2^(z − max).
  void merge(int64_t slot, const int64_t* rows, int64_t some) const {
    const Statistics first = statistics_of(slot, 0);
    T *most = merged + slot * 2 * tiling.width, *inverse = most + tiling.width;
    merge_blocks(first.max, first.sum, stride, of_k.count, whole(some), most, inverse);
    for (int64_t b = 0; b < of_k.count; ++b) {
      const Statistics at = statistics_of(slot, b);
      for (int64_t i = 0; i < whole(some); ++i) at.sum[i] = i < some ? at.sum[i] / inverse[i] : T(0);
    }
    for (int64_t i = 0; in.by_row && i < some; ++i) {
      double mean = 0;
      T best = first.max[i];
      int64_t at_best = static_cast<int64_t>(first.best[i]);
      for (int64_t b = 0; b < of_k.count; ++b) {
        const Statistics at = statistics_of(slot, b);
        mean += static_cast<double>(at.sum[i]) * static_cast<double>(at.cross[i]);
        if (!(at.max[i] > best)) continue;
        best = at.max[i];
        at_best = of_k.first(b) + static_cast<int64_t>(at.best[i]);
      }
      const double lse = static_cast<double>(most[i]) + __builtin_log2(static_cast<double>(inverse[i]));
      static_cast<T*>(out.entropy)[rows[i]] = static_cast<T>(kLn2 * (lse - mean));
      out.best[rows[i]] = at_best;
    }
    for (int64_t i = 0; i < whole(some); ++i) inverse[i] = i < some ? T(1) / inverse[i] : T(0);
  }

  // The columns of a tile and block, from its exponentials, or from its logits where those are kept.
  template <bool keep_logits>
  void add_mass(int64_t b, const T* y, int64_t some, const T* most, const T* factor_of) const {
    const T* f = bias + of_k.first(b);
    for (int64_t k = 0; k < of_k.length(b); ++k, y += tiling.width) {
      vec<T> part = {};
      for (int64_t j = 0; j < whole(some); j += kLanes<T>) {
        if constexpr (keep_logits)
          part += exp2v<true>(load(y + j) + f[k] - load(most + j)) * load(factor_of + j);
        else
          part += load(y + j) * load(factor_of + j);
      }
      sum[of_k.first(b) + k] += sum_lanes<T>(part);
    }
  }

  void visit_block(int64_t b, int64_t first_tile, int64_t count, const Scratch& mine) const {
    const bool keeps = tiling.keeps(b), known = softmax && keeps;
    if (!known) pack_prototypes(in.of_teacher, of_k, b, mine.block, mine.row);
    for (int64_t slot = 0; slot * tiling.width < count; ++slot) {
      const int64_t some = tiling.rows_of(slot, count);
      T* y = keeps ? kept_of(first_tile + slot, b) : softmax ? chunk_of(slot, b) : mine.tile;
      if (!known) logits(mine.block, b, slot, some, y);
      if (!softmax)
        sum_columns(b, y, some, mine);
      else if (in.by_row)
        keeps ? observe<true, true>(b, y, some, statistics_of(slot, b))
              : observe<false, true>(b, y, some, statistics_of(slot, b));
      else
        keeps ? observe<true, false>(b, y, some, statistics_of(slot, b))
              : observe<false, false>(b, y, some, statistics_of(slot, b));
    }
  }

  void sum_block(int64_t b, int64_t first_tile, int64_t count) const {
    for (int64_t slot = 0; slot * tiling.width < count; ++slot) {
      const T *most = merged + slot * 2 * tiling.width, *inverse = most + tiling.width;
      const int64_t some = tiling.rows_of(slot, count);
      if (tiling.keeps(b))
        add_mass<true>(b, kept_of(first_tile + slot, b), some, most, inverse);
      else
        add_mass<false>(b, chunk_of(slot, b), some, most, statistics_of(slot, b).sum);
    }
  }

  void run(const Parallel& parallel) const {
    int64_t count = 0;
    for (int64_t n = 0; n < in.rows; ++n)
      if (in.taken == nullptr || in.taken[n]) order[count++] = n;
    for (int64_t n = 0; in.by_row && n < in.rows; ++n) static_cast<T*>(out.entropy)[n] = 0, out.best[n] = -1;
    for (int64_t k = 0; softmax && k < in.prototypes; ++k) bias[k] = static_cast<const T*>(in.bias)[k] * T(kLog2e);
    for (int64_t k = 0; k < of_k.count * of_k.height + kLanes<T>; ++k)
      top[k] = -static_cast<T>(__builtin_inf()), sum[k] = 0;
    const int64_t at_once = tiling.in_chunk * tiling.width;
    for (int64_t first = 0; first < count; first += at_once) {
      const int64_t some = count - first < at_once ? count - first : at_once, first_tile = first / tiling.width;
      const int64_t* rows = order + first;
      const int64_t tiles = (some + tiling.width - 1) / tiling.width;
      each_task(parallel, tiles, next, [&](int64_t worker, int64_t slot) {
        const Scratch mine = scratch_of(worker);
        features.pack(in.teacher, rows + slot * tiling.width, tiling.rows_of(slot, some), mine.panels,
                      transposed + slot * features.size, mine.row);
      });
      const auto scratch_at = [&](int64_t worker) { return scratch_of(worker); };
      each_block(parallel, splits, of_k.count, next, scratch_at,
                 [&](int64_t, int64_t b, const Scratch& mine) { visit_block(b, first_tile, some, mine); });
      if (!softmax) continue;
      auto merge_one = [&](int64_t slot) { merge(slot, rows + slot * tiling.width, tiling.rows_of(slot, some)); };
      parallel_each(parallel, tiles, merge_one);
      each_block(parallel, splits, of_k.count, next, scratch_at,
                 [&](int64_t, int64_t b, const Scratch&) { sum_block(b, first_tile, some); });
    }
    for (int64_t k = 0; k < in.prototypes; ++k) {
      const double log_sum = __builtin_log2(static_cast<double>(sum[k]));
      const T relative_to = softmax ? -bias[k] : sum[k] == 0 ? T(0) : top[k];
      static_cast<T*>(out.column_lse)[k] = static_cast<T>(kLn2 * (log_sum + static_cast<double>(relative_to)));
    }
  }
};

}  // namespace

int64_t prototype_columns_workspace(const ColumnsInput& input, const ColumnsOutput& output, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.teacher.type, [&](auto t) { Columns<decltype(t)>(input, output, threads, arena); });
  return arena.bytes;
}

void prototype_columns(const ColumnsInput& input, const ColumnsOutput& output, void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  with_accumulator(input.teacher.type,
                   [&](auto t) { Columns<decltype(t)>(input, output, parallel.threads, arena).run(parallel); });
}
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/prototype_operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_columns_cpu(
    const Tensor& teacher_any, const Tensor& prototypes_any, const MaybeTensor& gain_any, bool normalize,
    const MaybeTensor& bias_any, const MaybeTensor& taken_any, double temperature, const MaybeTensor& kept_any,
    int64_t keep, bool by_row) {
  const Tensor teacher = as_contiguous(teacher_any), prototypes = as_contiguous(prototypes_any);
  const MaybeTensor gain = contiguous_or_none(gain_any), bias = contiguous_or_none(bias_any);
  const MaybeTensor taken = contiguous_or_none(taken_any), kept_before = contiguous_or_none(kept_any);
  const ScalarType kind = accumulator_type(teacher);
  SSLFAST_CHECK(
      teacher.dim() == 2 && prototypes.dim() == 2 && teacher.size(1) == prototypes.size(1) && prototypes.numel() > 0,
      "teacher and prototypes must be matrices of the same features");
  const int64_t rows = teacher.size(0), k = prototypes.size(0);
  check_optional(gain, "gain", k, kind, teacher);
  check_optional(bias, "bias", k, kind, teacher);
  check_optional(taken, "taken", rows, ScalarType::Bool, teacher);
  if (kept_before) check_tensor(*kept_before, "kept", {kept_before->numel()}, kind, teacher);
  SSLFAST_CHECK(keep >= 0 && (keep == 0 || !bias) && (bias || !by_row),
                "logits are kept without a bias, and rows are asked for with one");
  Tensor column_lse = allocate(teacher, {k}, kind), entropy = allocate(teacher, {by_row ? rows : 0}, kind);
  Tensor best = allocate(teacher, {by_row ? rows : 0}, ScalarType::Long), kept = tile_cache_of(teacher, keep, kind);
  const ColumnsInput input{
      {teacher.const_data_ptr(), element_type(teacher, "teacher")},
      rows,
      teacher.size(1),
      k,
      {{prototypes.const_data_ptr(), element_type(prototypes, "prototypes")}, data_or_null(gain), normalize},
      data_or_null(bias),
      static_cast<const bool*>(data_or_null(taken)),
      temperature,
      by_row};
  const bool reads = bias && kept_before;
  const ColumnsOutput output{column_lse.mutable_data_ptr(), data_or_null(entropy),
                             static_cast<int64_t*>(data_or_null(best)),
                             reads ? read_only(*kept_before) : data_or_null(kept), reads ? kept_before->numel() : keep};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(teacher, SSLFAST_CALL(prototype_columns_workspace, input, output, parallel.threads));
  SSLFAST_CALL(prototype_columns, input, output, aligned(memory), parallel);
  return {column_lse, entropy, best, kept};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, prototype_columns)
#endif  // SSLFAST_CPU_DISPATCH
