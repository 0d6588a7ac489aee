// What the GPU finds out about ids before it relies on them: the inverse of kept ids (which row of an image holds its
// token, or patch, l), and which images have ids that are no permutation. Nothing here waits for the host, so what is
// not allowed comes out as NaN, the same in every run.
#pragma once
#include "torch_api.h"

namespace sslfast {
namespace {

constexpr int kInverseThreads = 128;

constexpr int kNowhere = -1;   // in an inverse: no row has this id
constexpr int kRepeated = -2;  // more than one has
constexpr int kMarks = 8192;   // ids that are ticked off at once

// inverse[i, l] = k where ids[i, k] = l, else kNowhere: one block an image. Ids outside 0 … L − 1 belong nowhere. Of
// rows with the same id one is written last, nobody knows which; all others see that it is not them and say so.
template <typename Index>
__global__ void __launch_bounds__(kInverseThreads)
    inverse_kernel(int64_t kept, int64_t length, const int64_t* __restrict__ ids, Index* __restrict__ inverse) {
  const int64_t* of_image = ids + blockIdx.x * kept;
  Index* row = inverse + blockIdx.x * length;
  for (int64_t l = threadIdx.x; l < length; l += kInverseThreads) row[l] = kNowhere;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < kept; k += kInverseThreads) {
    const int64_t l = of_image[k];
    if (l >= 0 && l < length) row[l] = static_cast<Index>(k);
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < kept; k += kInverseThreads) {
    const int64_t l = of_image[k];
    if (l >= 0 && l < length && row[l] != static_cast<Index>(k)) row[l] = kRepeated;
  }
}

// An image's rows [first, rows) of x become NaN where its ids [L] are no permutation of 0 … L − 1: one block an image.
// L ids are a permutation where each of 0 … L − 1 is among them.
template <typename T>
__global__ void __launch_bounds__(kInverseThreads)
    spoil_kernel(int64_t length, const int64_t* __restrict__ ids, int64_t first, int64_t rows, int64_t features,
                 T* __restrict__ x) {
  __shared__ unsigned char seen[kMarks];
  const int64_t* of_image = ids + blockIdx.x * length;
  int missing = 0;
  for (int64_t begin = 0; begin < length; begin += kMarks) {
    const int64_t count = length - begin < kMarks ? length - begin : kMarks;
    for (int64_t l = threadIdx.x; l < count; l += kInverseThreads) seen[l] = 0;
    __syncthreads();
    for (int64_t l = threadIdx.x; l < length; l += kInverseThreads) {
      const int64_t at = of_image[l] - begin;
      if (at >= 0 && at < count) seen[at] = 1;
    }
    __syncthreads();
    for (int64_t l = threadIdx.x; l < count; l += kInverseThreads) missing += seen[l] == 0;
    __syncthreads();
  }
  if (__syncthreads_count(missing) == 0) return;
  T nan;
  narrow(Accumulator<T>(bits_to_float(0x7fc00000u)), &nan);
  const int64_t numbers = rows * features;
  for (int64_t i = first * features + threadIdx.x; i < numbers; i += kInverseThreads) x[blockIdx.x * numbers + i] = nan;
}

// [images, L] int32 from contiguous ids [images, K] (in any dimensions).
inline Tensor inverse_ids(const Tensor& ids, int64_t images, int64_t kept, int64_t length, cudaStream_t stream) {
  constexpr int64_t kMost = int64_t{1} << 31;
  SSLFAST_CHECK(images < kMost && kept < kMost, "ids must have fewer than 2^31 rows and columns, got ", images, " and ",
                kept);
  Tensor inverse = allocate(ids, {images, length}, ScalarType::Int);
  if (images * length == 0) return inverse;
  inverse_kernel<int32_t><<<static_cast<unsigned>(images), kInverseThreads, 0, stream>>>(
      kept, length, const_data<int64_t>(ids), mutable_data<int32_t>(inverse));
  return inverse;
}

}  // namespace
}  // namespace sslfast
