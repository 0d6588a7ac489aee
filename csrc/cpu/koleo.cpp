// KoLeo on the CPU: rows are normalised while they are packed, their neighbours found by tiles, and the distances taken
// from the packed rows. docs/nearest_neighbours.md. With x̂ = r·x, r_i = 1/max(‖x_i‖, eps) and the pairs ic → n:
//
//   u_ic = x̂_i − x̂_n + eps,   d_ic = ‖u_ic‖,   loss = −Σ log(d_ic + eps)/(m·count)
//   w_ic = −g/(m·count·(d_ic + eps)·d_ic)
//   dx̂_i = Σ_c w_ic u_ic − Σ_{n(jc) = i} w_jc u_jc,   dx_i = r_i·(dx̂_i − (dx̂_i·x̂_i) x̂_i)
//
// m²·D operations forward; backward O(m·count·D): x is read, and dx written, once.
#include "cpu/engine/neighbour_rows.h"
#include "cpu/engine/self_neighbours.h"

namespace sslfast {

// Float, or double for double rows; written by the forward and read by the backward.
struct KoLeoSaved {
  void *inv_norm, *distance;  // [m], [m][count]
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t koleo_workspace(const NeighbourInput& input, const Normalization& unit, int64_t threads))
// Fills `index` [m][count] and what is saved; returns the loss.
SSLFAST_DECLARE(double koleo_forward(const NeighbourInput& input, const Normalization& unit, const KoLeoSaved& saved,
                                     int64_t* index, void* workspace, const Parallel& parallel))
SSLFAST_DECLARE(int64_t koleo_backward_workspace(const NeighbourPairs& pairs, int64_t threads))
SSLFAST_DECLARE(void koleo_backward(const NeighbourPairs& pairs, const KoLeoSaved& saved, double grad, void* dx,
                                    void* workspace, const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct KoLeo {
  const NeighbourInput& input;
  const T eps;
  SelfNeighbours<T> search;
  T* similarity;  // [m][count]
  double* logs;   // [blocks]: sums

  KoLeo(const NeighbourInput& in, const Normalization& unit, int64_t threads, Arena& arena)
      : input(in), eps(static_cast<T>(unit.eps)), search(in, &unit, threads, arena) {
    similarity = arena.take<T>(in.m * in.count);
    logs = arena.take<double>(search.blocks.count);
  }

  const T* packed(int64_t row) const {
    const Blocks<T>& blocks = search.blocks;
    return search.panels + row / blocks.height * blocks.size + row % blocks.height * kColumns<T>;
  }

  // What the panels hold beyond d takes no part: eps is added to each component that there is.
  T distance(int64_t i, int64_t n) const {
    const int64_t step = search.blocks.height * kColumns<T>;
    const T *x = packed(i), *y = packed(n);
    vec<T> squares[kVectors] = {};
    int64_t left = input.d;
    for (; left >= kColumns<T>; left -= kColumns<T>, x += step, y += step)
      for (int v = 0; v < kVectors; ++v) {
        const vec<T> u = load(x + v * kLanes<T>) - load(y + v * kLanes<T>) + eps;
        squares[v] += u * u;
      }
    T sum = sum_lanes<T>(squares[0] + squares[1]);
    for (int64_t c = 0; c < left; ++c) {
      const T u = x[c] - y[c] + eps;
      sum += u * u;
    }
    return static_cast<T>(__builtin_sqrt(sum));
  }

  double forward(const KoLeoSaved& saved, int64_t* index, const Parallel& parallel) {
    search.run({input.count, similarity, index}, parallel);
    T* const distances = static_cast<T*>(saved.distance);
    auto of_block = [&](int64_t b) {
      double sum = 0;
      const int64_t begin = search.blocks.first(b), end = begin + search.blocks.length(b);
      for (int64_t at = begin * input.count; at < end * input.count; ++at) {
        // A row without a neighbour: all similarities are −∞, as those of infinite rows can be.
        const T d = index[at] < 0 ? static_cast<T>(__builtin_nan("")) : distance(at / input.count, index[at]);
        distances[at] = d;
        sum += __builtin_log(static_cast<double>(d + eps));
      }
      logs[b] = sum;
    };
    parallel_each(parallel, search.blocks.count, of_block);
    double sum = 0;
    for (int64_t b = 0; b < search.blocks.count; ++b) sum += logs[b];
    return -sum / (static_cast<double>(input.m) * static_cast<double>(input.count));
  }
};

template <typename T>
void backward(const NeighbourPairs& pairs, const KoLeoSaved& saved, double grad, void* dx, void* memory,
              const Parallel& parallel) {
  const NeighbourRows<T> rows(pairs, parallel.threads, static_cast<char*>(memory));
  const T *inv_norm = static_cast<const T*>(saved.inv_norm), *distance = static_cast<const T*>(saved.distance);
  const T eps = static_cast<T>(pairs.eps);
  const T each = static_cast<T>(-grad / (static_cast<double>(pairs.m) * static_cast<double>(pairs.count)));
  auto weight = [&](int64_t at) { return distance[at] == 0 ? T(0) : each / (distance[at] + eps) / distance[at]; };
  auto read = [&](int64_t i, T* out) {
    read_row(pairs.q, i, pairs.d, out);
    for (int64_t x = 0; x < pairs.d; ++x) out[x] *= inv_norm[i];
  };
  rows.sort_pairs();
  rows.each_row(pairs.m, parallel, [&](int64_t i, T* scratch) {
    T* __restrict__ own = scratch, *other = scratch + rows.padded, * __restrict__ out = scratch + 2 * rows.padded;
    read(i, own);
    for (int64_t x = 0; x < pairs.d; ++x) out[x] = 0;
    for (int64_t at = i * pairs.count; at < (i + 1) * pairs.count; ++at) {
      if (pairs.index[at] < 0) continue;
      read(pairs.index[at], other);
      add_difference(weight(at), own, other, eps, pairs.d, out);
    }
    for (int64_t p = rows.starts[i]; p < rows.starts[i + 1]; ++p) {
      read(rows.pointing[p] / pairs.count, other);
      add_difference(weight(rows.pointing[p]), own, other, -eps, pairs.d, out);
    }
    const T removed = projection_weight(dot(out, own, rows.padded), inv_norm[i], eps);
    for (int64_t x = 0; x < pairs.d; ++x) out[x] = inv_norm[i] * (out[x] - removed * own[x]);
    write_row(out, dx, pairs.q.type, i, pairs.d);
  });
}

}  // namespace

int64_t koleo_workspace(const NeighbourInput& input, const Normalization& unit, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.q.type, [&](auto t) { KoLeo<decltype(t)>(input, unit, threads, arena); });
  return arena.bytes;
}

double koleo_forward(const NeighbourInput& input, const Normalization& unit, const KoLeoSaved& saved, int64_t* index,
                     void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  return with_accumulator(input.q.type, [&](auto t) {
    return KoLeo<decltype(t)>(input, unit, parallel.threads, arena).forward(saved, index, parallel);
  });
}

int64_t koleo_backward_workspace(const NeighbourPairs& pairs, int64_t threads) {
  return with_accumulator(pairs.q.type,
                          [&](auto t) { return NeighbourRows<decltype(t)>(pairs, threads, nullptr).bytes(); });
}

void koleo_backward(const NeighbourPairs& pairs, const KoLeoSaved& saved, double grad, void* dx, void* memory,
                    const Parallel& parallel) {
  with_accumulator(pairs.q.type, [&](auto t) { backward<decltype(t)>(pairs, saved, grad, dx, memory, parallel); });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> koleo(const Tensor& x_any, int64_t topk, double eps) {
  const Tensor x = as_contiguous(x_any);
  SSLFAST_CHECK(x.dim() == 2 && x.size(1) > 0, "x must be two-dimensional with features");
  SSLFAST_CHECK(topk > 0 && topk < x.size(0), "topk must be from 1 to the number of other rows, got ", topk);
  const Rows rows{x.const_data_ptr(), element_type(x, "x")};
  const int64_t m = x.size(0);
  const ScalarType kind = accumulator_type(x);
  Tensor loss = allocate(x, {}, kind), index = allocate(x, {m, topk}, ScalarType::Long);
  Tensor inv_norm = allocate(x, {m}, kind), distance = allocate(x, {m, topk}, kind);
  const NeighbourInput input{rows, {nullptr, rows.type}, m, m, x.size(1), nullptr, nullptr, nullptr, topk};
  const Normalization unit{eps, inv_norm.mutable_data_ptr()};
  const KoLeoSaved saved{unit.inv_norm, distance.mutable_data_ptr()};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(x, SSLFAST_CALL(koleo_workspace, input, unit, parallel.threads));
  set_scalar(loss,
             SSLFAST_CALL(koleo_forward, input, unit, saved, mutable_data<int64_t>(index), aligned(memory), parallel));
  return {loss, index, inv_norm, distance};
}

Tensor koleo_backward(const Tensor& grad, const Tensor& x_any, const Tensor& index, const Tensor& inv_norm,
                      const Tensor& distance, double eps) {
  const Tensor x = as_contiguous(x_any);
  SSLFAST_CHECK(x.dim() == 2 && index.dim() == 2, "x and index must be two-dimensional");
  const ScalarType kind = accumulator_type(x);
  check_tensor(grad, "grad_loss", {}, kind, x);
  check_tensor(index, "index", {x.size(0), index.size(1)}, ScalarType::Long, x);
  check_tensor(inv_norm, "inv_norm", {x.size(0)}, kind, x);
  check_tensor(distance, "distance", {x.size(0), index.size(1)}, kind, x);
  SSLFAST_CHECK(index.is_contiguous() && inv_norm.is_contiguous() && distance.is_contiguous(),
                "index, inv_norm and distance must be as koleo returned them");
  const Rows rows{x.const_data_ptr(), element_type(x, "x")};
  const int64_t* columns = const_data<int64_t>(index);
  const NeighbourPairs pairs{rows, rows, x.size(0), x.size(0), x.size(1), index.size(1), columns, eps};
  for (int64_t at = 0; at < index.numel(); ++at)
    SSLFAST_CHECK(columns[at] >= -1 && columns[at] < pairs.n, "index must be as koleo returned it");
  Tensor dx = allocate(x, {pairs.m, pairs.d});
  const KoLeoSaved saved{read_only(inv_norm), read_only(distance)};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(x, SSLFAST_CALL(koleo_backward_workspace, pairs, parallel.threads));
  SSLFAST_CALL(koleo_backward, pairs, saved, scalar(grad), dx.mutable_data_ptr(), aligned(memory), parallel);
  return dx;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("koleo", TORCH_BOX(&sslfast::koleo));
  m.impl("koleo_backward", TORCH_BOX(&sslfast::koleo_backward));
}
#endif  // SSLFAST_CPU_DISPATCH
