// Row-wise L2-normalisation on the GPU: a group of threads a row, one warp where the row is short, one block where it
// is long. Memory traffic is the bound: a row is read once from memory, once more from the cache, and written once.
#include "common/l2_normalize.h"

#include <tuple>

#include "row_threads.h"
#include "torch_api.h"

namespace sslfast {
namespace {

template <typename T, int kThreads, int kPack>
__global__ void forward_kernel(Rows size, Accumulator<T> eps, const T* __restrict__ x, T* __restrict__ y,
                               Accumulator<T>* __restrict__ inv_norm) {
  using A = Accumulator<T>;
  const int64_t row = row_of_thread<kThreads>();
  if (row >= size.rows) return;  // a whole warp leaves, never a part of one
  const int first = threadIdx.x % kThreads;
  const int64_t packs = size.features / kPack;
  const auto* x_row = reinterpret_cast<const Pack<T, kPack>*>(x + row * size.features);
  auto* y_row = reinterpret_cast<Pack<T, kPack>*>(y + row * size.features);

  A sum = 0;
  for (int64_t p = first; p < packs; p += kThreads) {
    const Pack<T, kPack> in = x_row[p];
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum = add_square(sum, A(widen(in.element[e])));
  }
  const A r = inverse_norm(sum_over_row<kThreads>(sum), eps);
  if (first == 0) inv_norm[row] = r;
  for (int64_t p = first; p < packs; p += kThreads) {
    const Pack<T, kPack> in = x_row[p];
    Pack<T, kPack> out;
#pragma unroll
    for (int e = 0; e < kPack; ++e) narrow(normalized(A(widen(in.element[e])), r), &out.element[e]);
    y_row[p] = out;
  }
}

template <typename T, int kThreads, int kPack>
__global__ void backward_kernel(Rows size, Accumulator<T> eps, const T* __restrict__ dy, const T* __restrict__ x,
                                const Accumulator<T>* __restrict__ inv_norm, T* __restrict__ dx) {
  using A = Accumulator<T>;
  const int64_t row = row_of_thread<kThreads>();
  if (row >= size.rows) return;
  const int first = threadIdx.x % kThreads;
  const int64_t packs = size.features / kPack;
  const auto* dy_row = reinterpret_cast<const Pack<T, kPack>*>(dy + row * size.features);
  const auto* x_row = reinterpret_cast<const Pack<T, kPack>*>(x + row * size.features);
  auto* dx_row = reinterpret_cast<Pack<T, kPack>*>(dx + row * size.features);
  const A r = inv_norm[row];

  A sum = 0;
  for (int64_t p = first; p < packs; p += kThreads) {
    const Pack<T, kPack> g = dy_row[p], in = x_row[p];
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum = add_projection(sum, A(widen(g.element[e])), A(widen(in.element[e])), r);
  }
  const A weight = projection_weight(sum_over_row<kThreads>(sum), r, eps);
  for (int64_t p = first; p < packs; p += kThreads) {
    const Pack<T, kPack> g = dy_row[p], in = x_row[p];
    Pack<T, kPack> out;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      narrow(gradient(A(widen(g.element[e])), A(widen(in.element[e])), r, weight), &out.element[e]);
    }
    dx_row[p] = out;
  }
}

Rows rows_of(const Tensor& x) {
  SSLFAST_CHECK(x.dim() == 2, "x must be two-dimensional, got ", x.dim(), " dimensions");
  SSLFAST_CHECK(x.size(0) < (int64_t{1} << 31), "x must have fewer than 2^31 rows, got ", x.size(0));
  return {x.size(0), x.size(1)};
}

std::tuple<Tensor, Tensor> l2_normalize_cuda(const Tensor& x_any, double eps) {
  const Rows size = rows_of(x_any);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor x = as_contiguous(x_any);
  Tensor y = allocate(x, {size.rows, size.features});
  Tensor inv_norm = allocate(x, {size.rows}, accumulator_type(x));
  if (size.rows == 0) return {y, inv_norm};
  const cudaStream_t stream = current_stream(x);
  dispatch_float(x, "x", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const T* in = const_data<T>(x);
    T* out = mutable_data<T>(y);
    A* r = mutable_data<A>(inv_norm);
    with_shape<T>(size, aligned({in, out}), [&](auto threads, auto pack, unsigned blocks, int block) {
      forward_kernel<T, decltype(threads)::value, decltype(pack)::value>
          <<<blocks, block, 0, stream>>>(size, static_cast<A>(eps), in, out, r);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {y, inv_norm};
}

Tensor l2_normalize_backward_cuda(const Tensor& dy_any, const Tensor& x_any, const Tensor& inv_norm_any, double eps) {
  const Rows size = rows_of(x_any);
  check_tensor(dy_any, "grad_y", {size.rows, size.features}, x_any.scalar_type(), x_any);
  check_tensor(inv_norm_any, "inv_norm", {size.rows}, accumulator_type(x_any), x_any);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor dy = as_contiguous(dy_any), x = as_contiguous(x_any), inv_norm = as_contiguous(inv_norm_any);
  Tensor dx = allocate(x, {size.rows, size.features});
  if (size.rows == 0) return dx;
  const cudaStream_t stream = current_stream(x);
  dispatch_float(x, "x", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const T *g = const_data<T>(dy), *in = const_data<T>(x);
    const A* r = const_data<A>(inv_norm);
    T* out = mutable_data<T>(dx);
    with_shape<T>(size, aligned({g, in, out}), [&](auto threads, auto pack, unsigned blocks, int block) {
      backward_kernel<T, decltype(threads)::value, decltype(pack)::value>
          <<<blocks, block, 0, stream>>>(size, static_cast<A>(eps), g, in, r, out);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return dx;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, l2_normalize, l2_normalize_backward)
