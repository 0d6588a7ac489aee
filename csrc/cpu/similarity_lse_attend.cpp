// Row log-sum-exp of q against k where only q learns, on the CPU: the gradient comes along in the forward, as in flash
// attention. With x_ij = (scale·q_i·k_j + bias_j)·log2(e) over the pairs that are not excluded:
//
//   sum_i = Σ_j 2^(x_ij − max_i),   row_lse_i = ln 2·(max_i + log2 sum_i)
//   attended_i = Σ_j 2^(x_ij − max_i) k_j / sum_i
//
// and d row_lse_i / d q_i = scale·attended_i. 2U in all (U = 2·M·N·D), nothing recomputed. k may be much larger than q
// (a queue): it is read once for its norms, then packed a few blocks at a time, so scratch memory does not grow with
// it.

#include "cpu/engine/cross_similarity.h"
#include "cpu/engine/key_chunks.h"

namespace sslfast {

// Float, or double for double rows.
struct AttendOutput {
  void* row_lse;   // [m]
  void* attended;  // [m, d]
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t similarity_lse_attend_workspace(const CrossInput& input, int64_t threads))
SSLFAST_DECLARE(void similarity_lse_attend(const CrossInput& input, const AttendOutput& output, void* workspace,
                                           const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct Attend {
  const CrossInput& input;
  const Blocks<T> of_q, of_k;
  const int64_t splits;         // few row blocks: each is shared by so many tasks, which take turns at the blocks of k
  const int64_t chunk;          // blocks of k that are packed at a time
  const SplitFactor<T> factor;  // log2(e)·scale
  T *q_panels, *k_panels, *k_transposed, *sums, *scratch_rows, *bias;
  T* scratch_tiles;  // [workers][height·kTile]: on the heap, because a thread's stack may be smaller than a tile
  T *max, *sum;      // [splits][m]
  IdRange *row_ranges, *col_ranges;
  double* per_block;
  int64_t* next;
  bool bounded;

  Attend(const CrossInput& in, int64_t threads, Arena& arena)
      : input(in),
        of_q(in.m, in.d),
        of_k(in.n, in.d),
        splits(split_count(of_q, of_k, threads)),
        chunk(chunk_count(of_k)),
        factor(kLog2e * in.scale) {
    q_panels = arena.take<T>(of_q.count * of_q.size);
    k_panels = arena.take<T>(chunk * of_k.size);
    k_transposed = arena.take<T>(chunk * of_k.size);
    sums = arena.take<T>(splits * of_q.count * of_q.size);
    scratch_rows = arena.take<T>((of_q.count + chunk) * of_q.padded);
    bias = in.bias == nullptr ? nullptr : arena.take<T>(in.n + kTile);
    max = arena.take<T>(splits * in.m);
    sum = arena.take<T>(splits * in.m);
    row_ranges = arena.take<IdRange>(of_q.count);
    col_ranges = arena.take<IdRange>(of_k.count);
    per_block = arena.take<double>(of_q.count + of_k.count);
    next = arena.take<int64_t>(1);
    scratch_tiles = arena.take<T>((threads < tasks() ? threads : tasks()) * of_q.height * kTile);
  }

  int64_t tasks() const { return of_q.count * splits; }

  // The largest squared norm decides before the first tile whether a running maximum is needed.
  double largest_key(const Parallel& parallel) {
    auto body = [&](int64_t b) {
      T* row = scratch_rows + b % (of_q.count + chunk) * of_q.padded;
      double largest = 0;
      for (int64_t r = 0; r < of_k.length(b); ++r) {
        read_row(input.k, of_k.first(b) + r, input.d, row);
        largest = larger_norm(largest, static_cast<double>(dot(row, row, of_k.padded)));
      }
      per_block[b] = largest;
      if (input.col_ids != nullptr) col_ranges[b] = range_of(input.col_ids + of_k.first(b), of_k.length(b));
    };
    const int64_t at_once = of_q.count + chunk;  // as many as there are scratch rows
    for (int64_t first = 0; first < of_k.count; first += at_once) {
      auto some = [&](int64_t b) { body(first + b); };
      parallel_each(parallel, of_k.count - first < at_once ? of_k.count - first : at_once, some);
    }
    double largest = 0;
    for (int64_t b = 0; b < of_k.count; ++b) largest = larger_norm(largest, per_block[b]);
    return largest;
  }

  void prepare(const Parallel& parallel) {
    for (int64_t x = 0; x < (of_q.count + chunk) * of_q.padded; ++x) scratch_rows[x] = 0;
    const double largest_k = largest_key(parallel);
    auto one = [](int64_t, T) { return T(1); };
    auto body = [&](int64_t i) {
      per_block[i] = pack_block({input.q, input.q, input.m}, of_q, i, q_panels + i * of_q.size,
                                static_cast<T*>(nullptr), scratch_rows + i * of_q.padded, one);
      if (input.row_ids != nullptr) row_ranges[i] = range_of(input.row_ids + of_q.first(i), of_q.length(i));
      for (int64_t s = 0; s < splits; ++s) {
        T* out = sums + (s * of_q.count + i) * of_q.size;
        for (int64_t x = 0; x < of_q.size; ++x) out[x] = 0;
      }
    };
    parallel_each(parallel, of_q.count, body);
    double largest_q = 0, largest_bias = 0;
    for (int64_t i = 0; i < of_q.count; ++i) largest_q = larger_norm(largest_q, per_block[i]);
    for (int64_t j = 0; bias != nullptr && j < input.n; ++j) {
      bias[j] = static_cast<const T*>(input.bias)[j] * static_cast<T>(kLog2e);
      largest_bias = larger_norm(largest_bias, bias[j] < 0 ? -bias[j] : bias[j]);
    }
    const double scale = kLog2e * (input.scale < 0 ? -input.scale : input.scale);
    bounded = scale * __builtin_sqrt(largest_q) * __builtin_sqrt(largest_k) + largest_bias <= kBoundedLimit;
    for (int64_t x = 0; x < splits * input.m; ++x) {
      max[x] = bounded ? T(0) : -static_cast<T>(__builtin_inf());
      sum[x] = 0;
    }
  }

  // Packs blocks first … first + count of k.
  void pack_keys(const Parallel& parallel, int64_t first, int64_t count) {
    auto one = [](int64_t, T) { return T(1); };
    auto body = [&](int64_t b) {
      pack_block({input.k, input.k, input.n}, of_k, first + b, k_panels + b * of_k.size, k_transposed + b * of_k.size,
                 scratch_rows + (of_q.count + b) * of_q.padded, one);
    };
    parallel_each(parallel, count, body);
  }

  // Row block i against block `place` of the chunk, which is block j of k, into the sums of split s.
  void tile(int64_t i, int64_t s, int64_t j, int64_t place, T* x) const {
    const int64_t rows = of_q.length(i), columns = of_k.length(j);
    tile_similarity(q_panels + i * of_q.size, k_transposed + place * of_k.size, of_q.height, rows, columns, input.d,
                    factor, x);
    if (bias != nullptr) add_bias(x, rows, columns, bias + of_k.first(j));
    if (columns % kLanes<T> != 0) mask_padding(x, rows, columns, bounded);
    if (input.row_ids != nullptr && row_ranges[i].meets(col_ranges[j]))
      each_equal(input.row_ids + of_q.first(i), rows, input.col_ids + of_k.first(j), columns,
                 [&](int64_t r, int64_t c) { x[r * kTile + c] = nothing_of<T>(bounded); });
    T* out = sums + (s * of_q.count + i) * of_q.size;
    const RowStatistics<T> of_rows{max + s * input.m + of_q.first(i), sum + s * input.m + of_q.first(i)};
    auto shrink = [&](int64_t r, T factor) {
      for (int64_t at = r * kColumns<T>; at < of_q.size; at += of_q.height * kColumns<T>)
        for (int c = 0; c < kColumns<T>; ++c) out[at + c] *= factor;
    };
    if (bounded)
      exponentials<T, true>(x, rows, columns, of_rows, shrink);
    else
      exponentials<T, false>(x, rows, columns, of_rows, shrink);
    tile_product<T, false>(x, k_panels + place * of_k.size, of_k.height, rows, columns, input.d, out, of_q.height);
  }

  // Merges the splits of row block i into the outputs.
  void finish(int64_t i, const AttendOutput& output) const {
    T* row = scratch_rows + i * of_q.padded;
    for (int64_t r = 0; r < of_q.length(i); ++r) {
      const int64_t index = of_q.first(i) + r;
      T top = max[index], total = 0;
      for (int64_t s = 1; s < splits; ++s) top = max[s * input.m + index] > top ? max[s * input.m + index] : top;
      const T* first = sums + i * of_q.size;
      for (int64_t s = 0; s < splits; ++s) {
        const T factor = factor_of(max[s * input.m + index], top);
        total += factor * sum[s * input.m + index];
      }
      for (int64_t x = 0; x < of_q.padded; ++x) row[x] = 0;
      for (int64_t s = 0; s < splits; ++s) {
        // Nothing summed: nothing attended.
        const T weight = total == 0 ? T(0) : factor_of(max[s * input.m + index], top) / total;
        const T* at = first + s * of_q.count * of_q.size + r * kColumns<T>;
        for (int64_t x = 0; x < of_q.padded; x += kColumns<T>, at += of_q.height * kColumns<T>)
          for (int c = 0; c < kColumns<T>; ++c) row[x + c] += weight * at[c];
      }
      natural_lse(&top, &total, 1, static_cast<T*>(output.row_lse) + index);
      narrow_row<T>(row, output.attended, index, input.d);
    }
  }
  // 2^(max − top), 0 for a split that has summed nothing.
  static T factor_of(T max, T top) { return max == top ? T(1) : exp2v<true>(broadcast(max - shift_of(top)))[0]; }
};

template <typename T>
void run(const CrossInput& input, const AttendOutput& output, void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  Attend<T> attend(input, parallel.threads, arena);
  attend.prepare(parallel);
  for (int64_t first = 0; first < attend.of_k.count; first += attend.chunk) {
    const int64_t left = attend.of_k.count - first, count = left < attend.chunk ? left : attend.chunk;
    attend.pack_keys(parallel, first, count);
    each_task(parallel, attend.tasks(), attend.next, [&](int64_t worker, int64_t task) {
      T* scratch = attend.scratch_tiles + worker * attend.of_q.height * kTile;
      const int64_t i = task / attend.splits, s = task % attend.splits;
      for (int64_t j = first; j < first + count; ++j)
        if (j % attend.splits == s) attend.tile(i, s, j, j - first, scratch);
    });
  }
  auto finish = [&](int64_t i) { attend.finish(i, output); };
  parallel_each(parallel, attend.of_q.count, finish);
}

}  // namespace

int64_t similarity_lse_attend_workspace(const CrossInput& input, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.q.type, [&](auto t) { Attend<decltype(t)>(input, threads, arena); });
  return arena.bytes;
}

void similarity_lse_attend(const CrossInput& input, const AttendOutput& output, void* memory,
                           const Parallel& parallel) {
  with_accumulator(input.q.type, [&](auto t) { run<decltype(t)>(input, output, memory, parallel); });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/cross_operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor> similarity_lse_attend_cpu(const Tensor& q, const Tensor& k, const Tensor& scale,
                                                     const MaybeTensor& bias, const MaybeTensor& row_ids,
                                                     const MaybeTensor& col_ids) {
  const CrossArguments given(q, k, scale, bias, row_ids, col_ids, MaybeTensor());
  Tensor row_lse = given.vector(given.input.m), attended = given.gradient(given.q, true);
  const AttendOutput output{row_lse.mutable_data_ptr(), attended.mutable_data_ptr()};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(given.q, SSLFAST_CALL(similarity_lse_attend_workspace, given.input, parallel.threads));
  SSLFAST_CALL(similarity_lse_attend, given.input, output, aligned(memory), parallel);
  return {row_lse, attended};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, similarity_lse_attend)
#endif  // SSLFAST_CPU_DISPATCH
