// Sinkhorn–Knopp in the log domain on the CPU. The assignments after n iterations are softmax_k(x/τ + f), so all that
// is kept is f [K]; each iteration reads the logits once and takes one exponential of each:
//     f ← −log Σ_b exp(x_bk/τ)                    the first: column maxima and sums
//     f ← f − log Σ_b softmax_k(x_b/τ + f)_k      the others: a row's softmax, added to the column sums
#include "cpu/sinkhorn.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

// Calls task(position, piece, first row, end) for every piece of the rows of every position.
template <typename F>
void each_piece(const Parallel& parallel, const SinkhornRows& size, F&& task) {
  auto body = [&](int64_t i) {
    const int64_t piece = i / size.positions, position = i % size.positions;
    task(position, piece, piece * size.rows / size.pieces, (piece + 1) * size.rows / size.pieces);
  };
  parallel_each(parallel, size.pieces * size.positions, body);
}

template <typename T>
const T* row_of(const SinkhornRows& size, const T* x, int64_t b, int64_t position) {
  return x + (b * size.positions + position) * size.prototypes;
}

// Rows b … b + rows of one chunk of columns into the running maxima and the sums relative to them.
template <typename A>
void add_block(const A* const* rows, int64_t count, int64_t columns, A factor, A* __restrict__ largest,
               A* __restrict__ sums) {
  for (int64_t k = 0; k < columns; k += kLanes<A>) {
    const vec<A> before = load(largest + k);
    vec<A> top = before;
    for (int64_t r = 0; r < count; ++r) top = larger<A>(top, load(rows[r] + k) * factor);
    top = top != top ? before : top;  // a NaN shows in the sum
    vec<A> sum = load(sums + k) * exp2v<true>(before - top);
    for (int64_t r = 0; r < count; ++r) sum += exp2v<true>(load(rows[r] + k) * factor - top);
    store(largest + k, top);
    store(sums + k, sum);
  }
}

template <typename T>
void column_largest(const Parallel& parallel, const SinkhornRows& size, const T* x, Accumulator<T>* largest,
                    Accumulator<T>* sums, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t padded = padded_columns(size.prototypes), each = sinkhorn_scratch(size.prototypes);
  each_piece(parallel, size, [&](int64_t position, int64_t piece, int64_t begin, int64_t end) {
    const int64_t slot = piece * size.positions + position;
    A *top = largest + slot * padded, *sum = sums + slot * padded, *buffer = scratch + slot * each;
    for (int64_t k = 0; k < padded; ++k) top[k] = kLeast<A>, sum[k] = 0;
    for (int64_t b = begin; b < end; b += kSinkhornBlock) {
      const int64_t count = end - b < kSinkhornBlock ? end - b : kSinkhornBlock;
      for (int64_t k = 0; k < size.prototypes; k += kSinkhornColumns) {
        const int64_t columns = size.prototypes - k < kSinkhornColumns ? size.prototypes - k : kSinkhornColumns;
        const A* rows[kSinkhornBlock];
        for (int64_t r = 0; r < count; ++r) {
          rows[r] = chunk_of(row_of(size, x, b + r, position) + k, columns, buffer + r * kSinkhornColumns);
        }
        add_block(rows, count, columns, A(size.factor), top + k, sum + k);
      }
    }
  });
}

// E[k] = 2^(z_k − shift of its chunk) for one row; shift[c], and the row's maximum and sum.
template <typename T, typename A = Accumulator<T>>
void row_exponentials(const SinkhornRows& size, const T* __restrict__ x, const A* __restrict__ bias,
                      A* __restrict__ out, A* __restrict__ shift, A* __restrict__ weight, A* __restrict__ buffer) {
  A top = kLeast<A>;
  for (int64_t k = 0, c = 0; k < size.prototypes; k += kLogitChunk, ++c) {
    const int64_t count = size.prototypes - k < kLogitChunk ? size.prototypes - k : kLogitChunk;
    const A* row = chunk_of(x + k, count, buffer);
    int64_t i = 0;
    for (; i < count; i += kLanes<A>) store(out + k + i, load(row + i) * A(size.factor) + load(bias + k + i));
    shift[c] = largest_of(out + k, i);
    weight[c] = exponentials_of(out + k, i, shift[c]);
    top = shift[c] > top ? shift[c] : top;
  }
  chunk_weights(shift, weight, chunks_of(size.prototypes), top);
}

template <typename T>
void column_mass(const Parallel& parallel, const SinkhornRows& size, const T* x, const Accumulator<T>* bias,
                 Accumulator<T>* sums, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t padded = padded_columns(size.prototypes), each = sinkhorn_scratch(size.prototypes);
  const int64_t chunks = chunks_of(size.prototypes);
  each_piece(parallel, size, [&](int64_t position, int64_t piece, int64_t begin, int64_t end) {
    const int64_t slot = piece * size.positions + position;
    A *sum = sums + slot * padded, *e = scratch + slot * each, *weight = e + kSummedRows * padded;
    A *shift = weight + kSummedRows * chunks, *buffer = shift + kSummedRows * chunks;
    for (int64_t k = 0; k < padded; ++k) sum[k] = 0;
    for (int64_t k = 0; k < kSummedRows * padded; ++k) e[k] = 0;  // what lies beyond a row's last vector
    for (int64_t b = begin; b < end; b += kSummedRows) {
      const int64_t rows = end - b < kSummedRows ? end - b : kSummedRows;
      for (int64_t r = 0; r < rows; ++r) {
        row_exponentials(size, row_of(size, x, b + r, position), bias + position * padded, e + r * padded, shift,
                         weight + r * chunks, buffer);
      }
      add_rows(rows, e, padded, weight, chunks, sum);
    }
  });
}

template <typename T>
void assign(const Parallel& parallel, const SinkhornRows& size, const T* x, const Accumulator<T>* bias,
            Accumulator<T>* out, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const int64_t padded = padded_columns(size.prototypes), each = sinkhorn_scratch(size.prototypes);
  const int64_t chunks = chunks_of(size.prototypes);
  each_piece(parallel, size, [&](int64_t position, int64_t piece, int64_t begin, int64_t end) {
    A *spare = scratch + (piece * size.positions + position) * each, *weight = spare + padded, *shift = weight + chunks;
    for (int64_t b = begin; b < end; ++b) {
      A* row = out + (b * size.positions + position) * size.prototypes;
      A* e = size.prototypes % kLanes<A> == 0 ? row : spare;  // whole vectors stay within the row
      row_exponentials(size, row_of(size, x, b, position), bias + position * padded, e, shift, weight, shift + chunks);
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t last = (c + 1) * kLogitChunk < size.prototypes ? (c + 1) * kLogitChunk : size.prototypes;
        for (int64_t k = c * kLogitChunk; k < last; ++k) row[k] = e[k] * weight[c];
      }
    }
  });
}

}  // namespace

#define SSLFAST_SINKHORN_DEFINE(T)                                                                                 \
  void sinkhorn_largest(const Parallel& parallel, const SinkhornRows& size, const T* x, Accumulator<T>* largest,   \
                        Accumulator<T>* sums, Accumulator<T>* scratch) {                                           \
    column_largest(parallel, size, x, largest, sums, scratch);                                                     \
  }                                                                                                                \
  void sinkhorn_mass(const Parallel& parallel, const SinkhornRows& size, const T* x, const Accumulator<T>* bias,   \
                     Accumulator<T>* sums, Accumulator<T>* scratch) {                                              \
    column_mass(parallel, size, x, bias, sums, scratch);                                                           \
  }                                                                                                                \
  void sinkhorn_assign(const Parallel& parallel, const SinkhornRows& size, const T* x, const Accumulator<T>* bias, \
                       Accumulator<T>* out, Accumulator<T>* scratch) {                                             \
    assign(parallel, size, x, bias, out, scratch);                                                                 \
  }
SSLFAST_EACH(SSLFAST_SINKHORN_DEFINE, float, double, bf16, fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>

#include "checks/sinkhorn.h"
#include "cpu/engine/huge_pages.h"

namespace sslfast {
namespace {

// Checked arguments, and memory for the visits of one call.
struct Visits {
  Tensor x, bias, largest, sums, scratch;
  SinkhornRows size;
  int64_t padded;

  Visits(const Tensor& logits, double temperature, const std::optional<Tensor>& rows)
      : x(as_contiguous(logits)), bias(x), largest(x), sums(x), scratch(x) {
    check_sinkhorn(logits, temperature, rows);
    size = {x.size(0), x.size(0), x.size(1), x.size(2), kLog2E / temperature, 1};
    if (rows) size.rows = std::clamp<int64_t>(*const_data<int64_t>(*rows), 0, size.batch);
    padded = padded_columns(size.prototypes);
    const int64_t threads = torch_parallel().threads;
    const int64_t wanted = (threads + size.positions - 1) / std::max<int64_t>(size.positions, 1);
    size.pieces = std::max<int64_t>(1, std::min(wanted, size.rows / kSummedRows));
    const int64_t slots = size.pieces * size.positions;
    const ScalarType type = accumulator_type(x);
    bias = allocate(x, {size.positions, padded}, type);
    largest = allocate(x, {slots, padded}, type);
    sums = allocate(x, {slots, padded}, type);
    scratch = allocate(x, {slots, sinkhorn_scratch(size.prototypes)}, type);
  }

  template <typename A>
  void set_bias(const Tensor& given) {  // natural logarithms [S, K]
    const Tensor from = as_contiguous(given);
    const A* in = const_data<A>(from);
    A* out = mutable_data<A>(bias);
    for (int64_t i = 0; i < size.positions * padded; ++i) {
      const int64_t k = i % padded;
      out[i] = k < size.prototypes ? in[i / padded * size.prototypes + k] * A(kLog2E) : A(0);
    }
  }
  template <typename A>
  void clear_bias() {
    std::memset(mutable_data<A>(bias), 0, sizeof(A) * size.positions * padded);
  }

  // One visit: with the bias, or the first one of all without.
  template <typename T>
  void visit(bool first) {
    using A = Accumulator<T>;
    if (first) {
      SSLFAST_CALL(sinkhorn_largest, torch_parallel(), size, const_data<T>(x), mutable_data<A>(largest),
                   mutable_data<A>(sums), mutable_data<A>(scratch));
    } else {
      SSLFAST_CALL(sinkhorn_mass, torch_parallel(), size, const_data<T>(x), const_data<A>(bias), mutable_data<A>(sums),
                   mutable_data<A>(scratch));
    }
  }

  // Calls f(column, largest, sum) with the totals of every column of every position, over its pieces in their order.
  template <typename A, typename F>
  void each_column(bool first, F f) const {
    const A *top = const_data<A>(largest), *sum = const_data<A>(sums);
    const int64_t stride = size.positions * padded;
    constexpr int64_t kStretch = 4096;
    auto task = [&](int64_t t) {
      for (int64_t i = t * kStretch; i < std::min(stride, (t + 1) * kStretch); ++i) {
        if (i % padded >= size.prototypes) continue;
        A most = 0, total = 0;
        if (first) {
          most = top[i];
          for (int64_t p = 1; p < size.pieces; ++p) most = std::max(most, top[p * stride + i]);
        }
        for (int64_t p = 0; p < size.pieces; ++p) {
          const A part = sum[p * stride + i];
          total += first ? part * std::exp2(top[p * stride + i] - most) : part;
        }
        f(i, most, total);
      }
    };
    parallel_each(torch_parallel(), (stride + kStretch - 1) / kStretch, task);
  }

  // f ← f − log Σ. A prototype that no row reaches (Σ = 0) keeps its bias.
  template <typename A>
  void update(bool first) {
    A* f = mutable_data<A>(bias);
    each_column<A>(first, [=](int64_t i, A most, A total) {
      const A before = first ? A(0) : f[i];
      f[i] = total == 0 ? before : before - (most + std::log2(total));
    });
  }
};

Tensor sinkhorn_bias_cpu(const Tensor& logits, double temperature, int64_t iterations, bool row_start,
                         const std::optional<Tensor>& rows) {
  Visits visits(logits, temperature, rows);
  const SinkhornRows& size = visits.size;
  Tensor out = allocate(visits.x, {size.positions, size.prototypes}, accumulator_type(visits.x));
  dispatch_float(visits.x, "logits", [&](auto element) {
    using A = Accumulator<decltype(element)>;
    visits.template clear_bias<A>();
    for (int64_t i = 0; i < iterations; ++i) {
      const bool first = i == 0 && !row_start;
      visits.template visit<decltype(element)>(first);
      visits.template update<A>(first);
    }
    const A* f = const_data<A>(visits.bias);
    A* to = mutable_data<A>(out);
    for (int64_t s = 0; s < size.positions; ++s) {
      for (int64_t k = 0; k < size.prototypes; ++k) to[s * size.prototypes + k] = f[s * visits.padded + k] * A(kLn2);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor> sinkhorn_sums_cpu(const Tensor& logits, const std::optional<Tensor>& bias,
                                             double temperature, const std::optional<Tensor>& rows) {
  Visits visits(logits, temperature, rows);
  if (bias) check_sinkhorn_bias(*bias, logits);
  const SinkhornRows& size = visits.size;
  const ScalarType type = accumulator_type(visits.x);
  Tensor largest = allocate(visits.x, {size.positions, size.prototypes}, type);
  Tensor sums = allocate(visits.x, {size.positions, size.prototypes}, type);
  dispatch_float(visits.x, "logits", [&](auto element) {
    using A = Accumulator<decltype(element)>;
    if (bias) visits.template set_bias<A>(*bias);
    visits.template visit<decltype(element)>(!bias);
    A *top = mutable_data<A>(largest), *sum = mutable_data<A>(sums);
    visits.template each_column<A>(!bias, [&](int64_t i, A most, A total) {
      const int64_t at = i / visits.padded * size.prototypes + i % visits.padded;
      top[at] = most * A(kLn2);
      sum[at] = total;
    });
  });
  return {largest, sums};
}

Tensor sinkhorn_assign_cpu(const Tensor& logits, const Tensor& bias, double temperature,
                           const std::optional<Tensor>& rows) {
  Visits visits(logits, temperature, rows);
  check_sinkhorn_bias(bias, logits);
  const SinkhornRows& size = visits.size;
  Tensor out = allocate(visits.x, {size.batch, size.positions, size.prototypes}, accumulator_type(visits.x));
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  dispatch_float(visits.x, "logits", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    visits.template set_bias<A>(bias);
    A* to = mutable_data<A>(out);
    SSLFAST_CALL(sinkhorn_assign, torch_parallel(), size, const_data<T>(visits.x), const_data<A>(visits.bias), to,
                 mutable_data<A>(visits.scratch));
    const int64_t counted = size.rows * size.positions * size.prototypes;
    std::memset(to + counted, 0, sizeof(A) * (out.numel() - counted));
  });
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, sinkhorn_bias, sinkhorn_sums, sinkhorn_assign)
#endif  // SSLFAST_CPU_DISPATCH
