// Row-wise L2-normalisation on the CPU: each row is read from memory once, and once more from the cache.
#include "common/l2_normalize.h"

#include "cpu/engine/levels.h"
#include "cpu/engine/row_sums.h"

namespace sslfast {

// Rows of one call; `eps` in double, narrowed to the accumulator by the kernel. All row-major without gaps.
struct NormalizeRows {
  int64_t rows;      // M
  int64_t features;  // D
  double eps;
  int64_t rows_per_task;
};

}  // namespace sslfast

#define SSLFAST_L2_NORMALIZE_SIGNATURES(T)                                                                         \
  void l2_normalize_forward(const ::sslfast::Parallel&, const ::sslfast::NormalizeRows&, const T* x, T* y,         \
                            ::sslfast::Accumulator<T>* inv_norm);                                                  \
  void l2_normalize_backward(const ::sslfast::Parallel&, const ::sslfast::NormalizeRows&, const T* dy, const T* x, \
                             const ::sslfast::Accumulator<T>* inv_norm, T* dx);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_L2_NORMALIZE_SIGNATURES, float, double, bf16, fp16))

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
Accumulator<T> sum_of_squares(const T* __restrict__ x, int64_t features) {
  using A = Accumulator<T>;
  A lane[kSumLanes] = {};
  int64_t d = 0;
  for (; d + kSumLanes <= features; d += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) lane[l] = add_square(lane[l], A(widen(x[d + l])));
  }
  for (int l = 0; d + l < features; ++l) lane[l] = add_square(lane[l], A(widen(x[d + l])));
  return sum_of_lanes(lane);
}

template <typename T>
Accumulator<T> projection(const T* __restrict__ dy, const T* __restrict__ x, Accumulator<T> r, int64_t features) {
  using A = Accumulator<T>;
  A lane[kSumLanes] = {};
  int64_t d = 0;
  for (; d + kSumLanes <= features; d += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) lane[l] = add_projection(lane[l], A(widen(dy[d + l])), A(widen(x[d + l])), r);
  }
  for (int l = 0; d + l < features; ++l) lane[l] = add_projection(lane[l], A(widen(dy[d + l])), A(widen(x[d + l])), r);
  return sum_of_lanes(lane);
}

// Calls row(i) for every row, `rows_per_task` rows to a task.
template <typename F>
void each_row(const Parallel& parallel, const NormalizeRows& size, F row) {
  const int64_t tasks = (size.rows + size.rows_per_task - 1) / size.rows_per_task;
  auto task = [&](int64_t t) {
    const int64_t begin = t * size.rows_per_task;
    const int64_t end = begin + size.rows_per_task < size.rows ? begin + size.rows_per_task : size.rows;
    for (int64_t i = begin; i < end; ++i) row(i);
  };
  parallel_each(parallel, tasks, task);
}

template <typename T>
void forward(const Parallel& parallel, const NormalizeRows& size, const T* x, T* y, Accumulator<T>* inv_norm) {
  using A = Accumulator<T>;
  const int64_t features = size.features;
  each_row(parallel, size, [=, eps = A(size.eps)](int64_t i) {
    const T* __restrict__ x_row = x + i * features;
    T* __restrict__ y_row = y + i * features;
    const A r = inverse_norm(sum_of_squares(x_row, features), eps);
    inv_norm[i] = r;
    for (int64_t d = 0; d < features; ++d) narrow(normalized(A(widen(x_row[d])), r), &y_row[d]);
  });
}

template <typename T>
void backward(const Parallel& parallel, const NormalizeRows& size, const T* dy, const T* x,
              const Accumulator<T>* inv_norm, T* dx) {
  using A = Accumulator<T>;
  const int64_t features = size.features;
  each_row(parallel, size, [=, eps = A(size.eps)](int64_t i) {
    const T* __restrict__ dy_row = dy + i * features;
    const T* __restrict__ x_row = x + i * features;
    T* __restrict__ dx_row = dx + i * features;
    const A r = inv_norm[i];
    const A weight = projection_weight(projection(dy_row, x_row, r, features), r, eps);
    for (int64_t d = 0; d < features; ++d) {
      narrow(gradient(A(widen(dy_row[d])), A(widen(x_row[d])), r, weight), &dx_row[d]);
    }
  });
}

}  // namespace

#define SSLFAST_L2_NORMALIZE_DEFINE(T)                                                                     \
  void l2_normalize_forward(const Parallel& parallel, const NormalizeRows& size, const T* x, T* y,         \
                            Accumulator<T>* inv_norm) {                                                    \
    forward(parallel, size, x, y, inv_norm);                                                               \
  }                                                                                                        \
  void l2_normalize_backward(const Parallel& parallel, const NormalizeRows& size, const T* dy, const T* x, \
                             const Accumulator<T>* inv_norm, T* dx) {                                      \
    backward(parallel, size, dy, x, inv_norm, dx);                                                         \
  }
SSLFAST_EACH(SSLFAST_L2_NORMALIZE_DEFINE, float, double, bf16, fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <tuple>

#include "torch_api.h"

namespace sslfast {
namespace {

NormalizeRows rows_of(const Tensor& x, double eps) {
  SSLFAST_CHECK(x.dim() == 2, "x must be two-dimensional, got ", x.dim(), " dimensions");
  const int64_t features = x.size(1);
  // About 32k elements a task: enough to pay for waking a thread.
  return {x.size(0), features, eps, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, features))};
}

std::tuple<Tensor, Tensor> l2_normalize_cpu(const Tensor& x_any, double eps) {
  const NormalizeRows size = rows_of(x_any, eps);
  const Tensor x = as_contiguous(x_any);
  Tensor y = allocate(x, {size.rows, size.features});
  Tensor inv_norm = allocate(x, {size.rows}, accumulator_type(x));
  dispatch_float(x, "x", [&](auto element) {
    using T = decltype(element);
    SSLFAST_CALL(l2_normalize_forward, torch_parallel(), size, const_data<T>(x), mutable_data<T>(y),
                 mutable_data<Accumulator<T>>(inv_norm));
  });
  return {y, inv_norm};
}

Tensor l2_normalize_backward_cpu(const Tensor& dy_any, const Tensor& x_any, const Tensor& inv_norm_any, double eps) {
  const NormalizeRows size = rows_of(x_any, eps);
  check_tensor(dy_any, "grad_y", {size.rows, size.features}, x_any.scalar_type(), x_any);
  check_tensor(inv_norm_any, "inv_norm", {size.rows}, accumulator_type(x_any), x_any);
  const Tensor dy = as_contiguous(dy_any), x = as_contiguous(x_any), inv_norm = as_contiguous(inv_norm_any);
  Tensor dx = allocate(x, {size.rows, size.features});
  dispatch_float(x, "x", [&](auto element) {
    using T = decltype(element);
    SSLFAST_CALL(l2_normalize_backward, torch_parallel(), size, const_data<T>(dy), const_data<T>(x),
                 const_data<Accumulator<T>>(inv_norm), mutable_data<T>(dx));
  });
  return dx;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, l2_normalize, l2_normalize_backward)
#endif  // SSLFAST_CPU_DISPATCH
