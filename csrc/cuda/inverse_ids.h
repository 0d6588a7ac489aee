// The inverse of kept ids on the GPU: which row of an image holds its token (or patch) l.
#pragma once
#include "../torch_api.h"

namespace sslfast {
namespace {

constexpr int kInverseThreads = 128;

// inverse[i, l] = k where ids[i, k] = l, else −1: one block an image. Ids of a row are distinct, so no two threads
// write to one place; those outside 0 … L − 1 belong nowhere.
template <typename Index>
__global__ void __launch_bounds__(kInverseThreads)
    inverse_kernel(int64_t kept, int64_t length, const int64_t* __restrict__ ids, Index* __restrict__ inverse) {
  const int64_t* of_image = ids + blockIdx.x * kept;
  Index* row = inverse + blockIdx.x * length;
  for (int64_t l = threadIdx.x; l < length; l += kInverseThreads) row[l] = -1;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < kept; k += kInverseThreads) {
    const int64_t l = of_image[k];
    if (l >= 0 && l < length) row[l] = static_cast<Index>(k);
  }
}

// [images, L] int32 from contiguous ids [images, K] (in any dimensions).
inline Tensor inverse_ids(const Tensor& ids, int64_t images, int64_t kept, int64_t length, cudaStream_t stream) {
  constexpr int64_t kMost = int64_t{1} << 31;
  SSLFAST_CHECK(images < kMost && kept < kMost, "ids must have fewer than 2^31 rows and columns, got ", images, " and ",
                kept);
  Tensor inverse = torch::stable::new_empty(ids, {images, length}, ScalarType::Int);
  if (images * length == 0) return inverse;
  inverse_kernel<int32_t><<<static_cast<unsigned>(images), kInverseThreads, 0, stream>>>(
      kept, length, const_data<int64_t>(ids), mutable_data<int32_t>(inverse));
  return inverse;
}

}  // namespace
}  // namespace sslfast
