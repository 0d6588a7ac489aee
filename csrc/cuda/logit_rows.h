// A block of threads a row of logits: reductions that give every thread the same bits, in the same order each run.
#pragma once
#include "common/online_softmax.h"

namespace sslfast {
namespace {

constexpr int kWarp = 32;
constexpr int kRowBlock = 256, kBlocksAtOnce = 4;  // threads; and blocks of a multiprocessor: 64 registers a thread
constexpr double kLog2E = 1.44269504088896340736, kLn2 = 0.69314718055994530942;

template <typename A>
__device__ A over_lanes(A x, int step) {
  return __shfl_xor_sync(0xffffffffu, x, step);
}
template <typename A>
__device__ OnlineSum<A> over_lanes(const OnlineSum<A>& x, int step) {
  return {over_lanes(x.largest, step), over_lanes(x.sum, step)};
}

// join(join(x of thread 0, x of thread 1), ...), in a fixed order; `join` does not mind the order of its two.
template <typename V, typename F>
__device__ V over_block(V x, F join) {
  __shared__ V of_warp[kRowBlock / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) x = join(x, over_lanes(x, step));
  __syncthreads();  // the last result has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = of_warp[0];
  for (int w = 1; w < kRowBlock / kWarp; ++w) x = join(x, of_warp[w]);
  return x;
}

template <typename A>
__device__ A block_sum(A x) {
  return over_block(x, [](A a, A b) { return a + b; });
}
template <typename A>
__device__ A block_largest(A x) {
  return over_block(x, [](A a, A b) { return b > a ? b : a; });
}
// Of two with the same largest number the sum is that of both, in either order.
template <typename A>
__device__ OnlineSum<A> block_merged(const OnlineSum<A>& x) {
  return over_block(x, [](const OnlineSum<A>& a, const OnlineSum<A>& b) { return merged(a, b); });
}

// The base of a row whose first numbers these are, one of each thread.
template <typename A>
__device__ A base_of(A x) {
  const A top = block_largest(x == x ? x : A(-3.0e38));
  return top > A(-3.0e38) && top < A(3.0e38) ? top : A(0);
}

// How many of `batch` rows count.
__device__ __forceinline__ int64_t rows_counted(const int64_t* rows, int64_t batch) {
  if (!rows) return batch;
  return *rows < 0 ? 0 : (*rows < batch ? *rows : batch);
}

}  // namespace
}  // namespace sslfast
