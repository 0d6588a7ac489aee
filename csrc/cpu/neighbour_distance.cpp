// Distances of rows to their neighbours on the CPU, and the gradients of distances and of similarities, which reach
// both ends of a pair. With w_ic = g_ic for similarities q_i·k_n(ic) and u_ic = q_i − k_n(ic) + eps:
//
//   distance_ic = ‖u_ic‖       dq_i = Σ_c g_ic u_ic / distance_ic      dk_j = −Σ_{n(ic) = j} g_ic u_ic / distance_ic
//   similarity                 dq_i = Σ_c g_ic k_n(ic)                 dk_j = Σ_{n(ic) = j} g_ic q_i
//
// A row of a gradient is written once, by the task that owns it: pairs are sorted by the column they point at, in their
// own order, so that its sum is the same in every run. O(M·count·D) both ways.
#include "cpu/engine/neighbour_rows.h"

namespace sslfast {

// Float, or double for double rows; `distance` is null for gradients of similarities.
struct NeighbourGiven {
  const void *grad, *distance;  // [m][count]
};

// Of the dtype of the rows; null where none is wanted. Rows against themselves: the sum of both in dq.
struct NeighbourGradient {
  void *dq, *dk;
  bool same_rows;
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t neighbour_workspace(const NeighbourPairs& pairs, int64_t threads))
SSLFAST_DECLARE(void neighbour_distance(const NeighbourPairs& pairs, void* distance, void* workspace,
                                        const Parallel& parallel))
SSLFAST_DECLARE(void neighbour_gradient(const NeighbourPairs& pairs, const NeighbourGiven& given,
                                        const NeighbourGradient& gradient, void* workspace, const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct Neighbours : NeighbourRows<T> {
  using NeighbourRows<T>::pairs, NeighbourRows<T>::padded;
  using NeighbourRows<T>::NeighbourRows;

  void distances(T* distance, const Parallel& parallel) const {
    const T eps = static_cast<T>(pairs.eps);
    this->each_row(pairs.m, parallel, [&](int64_t i, T* rows) {
      T* __restrict__ q = rows, * __restrict__ k = rows + padded, * __restrict__ u = rows + 2 * padded;
      read_row(pairs.q, i, pairs.d, q);
      for (int64_t c = i * pairs.count; c < (i + 1) * pairs.count; ++c) {
        if (pairs.index[c] < 0) {
          distance[c] = static_cast<T>(__builtin_inf());
          continue;
        }
        read_row(pairs.k, pairs.index[c], pairs.d, k);
        for (int64_t x = 0; x < pairs.d; ++x) u[x] = q[x] - k[x] + eps;
        distance[c] = static_cast<T>(__builtin_sqrt(dot(u, u, padded)));
      }
    });
  }

  void gradients(const NeighbourGiven& given, const NeighbourGradient& gradient, const Parallel& parallel) const {
    const T *grad = static_cast<const T*>(given.grad), *distance = static_cast<const T*>(given.distance);
    const bool far = distance != nullptr;
    const T eps = static_cast<T>(pairs.eps);
    auto add = [&](T w, const T* own, const T* other, T shift, T* out) {
      far ? add_difference(w, own, other, shift, pairs.d, out) : add_row(w, other, pairs.d, out);
    };
    auto weight = [&](int64_t c) { return !far ? grad[c] : distance[c] == 0 ? T(0) : grad[c] / distance[c]; };
    auto of_row = [&](int64_t i, const T* own, T* other, T* out) {
      for (int64_t c = i * pairs.count; c < (i + 1) * pairs.count; ++c) {
        if (pairs.index[c] < 0) continue;
        read_row(pairs.k, pairs.index[c], pairs.d, other);
        add(weight(c), own, other, eps, out);
      }
    };
    auto of_column = [&](int64_t j, const T* own, T* other, T* out) {
      for (int64_t at = this->starts[j]; at < this->starts[j + 1]; ++at) {
        read_row(pairs.q, this->pointing[at] / pairs.count, pairs.d, other);
        add(weight(this->pointing[at]), own, other, -eps, out);
      }
    };
    if (gradient.dk != nullptr || gradient.same_rows) this->sort_pairs();
    for (int side = 0; side < 2; ++side) {
      void* const target = side == 0 ? gradient.dq : gradient.dk;
      if (target == nullptr) continue;
      const Rows& rows = side == 0 ? pairs.q : pairs.k;
      this->each_row(side == 0 ? pairs.m : pairs.n, parallel, [&](int64_t i, T* memory) {
        T *own = memory, *other = memory + padded, *out = memory + 2 * padded;
        read_row(rows, i, pairs.d, own);
        for (int64_t x = 0; x < pairs.d; ++x) out[x] = 0;
        if (side == 0) of_row(i, own, other, out);
        if (side == 1 || gradient.same_rows) of_column(i, own, other, out);
        write_row(out, target, rows.type, i, pairs.d);
      });
    }
  }
};

}  // namespace

int64_t neighbour_workspace(const NeighbourPairs& pairs, int64_t threads) {
  return with_accumulator(pairs.q.type,
                          [&](auto t) { return Neighbours<decltype(t)>(pairs, threads, nullptr).bytes(); });
}

void neighbour_distance(const NeighbourPairs& pairs, void* distance, void* memory, const Parallel& parallel) {
  with_accumulator(pairs.q.type, [&](auto t) {
    using T = decltype(t);
    Neighbours<T>(pairs, parallel.threads, static_cast<char*>(memory)).distances(static_cast<T*>(distance), parallel);
  });
}

void neighbour_gradient(const NeighbourPairs& pairs, const NeighbourGiven& given, const NeighbourGradient& gradient,
                        void* memory, const Parallel& parallel) {
  with_accumulator(pairs.q.type, [&](auto t) {
    Neighbours<decltype(t)>(pairs, parallel.threads, static_cast<char*>(memory)).gradients(given, gradient, parallel);
  });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

// Checked arguments, and what they point into.
struct NeighbourArguments {
  Tensor q, k, index;
  ScalarType kind;  // the accumulator's dtype
  NeighbourPairs pairs;

  NeighbourArguments(const Tensor& q_any, const MaybeTensor& k_any, const Tensor& index_any, double eps)
      : q(as_contiguous(q_any)),
        k(k_any.has_value() ? as_contiguous(*k_any) : q),
        index(as_contiguous(index_any)),
        kind(accumulator_type(q)) {
    SSLFAST_CHECK(q.dim() == 2 && k.dim() == 2 && q.size(1) == k.size(1) && q.scalar_type() == k.scalar_type(),
                  "q and k must be two-dimensional with the same width and dtype");
    SSLFAST_CHECK(index.dim() == 2, "index must be two-dimensional");
    check_tensor(index, "index", {q.size(0), index.size(1)}, ScalarType::Long, q);
    const ElementType type = element_type(q, "q");
    const int64_t* columns = const_data<int64_t>(index);
    pairs = {{q.const_data_ptr(), type},
             {k.const_data_ptr(), type},
             q.size(0),
             k.size(0),
             q.size(1),
             index.size(1),
             columns,
             eps};
    for (int64_t c = 0; c < index.numel(); ++c)
      SSLFAST_CHECK(columns[c] >= -1 && columns[c] < pairs.n, "index must be from -1 to ", pairs.n - 1, ", got ",
                    columns[c]);
  }

  Tensor workspace(const Parallel& parallel) const {
    return scratch(q, SSLFAST_CALL(neighbour_workspace, pairs, parallel.threads));
  }
};

Tensor neighbour_distance(const Tensor& q, const MaybeTensor& k, const Tensor& index, double eps) {
  const NeighbourArguments given(q, k, index, eps);
  Tensor distance = allocate(given.q, {given.pairs.m, given.pairs.count}, given.kind);
  const Parallel parallel = torch_parallel();
  Tensor memory = given.workspace(parallel);
  SSLFAST_CALL(neighbour_distance, given.pairs, distance.mutable_data_ptr(), aligned(memory), parallel);
  return distance;
}

std::tuple<Tensor, Tensor> neighbour_gradient(const Tensor& grad_any, const MaybeTensor& distance_any,
                                              const Tensor& index, const Tensor& q, const MaybeTensor& k, double eps,
                                              bool need_q, bool need_k) {
  const NeighbourArguments given(q, k, index, eps);
  const NeighbourPairs& pairs = given.pairs;
  check_tensor(grad_any, "grad", {pairs.m, pairs.count}, given.kind, given.q);
  if (distance_any.has_value()) check_tensor(*distance_any, "distance", {pairs.m, pairs.count}, given.kind, given.q);
  const Tensor grad = as_contiguous(grad_any);
  const MaybeTensor distance = contiguous_or_none(distance_any);
  const bool same_rows = !k.has_value();
  Tensor dq = need_q ? allocate(given.q, {pairs.m, pairs.d}) : allocate(given.q, {0});
  Tensor dk = need_k && !same_rows ? allocate(given.q, {pairs.n, pairs.d}) : allocate(given.q, {0});
  const NeighbourGradient gradient{data_or_null(dq), data_or_null(dk), same_rows};
  const Parallel parallel = torch_parallel();
  Tensor memory = given.workspace(parallel);
  SSLFAST_CALL(neighbour_gradient, pairs, {grad.const_data_ptr(), data_or_null(distance)}, gradient, aligned(memory),
               parallel);
  return {dq, dk};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("neighbour_distance", TORCH_BOX(&sslfast::neighbour_distance));
  m.impl("neighbour_gradient", TORCH_BOX(&sslfast::neighbour_gradient));
}
#endif  // SSLFAST_CPU_DISPATCH
