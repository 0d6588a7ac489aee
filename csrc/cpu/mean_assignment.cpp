// The weighted sum of rows' softmaxes over prototypes on the CPU, and in the same visit each row's cross entropy
// against a target and its entropy. Forward, a row is read once: its exponentials stay in the cache until its sum is
// known, and are then added to the column sums, a few rows at a time. Backward, it is read once and its gradient
// written:
//     dx = 1/τ·(w p ⊙ (v − <p, v>) + g(mass p − t) − h p ⊙ (ln p + entropy))
#include "cpu/mean_assignment.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
const T* row_of(const AssignedRows& x, int64_t b) {
  return static_cast<const T*>(x.logits) + b * x.prototypes;
}

// Scratch memory by its parts.
template <typename A>
struct Parts {
  A *e, *weight, *shift, *y, *raw, *target;

  Parts(const AssignedRows& x, A* scratch) : e(scratch) {
    const int64_t chunks = chunks_of(x.prototypes);
    weight = e + kSummedRows * padded_columns(x.prototypes);
    shift = weight + kSummedRows * chunks;
    y = shift + chunks, raw = y + kLogitChunk, target = raw + kLogitChunk;
  }
};

// A chunk of row b's target: where it lies, or in `buffer` with 0 up to a whole vector.
template <typename A>
const A* target_chunk(const AssignedRows& x, int64_t b, int64_t begin, int64_t count, A* buffer) {
  const A* row = static_cast<const A*>(x.targets) + b % x.target_rows * x.prototypes + begin;
  if (count % kLanes<A> == 0) return row;
  for (int64_t k = 0; k < count; ++k) buffer[k] = row[k];
  for (int64_t k = count; k % kLanes<A> != 0; ++k) buffer[k] = 0;
  return buffer;
}

// e[k] ← 2^(y[k] − shift), their sum, and Σ e·y, in which an exponential of 0 counts nothing.
template <typename A>
A exponentials_and_dot(const A* y, int64_t n, A shift, A* e, A* dot) {
  vec<A> sum[2] = {}, with[2] = {};
  const vec<A> least = broadcast(kLeast<A>);
  int64_t k = 0;
  for (; k + 2 * kLanes<A> <= n; k += 2 * kLanes<A>) {
    for (int u = 0; u < 2; ++u) {
      const vec<A> of = load(y + k + u * kLanes<A>), power = exp2v<true>(of - shift);
      store(e + k + u * kLanes<A>, power);
      sum[u] += power;
      with[u] += power * at_least<A>(of, least);
    }
  }
  if (k < n) {
    const vec<A> of = load(y + k), power = exp2v<true>(of - shift);
    store(e + k, power);
    sum[0] += power;
    with[0] += power * at_least<A>(of, least);
  }
  *dot = sum_lanes<A>(with[0] + with[1]);
  return sum_lanes<A>(sum[0] + sum[1]);
}

// The exponentials of row b, each relative to its chunk's largest; what of each chunk makes the softmax of them; and
// the row's cross entropy.
template <typename T, typename A = Accumulator<T>>
AssignmentStats<A> row_softmax(const AssignedRows& x, int64_t b, const Parts<A>& parts, A* e, A* weight,
                               A* cross_entropy) {
  AssignmentStats<A> stats = {};
  const T* row = row_of<T>(x, b);
  A top = kLeast<A>, cross = 0, own = 0;
  for (int64_t k = 0, c = 0; k < x.prototypes; k += kLogitChunk, ++c) {
    const int64_t count = x.prototypes - k < kLogitChunk ? x.prototypes - k : kLogitChunk;
    const int64_t n = scaled_chunk(row + k, count, A(x.factor), stats.base, parts.raw, parts.y);
    if (k == 0) {  // again, in the steps of all other chunks and of the backward
      stats.base = base_of(parts.y, n);
      scaled_chunk(row, count, A(x.factor), stats.base, parts.raw, parts.y);
    }
    parts.shift[c] = largest_of(parts.y, n);
    A dot;
    weight[c] = exponentials_and_dot(parts.y, n, parts.shift[c], e + k, &dot);
    if (parts.shift[c] > top) {  // Σ e·y relative to the largest so far
      own *= exp2_of(top - parts.shift[c]);
      top = parts.shift[c];
    }
    own += dot * exp2_of(parts.shift[c] - top);
    if (x.targets) {
      const A* target = target_chunk(x, b, k, count, parts.target);
      for (int64_t i = count; i < n; ++i) parts.y[i] = 0;  // no 0·∞ beyond the end
      stats.mass += sum_of(target, n);
      cross += dot_of(target, parts.y, n);
    }
  }
  stats.log_sum = chunk_weights(parts.shift, weight, chunks_of(x.prototypes), top);
  stats.entropy = (stats.log_sum - own * exp2_of(top - stats.log_sum)) * A(kLn2);
  *cross_entropy = x.targets ? (stats.mass * stats.log_sum - cross) * A(kLn2) : A(0);
  return stats;
}

template <typename T>
void forward(const Parallel& parallel, const AssignedRows& x, Accumulator<T>* scratch, Accumulator<T>* sums,
             Accumulator<T>* cross_entropy, Accumulator<T>* entropy, AssignmentStats<Accumulator<T>>* stats) {
  using A = Accumulator<T>;
  const int64_t padded = padded_columns(x.prototypes), chunks = chunks_of(x.prototypes);
  auto piece = [&](int64_t p) {
    const Parts<A> parts(x, scratch + p * assignment_scratch(x.prototypes));
    A* sum = sums + p * padded;
    for (int64_t k = 0; k < padded; ++k) sum[k] = 0;
    for (int64_t k = 0; k < kSummedRows * padded; ++k) parts.e[k] = 0;  // what lies beyond a row's last vector
    const int64_t end = (p + 1) * x.rows / x.pieces;
    for (int64_t first = p * x.rows / x.pieces; first < end; first += kSummedRows) {
      const int64_t rows = end - first < kSummedRows ? end - first : kSummedRows;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t b = first + r;
        A* weight = parts.weight + r * chunks;
        stats[b] = row_softmax<T>(x, b, parts, parts.e + r * padded, weight, &cross_entropy[b]);
        entropy[b] = stats[b].entropy;
        if (!x.weights) continue;
        const A of_row = static_cast<const A*>(x.weights)[b];
        for (int64_t c = 0; c < chunks; ++c) weight[c] *= of_row;
      }
      add_rows(rows, parts.e, padded, parts.weight, chunks, sum);
    }
  };
  parallel_each(parallel, x.pieces, piece);
}

template <typename T>
void backward(const Parallel& parallel, const AssignedRows& x, Accumulator<T>* scratch,
              const AssignmentGrads<Accumulator<T>>& grads, const AssignmentStats<Accumulator<T>>* stats, T* dlogits) {
  using A = Accumulator<T>;
  int64_t next;
  each_task(parallel, x.rows, &next, [&](int64_t worker, int64_t b) {
    const Parts<A> parts(x, scratch + worker * assignment_scratch(x.prototypes));
    const AssignmentStats<A>& of = stats[b];
    const T* row = row_of<T>(x, b);
    const auto each_chunk = [&](auto task) {  // task(first column, columns)
      for (int64_t k = 0; k < x.prototypes; k += kLogitChunk) {
        task(k, x.prototypes - k < kLogitChunk ? x.prototypes - k : kLogitChunk);
      }
    };
    A dot = 0;  // <p, v>
    each_chunk([&](int64_t k, int64_t count) {
      A* p = parts.e + k;
      const int64_t n = scaled_chunk(row + k, count, A(x.factor), of.base, parts.raw, p);
      exponentials_of(p, n, of.log_sum);
      if (grads.sums) dot += dot_of(p, grads.sums + k, n);
    });
    const bool targets = x.targets && grads.cross_entropy;
    const A g = targets ? grads.cross_entropy[b] : A(0), h = grads.entropy ? grads.entropy[b] : A(0);
    const A w = !grads.sums ? A(0) : x.weights ? static_cast<const A*>(x.weights)[b] : A(1);
    const auto gradient = AssignmentGradient<A>::of(of, g, h, w, dot, A(x.factor * kLn2));
    each_chunk([&](int64_t k, int64_t count) {
      if (grads.entropy) scaled_chunk(row + k, count, A(x.factor), of.base, parts.raw, parts.y);
      const A* target = targets ? target_chunk(x, b, k, count, parts.target) : nullptr;
      const vec<A> least = broadcast(A(kLeastLogarithm)), nothing = {};
      for (int64_t i = 0; i < count; i += kLanes<A>) {
        const vec<A> log_p = grads.entropy ? at_least<A>(load(parts.y + i) - of.log_sum, least) : nothing;
        const vec<A> v = grads.sums ? load(grads.sums + k + i) : nothing, t = targets ? load(target + i) : nothing;
        store(parts.y + i, AssignmentGradient<A>::at(gradient, load(parts.e + k + i), log_p, v, t));
      }
      T* __restrict__ out = dlogits + b * x.prototypes + k;
      for (int64_t i = 0; i < count; ++i) narrow(parts.y[i], &out[i]);
    });
  });
}

}  // namespace

#define SSLFAST_ASSIGNMENT_DEFINE(T)                                                                                   \
  void assignment_forward(const Parallel& parallel, const AssignedRows& x, Accumulator<T>* scratch,                    \
                          Accumulator<T>* sums, Accumulator<T>* cross_entropy, Accumulator<T>* entropy,                \
                          AssignmentStats<Accumulator<T>>* stats, const T*) {                                          \
    forward<T>(parallel, x, scratch, sums, cross_entropy, entropy, stats);                                             \
  }                                                                                                                    \
  void assignment_backward(const Parallel& parallel, const AssignedRows& x, Accumulator<T>* scratch,                   \
                           const AssignmentGrads<Accumulator<T>>& grads, const AssignmentStats<Accumulator<T>>* stats, \
                           T* dlogits) {                                                                               \
    backward<T>(parallel, x, scratch, grads, stats, dlogits);                                                          \
  }
SSLFAST_EACH(SSLFAST_ASSIGNMENT_DEFINE, float, double, bf16, fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <cstring>
#include <tuple>

#include "checks/mean_assignment.h"
#include "cpu/engine/huge_pages.h"

namespace sslfast {
namespace {

// Checked arguments, and what they point into.
struct Arguments {
  Tensor logits;
  std::optional<Tensor> targets, weights;
  AssignedRows x;

  Arguments(const Tensor& given, const std::optional<Tensor>& targets_any, const std::optional<Tensor>& weights_any,
            double temperature, const std::optional<Tensor>& rows)
      : logits((check_mean_assignment(given, targets_any, weights_any, temperature, rows), as_contiguous(given))) {
    if (targets_any) targets = as_contiguous(*targets_any);
    if (weights_any) weights = as_contiguous(*weights_any);
    x = {logits.size(0),
         logits.size(0),
         logits.size(1),
         targets ? targets->size(0) : 1,
         1,
         kLog2E / temperature,
         logits.const_data_ptr(),
         targets ? targets->const_data_ptr() : nullptr,
         weights ? weights->const_data_ptr() : nullptr};
    if (rows) x.rows = std::clamp<int64_t>(*const_data<int64_t>(*rows), 0, x.batch);
    x.pieces = std::max<int64_t>(1, std::min(torch_parallel().threads, x.rows / kSummedRows));
  }

  Tensor scratch(int64_t workers) const {
    return allocate(logits, {workers, assignment_scratch(x.prototypes)}, accumulator_type(logits));
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mean_assignment_cpu(const Tensor& logits,
                                                               const std::optional<Tensor>& targets,
                                                               const std::optional<Tensor>& weights, double temperature,
                                                               const std::optional<Tensor>& rows) {
  const Arguments arguments(logits, targets, weights, temperature, rows);
  const AssignedRows& x = arguments.x;
  const ScalarType type = accumulator_type(logits);
  const int64_t padded = padded_columns(x.prototypes);
  Tensor sums = allocate(logits, {x.prototypes}, type), parts = allocate(logits, {x.pieces, padded}, type);
  Tensor cross_entropy = allocate(logits, {x.batch}, type), entropy = allocate(logits, {x.batch}, type);
  Tensor stats = allocate(logits, {x.batch, kAssignmentStats}, type), scratch = arguments.scratch(x.pieces);
  dispatch_float(logits, "logits", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    auto* of_row = static_cast<AssignmentStats<A>*>(stats.mutable_data_ptr());
    for (Tensor* out : {&cross_entropy, &entropy}) {
      std::memset(mutable_data<A>(*out) + x.rows, 0, sizeof(A) * (x.batch - x.rows));
    }
    std::memset(of_row + x.rows, 0, sizeof(*of_row) * (x.batch - x.rows));
    SSLFAST_CALL(assignment_forward, torch_parallel(), x, mutable_data<A>(scratch), mutable_data<A>(parts),
                 mutable_data<A>(cross_entropy), mutable_data<A>(entropy), of_row, static_cast<const T*>(nullptr));
    const A* from = const_data<A>(parts);
    A* to = mutable_data<A>(sums);
    for (int64_t k = 0; k < x.prototypes; ++k) to[k] = from[k];
    for (int64_t p = 1; p < x.pieces; ++p) {
      for (int64_t k = 0; k < x.prototypes; ++k) to[k] += from[p * padded + k];
    }
  });
  return {sums, cross_entropy, entropy, stats};
}

Tensor mean_assignment_backward_cpu(const std::optional<Tensor>& grad_sums,
                                    const std::optional<Tensor>& grad_cross_entropy,
                                    const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                                    const std::optional<Tensor>& targets, const std::optional<Tensor>& weights,
                                    const Tensor& stats_any, double temperature, const std::optional<Tensor>& rows) {
  const Arguments arguments(logits, targets, weights, temperature, rows);
  const AssignedRows& x = arguments.x;
  check_assignment_gradients(grad_sums, grad_cross_entropy, grad_entropy, stats_any, logits);
  const Tensor stats = as_contiguous(stats_any);
  Tensor out = allocate(logits, {x.batch, x.prototypes});
  Tensor padded = allocate(logits, {grad_sums ? padded_columns(x.prototypes) : 0}, accumulator_type(logits));
  Tensor scratch = arguments.scratch(std::max<int64_t>(1, std::min(torch_parallel().threads, x.rows)));
  std::optional<Tensor> of_sums, of_cross, of_entropy;
  if (grad_sums) of_sums = as_contiguous(*grad_sums);
  if (grad_cross_entropy) of_cross = as_contiguous(*grad_cross_entropy);
  if (grad_entropy) of_entropy = as_contiguous(*grad_entropy);
  dispatch_float(logits, "logits", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    A* v = mutable_data<A>(padded);
    if (of_sums) {
      std::memcpy(v, const_data<A>(*of_sums), sizeof(A) * x.prototypes);
      std::memset(v + x.prototypes, 0, sizeof(A) * (padded.numel() - x.prototypes));
    }
    T* data = mutable_data<T>(out);
    const int64_t counted = x.rows * x.prototypes;
    advise_huge_pages(data, out.numel() * static_cast<int64_t>(sizeof(T)));
    std::memset(data + counted, 0, sizeof(T) * (out.numel() - counted));
    const AssignmentGrads<A> grads = {of_sums ? v : nullptr, of_cross ? const_data<A>(*of_cross) : nullptr,
                                      of_entropy ? const_data<A>(*of_entropy) : nullptr};
    SSLFAST_CALL(assignment_backward, torch_parallel(), x, mutable_data<A>(scratch), grads,
                 static_cast<const AssignmentStats<A>*>(stats.const_data_ptr()), data);
  });
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, mean_assignment, mean_assignment_backward)
#endif  // SSLFAST_CPU_DISPATCH
