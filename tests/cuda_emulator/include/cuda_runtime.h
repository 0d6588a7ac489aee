// CUDA's kernel language for a C++ compiler, as far as csrc/cuda uses it; what a new kernel needs beyond that goes
// here. What C++ cannot say (launches, shared arrays) rewrite.py turns into calls of emulator.h.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx ::emulator::thread_idx
#define blockIdx ::emulator::block_idx
#define blockDim ::emulator::block_dim
#define gridDim ::emulator::grid_dim

using cudaError_t = int;
inline cudaError_t cudaGetLastError() { return 0; }  // a launch that fails throws
inline cudaError_t cudaSetDevice(int) { return 0; }

// --------------------------------------------------------------------------------------------- barriers and exchanges

// Where a thread waits: the place in the source that calls one of these functions.
using Site = std::source_location;

inline void __syncthreads(Site site = Site::current()) { emulator::wait_for_block("__syncthreads", site, false); }
inline int __syncthreads_count(int flag, Site site = Site::current()) {
  return emulator::wait_for_block("__syncthreads_count", site, flag != 0);
}
inline int __syncthreads_or(int flag, Site site = Site::current()) {
  return emulator::wait_for_block("__syncthreads_or", site, flag != 0) > 0;
}
inline int __syncthreads_and(int flag, Site site = Site::current()) {
  return emulator::wait_for_block("__syncthreads_and", site, flag == 0) == 0;
}
inline void __syncwarp(unsigned lanes = ~0u, Site site = Site::current()) {
  emulator::wait_for_warp("__syncwarp", site, lanes, 0, true);
}

namespace emulator {

constexpr int kLanes = 32;

inline int lane() { return static_cast<int>(thread_number() % kLanes); }

// What lane `source` gives, or one's own value where there is no such lane. As in CUDA, it orders no memory.
template <typename T>
T exchange(const char* name, Site site, unsigned lanes, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  const uint64_t* given = wait_for_warp(name, site, lanes, bits, false);
  if (source < 0 || source >= kLanes) return value;
  bits = given[source];
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned lanes, T value, int source, Site site = Site::current()) {
  return emulator::exchange("__shfl_sync", site, lanes, value, source % emulator::kLanes);
}
template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int mask, Site site = Site::current()) {
  return emulator::exchange("__shfl_xor_sync", site, lanes, value, emulator::lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned lanes, T value, int step, Site site = Site::current()) {
  return emulator::exchange("__shfl_up_sync", site, lanes, value, emulator::lane() - step);
}
template <typename T>
T __shfl_down_sync(unsigned lanes, T value, int step, Site site = Site::current()) {
  return emulator::exchange("__shfl_down_sync", site, lanes, value, emulator::lane() + step);
}
inline unsigned __ballot_sync(unsigned lanes, int flag, Site site = Site::current()) {
  const uint64_t* given = emulator::wait_for_warp("__ballot_sync", site, lanes, flag != 0, false);
  unsigned votes = 0;
  for (int i = 0; i < emulator::kLanes; ++i) votes |= static_cast<unsigned>(given[i]) << i;
  return votes;
}
inline int __any_sync(unsigned lanes, int flag, Site site = Site::current()) {
  return __ballot_sync(lanes, flag, site) != 0;
}
inline int __all_sync(unsigned lanes, int flag, Site site = Site::current()) {
  return __ballot_sync(lanes, !flag, site) == 0;
}

// ----------------------------------------------------------------------------------------------------- between blocks

inline void __threadfence() { emulator::fence(); }

// Orders no memory but its own.
template <typename T>
T atomicAdd(T* at, T value) {
  static_assert(std::is_integral_v<T>, "sums of floating-point numbers in any order are other bits in every run");
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}

// --------------------------------------------------------------------------------------------------------- arithmetic

inline int __popc(unsigned x) { return std::popcount(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
using std::abs;
