// A mask of one image as lists of its kept and of its masked items, by one block.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sslfast {
namespace {

constexpr int kWarp = 32;
constexpr int kPartitionThreads = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// How many of the lanes before this one voted.
__device__ inline int votes_before(unsigned votes) { return __popc(votes & ((1u << (threadIdx.x % kWarp)) - 1)); }

// For a block of kPartitionThreads: the place of this thread's flag among those of the block that are set, and in
// `total` how many are set. Every thread of the block calls it.
__device__ inline int place_in_block(bool flag, int* total) {
  constexpr int kWarps = kPartitionThreads / kWarp;
  __shared__ int of_warp[kWarps];
  const unsigned votes = __ballot_sync(kAllLanes, flag);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  if (threadIdx.x % kWarp == 0) of_warp[warp] = __popc(votes);
  __syncthreads();
  int place = votes_before(votes), sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) place += of_warp[w];
    sum += of_warp[w];
  }
  __syncthreads();  // before it is written again
  *total = sum;
  return place;
}

// Both groups in raster order, and where each item went. A row that keeps another number than `kept` gets −1 where ids
// are missing and loses what is too much: nothing is written out of bounds, and `restore` is a permutation still.
template <typename Masked>
__device__ void partition_row(int64_t count, int64_t kept, Masked masked, int64_t* keep, int64_t* mask,
                              int64_t* restore) {
  int64_t left = count;  // how many the row itself keeps
  for (int64_t start = 0; start < count; start += kPartitionThreads) {
    int total;
    place_in_block(start + threadIdx.x < count && masked(start + threadIdx.x), &total);
    left -= total;
  }
  int64_t before = 0;  // masked items before this step's
  for (int64_t start = 0; start < count; start += kPartitionThreads) {
    const int64_t i = start + threadIdx.x;
    const bool gone = i < count && masked(i);
    int total;
    const int64_t m = before + place_in_block(gone, &total), k = i - m;
    before += total;
    if (i >= count) continue;
    if (gone) {
      if (m < count - kept) mask[m] = i;
      restore[i] = left + m;
    } else {
      if (k < kept) keep[k] = i;
      restore[i] = k;
    }
  }
  for (int64_t m = before + threadIdx.x; m < count - kept; m += kPartitionThreads) mask[m] = -1;
  for (int64_t k = count - before + threadIdx.x; k < kept; k += kPartitionThreads) keep[k] = -1;
}

// One block an image; mask [images, count], not 0 where masked.
template <typename Flag>
__global__ void __launch_bounds__(kPartitionThreads)
    partition_kernel(int64_t count, int64_t kept, const Flag* __restrict__ mask, int64_t* __restrict__ keep,
                     int64_t* __restrict__ masked, int64_t* __restrict__ restore) {
  const int64_t b = blockIdx.x;
  const Flag* row = mask + b * count;
  partition_row(
      count, kept, [row](int64_t i) { return row[i] != 0; }, keep + b * kept, masked + b * (count - kept),
      restore + b * count);
}

}  // namespace
}  // namespace sslfast
