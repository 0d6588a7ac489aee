// The mean cosine of matching rows on the CPU: forward and backward each read every row once.
#include "common/negative_cosine.h"

#include "cpu/engine/levels.h"
#include "cpu/engine/row_sums.h"

namespace sslfast {

// Rows of one call; `eps` in double, narrowed to the accumulator by the kernel. All row-major without gaps.
struct CosineRows {
  int64_t rows;      // N
  int64_t features;  // D
  double eps;
  int64_t rows_per_task;
};

}  // namespace sslfast

// `saved` [N, 3]; of the gradients, a null pointer is one that is not wanted, and `g` their factor.
#define SSLFAST_COSINE_SIGNATURES(T)                                                                              \
  void negative_cosine_forward(const ::sslfast::Parallel&, const ::sslfast::CosineRows&, const T* p, const T* z,  \
                               ::sslfast::Accumulator<T>* saved);                                                 \
  void negative_cosine_backward(const ::sslfast::Parallel&, const ::sslfast::CosineRows&, const T* p, const T* z, \
                                const ::sslfast::Accumulator<T>* saved, ::sslfast::Accumulator<T> g, T* dp, T* dz)
SSLFAST_DECLARE(SSLFAST_COSINE_SIGNATURES(float))
SSLFAST_DECLARE(SSLFAST_COSINE_SIGNATURES(double))
SSLFAST_DECLARE(SSLFAST_COSINE_SIGNATURES(bf16))
SSLFAST_DECLARE(SSLFAST_COSINE_SIGNATURES(fp16))

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
RowProducts<Accumulator<T>> products(const T* __restrict__ p, const T* __restrict__ z, int64_t features) {
  using A = Accumulator<T>;
  A pp[kSumLanes] = {}, zz[kSumLanes] = {}, pz[kSumLanes] = {};
  const auto add = [&](int l, int64_t d) __attribute__((always_inline)) {
    const auto sum = add_products(RowProducts<A>{pp[l], zz[l], pz[l]}, A(widen(p[d])), A(widen(z[d])));
    pp[l] = sum.pp;
    zz[l] = sum.zz;
    pz[l] = sum.pz;
  };
  int64_t d = 0;
  for (; d + kSumLanes <= features; d += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) add(l, d + l);
  }
  for (int l = 0; d + l < features; ++l) add(l, d + l);
  return {sum_of_lanes(pp), sum_of_lanes(zz), sum_of_lanes(pz)};
}

template <typename F>
void each_row(const Parallel& parallel, const CosineRows& size, F row) {
  const int64_t tasks = (size.rows + size.rows_per_task - 1) / size.rows_per_task;
  auto task = [&](int64_t t) {
    const int64_t begin = t * size.rows_per_task;
    const int64_t end = begin + size.rows_per_task < size.rows ? begin + size.rows_per_task : size.rows;
    for (int64_t i = begin; i < end; ++i) row(i);
  };
  parallel_each(parallel, tasks, task);
}

template <typename T>
void forward(const Parallel& parallel, const CosineRows& size, const T* p, const T* z, Accumulator<T>* saved) {
  using A = Accumulator<T>;
  each_row(parallel, size, [=, eps = A(size.eps), features = size.features](int64_t i) {
    const Cosine<A> c = cosine_of(products(p + i * features, z + i * features, features), eps);
    saved[3 * i] = c.inv_p;
    saved[3 * i + 1] = c.inv_z;
    saved[3 * i + 2] = c.value;
  });
}

template <typename T>
void gradient_row(const T* __restrict__ x, const T* __restrict__ y, Accumulator<T> inv_x, Accumulator<T> inv_y,
                  Accumulator<T> weight, Accumulator<T> g, int64_t features, T* __restrict__ dx) {
  using A = Accumulator<T>;
  for (int64_t d = 0; d < features; ++d) {
    narrow(cosine_gradient(A(widen(x[d])), A(widen(y[d])), inv_x, inv_y, weight, g), &dx[d]);
  }
}

template <typename T>
void backward(const Parallel& parallel, const CosineRows& size, const T* p, const T* z, const Accumulator<T>* saved,
              Accumulator<T> g, T* dp, T* dz) {
  using A = Accumulator<T>;
  each_row(parallel, size, [=, eps = A(size.eps), features = size.features](int64_t i) {
    const A inv_p = saved[3 * i], inv_z = saved[3 * i + 1], value = saved[3 * i + 2];
    const int64_t at = i * features;
    if (dp != nullptr) gradient_row(p + at, z + at, inv_p, inv_z, pull(value, inv_p, eps), g, features, dp + at);
    if (dz != nullptr) gradient_row(z + at, p + at, inv_z, inv_p, pull(value, inv_z, eps), g, features, dz + at);
  });
}

}  // namespace

#define SSLFAST_COSINE_DEFINE(T)                                                                          \
  void negative_cosine_forward(const Parallel& parallel, const CosineRows& size, const T* p, const T* z,  \
                               Accumulator<T>* saved) {                                                   \
    forward(parallel, size, p, z, saved);                                                                 \
  }                                                                                                       \
  void negative_cosine_backward(const Parallel& parallel, const CosineRows& size, const T* p, const T* z, \
                                const Accumulator<T>* saved, Accumulator<T> g, T* dp, T* dz) {            \
    backward(parallel, size, p, z, saved, g, dp, dz);                                                     \
  }
SSLFAST_COSINE_DEFINE(float)
SSLFAST_COSINE_DEFINE(double)
SSLFAST_COSINE_DEFINE(bf16)
SSLFAST_COSINE_DEFINE(fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>

#include "checks/negative_cosine.h"

namespace sslfast {
namespace {

CosineRows rows_of(const CosineArguments& given, double eps) {
  // About 16k pairs of elements a task: enough to pay for waking a thread.
  return {given.rows, given.features, eps, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, given.features))};
}

std::tuple<Tensor, Tensor> negative_cosine_cpu(const Tensor& p_any, const Tensor& z_any, double eps, double factor,
                                               double offset) {
  const CosineArguments given(p_any, z_any);
  auto [loss, saved] = given.results();
  dispatch_float(given.p, "p", [&, &loss = loss, &saved = saved](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    A* rows = mutable_data<A>(saved);
    SSLFAST_CALL(negative_cosine_forward, torch_parallel(), rows_of(given, eps), const_data<T>(given.p),
                 const_data<T>(given.z), rows);
    double sum = 0;  // in their order, and in double: the same on any number of threads
    for (int64_t i = 0; i < given.rows; ++i) sum += rows[kSaved * i + 2];
    *mutable_data<A>(loss) = static_cast<A>(offset + factor * sum);
  });
  return {loss, saved};
}

std::tuple<Tensor, Tensor> negative_cosine_backward_cpu(const Tensor& grad, const Tensor& p_any, const Tensor& z_any,
                                                        const Tensor& saved_any, double eps, double factor, bool of_p,
                                                        bool of_z) {
  const CosineArguments given(p_any, z_any);
  given.check_saved(grad, saved_any);
  const Tensor saved = as_contiguous(saved_any);
  auto [dp, dz] = given.gradients(of_p, of_z);
  dispatch_float(given.p, "p", [&, &dp = dp, &dz = dz](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    SSLFAST_CALL(negative_cosine_backward, torch_parallel(), rows_of(given, eps), const_data<T>(given.p),
                 const_data<T>(given.z), const_data<A>(saved), static_cast<A>(factor) * *const_data<A>(grad),
                 of_p ? mutable_data<T>(dp) : nullptr, of_z ? mutable_data<T>(dz) : nullptr);
  });
  return {dp, dz};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("negative_cosine", TORCH_BOX(&sslfast::negative_cosine_cpu));
  m.impl("negative_cosine_backward", TORCH_BOX(&sslfast::negative_cosine_backward_cpu));
}
#endif  // SSLFAST_CPU_DISPATCH
