// Which threads take a row: one warp where it is short, one block where it is long; and how wide they read it.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "torch_api.h"

namespace sslfast {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;        // rows of a block where a warp takes a row
constexpr int kBlock = 256;              // threads where a block takes a row
constexpr int64_t kWarpFeatures = 1024;  // the longest row of a warp
constexpr int kPackBytes = 16;           // the widest load

struct Rows {
  int64_t rows;      // M
  int64_t features;  // D
};

template <typename T, int kPack>
struct alignas(sizeof(T) * kPack) Pack {
  T element[kPack];
};

// Σ over the kThreads threads of a row; every thread gets the same bits, in the same order each run. `Slot` tells the
// sums of a block apart: each is taken once, so there is no second barrier before its memory is written again.
template <int kThreads, int kSlot = 0, typename A>
__device__ A sum_over_row(A value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if constexpr (kThreads > kWarp) {
    __shared__ A of_warp[kThreads / kWarp];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = of_warp[0];
    for (int w = 1; w < kThreads / kWarp; ++w) value += of_warp[w];
  }
  return value;
}

template <int kThreads>
__device__ int64_t row_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads;
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls launch(threads a row, elements a load, blocks, threads a block), the first two as compile-time constants.
// 16-byte loads need every row to start on 16 bytes: aligned pointers and a row of a multiple of 16 bytes.
template <typename T, typename F>
void with_shape(const Rows& size, bool aligned_pointers, F launch) {
  constexpr int pack = kPackBytes / static_cast<int>(sizeof(T));
  const bool packed = aligned_pointers && size.features % pack == 0;
  if (size.features <= kWarpFeatures) {
    const auto blocks = static_cast<unsigned>((size.rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    if (packed) return launch(Constant<kWarp>{}, Constant<pack>{}, blocks, kWarpsPerBlock * kWarp);
    return launch(Constant<kWarp>{}, Constant<1>{}, blocks, kWarpsPerBlock * kWarp);
  }
  const auto blocks = static_cast<unsigned>(size.rows);
  if (packed) return launch(Constant<kBlock>{}, Constant<pack>{}, blocks, kBlock);
  return launch(Constant<kBlock>{}, Constant<1>{}, blocks, kBlock);
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % kPackBytes != 0) return false;
  }
  return true;
}

}  // namespace
}  // namespace sslfast
