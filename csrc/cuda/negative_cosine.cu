// The mean cosine of matching rows on the GPU: a group of threads a row, which is read once from memory forward; the
// backward reads both rows again and writes what is wanted. One more block adds the rows' cosines in their order.
#include "common/negative_cosine.h"

#include <tuple>

#include "checks/negative_cosine.h"
#include "row_threads.h"

namespace sslfast {
namespace {

constexpr int kSumThreads = 256;

template <typename T, int kThreads, int kPack>
__global__ void forward_kernel(Rows size, Accumulator<T> eps, const T* __restrict__ p, const T* __restrict__ z,
                               Accumulator<T>* __restrict__ saved) {
  using A = Accumulator<T>;
  const int64_t row = row_of_thread<kThreads>();
  if (row >= size.rows) return;  // a whole warp leaves, never a part of one
  const int first = threadIdx.x % kThreads;
  const int64_t packs = size.features / kPack;
  const auto* p_row = reinterpret_cast<const Pack<T, kPack>*>(p + row * size.features);
  const auto* z_row = reinterpret_cast<const Pack<T, kPack>*>(z + row * size.features);
  RowProducts<A> sum{0, 0, 0};
  for (int64_t i = first; i < packs; i += kThreads) {
    const Pack<T, kPack> a = p_row[i], b = z_row[i];
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum = add_products(sum, A(widen(a.element[e])), A(widen(b.element[e])));
  }
  sum = {sum_over_row<kThreads, 0>(sum.pp), sum_over_row<kThreads, 1>(sum.zz), sum_over_row<kThreads, 2>(sum.pz)};
  if (first == 0) {
    const Cosine<A> c = cosine_of(sum, eps);
    saved[kSaved * row] = c.inv_p;
    saved[kSaved * row + 1] = c.inv_z;
    saved[kSaved * row + 2] = c.value;
  }
}

// One block. Each thread's rows in their order, then the threads' sums pairwise.
template <typename A>
__global__ void sum_kernel(int64_t rows, double factor, double offset, const A* __restrict__ saved,
                           A* __restrict__ loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kSumThreads) sum += saved[kSaved * i + 2];
  sum = sum_over_row<kSumThreads>(sum);
  if (threadIdx.x == 0) *loss = static_cast<A>(offset + factor * sum);
}

template <typename T, int kThreads, int kPack>
__global__ void backward_kernel(Rows size, Accumulator<T> eps, Accumulator<T> factor,
                                const Accumulator<T>* __restrict__ grad, const T* __restrict__ p,
                                const T* __restrict__ z, const Accumulator<T>* __restrict__ saved, T* __restrict__ dp,
                                T* __restrict__ dz) {
  using A = Accumulator<T>;
  const int64_t row = row_of_thread<kThreads>();
  if (row >= size.rows) return;
  const int64_t packs = size.features / kPack;
  const int64_t at = row * packs;
  const auto* p_row = reinterpret_cast<const Pack<T, kPack>*>(p) + at;
  const auto* z_row = reinterpret_cast<const Pack<T, kPack>*>(z) + at;
  const A inv_p = saved[kSaved * row], inv_z = saved[kSaved * row + 1], value = saved[kSaved * row + 2];
  const A weight_p = pull(value, inv_p, eps), weight_z = pull(value, inv_z, eps), g = factor * *grad;
  for (int64_t i = threadIdx.x % kThreads; i < packs; i += kThreads) {
    const Pack<T, kPack> a = p_row[i], b = z_row[i];
    Pack<T, kPack> of_a, of_b;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const A x = A(widen(a.element[e])), y = A(widen(b.element[e]));
      narrow(cosine_gradient(x, y, inv_p, inv_z, weight_p, g), &of_a.element[e]);
      narrow(cosine_gradient(y, x, inv_z, inv_p, weight_z, g), &of_b.element[e]);
    }
    if (dp != nullptr) reinterpret_cast<Pack<T, kPack>*>(dp)[at + i] = of_a;
    if (dz != nullptr) reinterpret_cast<Pack<T, kPack>*>(dz)[at + i] = of_b;
  }
}

std::tuple<Tensor, Tensor> negative_cosine_cuda(const Tensor& p_any, const Tensor& z_any, double eps, double factor,
                                                double offset) {
  const torch::stable::accelerator::DeviceGuard guard(p_any.get_device_index());
  const CosineArguments given(p_any, z_any);
  auto [loss, saved] = given.results();
  const cudaStream_t stream = current_stream(given.p);
  const Rows size{given.rows, given.features};
  dispatch_float(given.p, "p", [&, &loss = loss, &saved = saved](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const T *p = const_data<T>(given.p), *z = const_data<T>(given.z);
    A* rows = mutable_data<A>(saved);
    if (size.rows > 0) {
      with_shape<T>(size, aligned({p, z}), [&](auto threads, auto pack, unsigned blocks, int block) {
        forward_kernel<T, decltype(threads)::value, decltype(pack)::value>
            <<<blocks, block, 0, stream>>>(size, static_cast<A>(eps), p, z, rows);
      });
    }
    sum_kernel<A><<<1, kSumThreads, 0, stream>>>(size.rows, factor, offset, rows, mutable_data<A>(loss));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {loss, saved};
}

std::tuple<Tensor, Tensor> negative_cosine_backward_cuda(const Tensor& grad, const Tensor& p_any, const Tensor& z_any,
                                                         const Tensor& saved_any, double eps, double factor, bool of_p,
                                                         bool of_z) {
  const torch::stable::accelerator::DeviceGuard guard(p_any.get_device_index());
  const CosineArguments given(p_any, z_any);
  given.check_saved(grad, saved_any);
  const Tensor saved = as_contiguous(saved_any);
  auto [dp, dz] = given.gradients(of_p, of_z);
  const Rows size{given.rows, given.features};
  if (size.rows == 0 || !(of_p || of_z)) return {dp, dz};
  const cudaStream_t stream = current_stream(given.p);
  dispatch_float(given.p, "p", [&, &dp = dp, &dz = dz](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const T *p = const_data<T>(given.p), *z = const_data<T>(given.z);
    T* of_a = of_p ? mutable_data<T>(dp) : nullptr;
    T* of_b = of_z ? mutable_data<T>(dz) : nullptr;
    with_shape<T>(size, aligned({p, z, of_a, of_b}), [&](auto threads, auto pack, unsigned blocks, int block) {
      backward_kernel<T, decltype(threads)::value, decltype(pack)::value>
          <<<blocks, block, 0, stream>>>(size, static_cast<A>(eps), static_cast<A>(factor), const_data<A>(grad), p, z,
                                         const_data<A>(saved), of_a, of_b);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {dp, dz};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("negative_cosine", TORCH_BOX(&sslfast::negative_cosine_cuda));
  m.impl("negative_cosine_backward", TORCH_BOX(&sslfast::negative_cosine_backward_cuda));
}
