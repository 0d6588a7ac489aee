// Rows k that may be many more than the rows q they meet (a queue, a bank of features): they are packed a few blocks at
// a time, so that scratch memory does not grow with them; and few blocks of q are shared by several tasks.
#pragma once
#include "packed_blocks.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

inline constexpr int64_t kChunkBytes = 8 << 20;  // packed rows of k at a time, both layouts

// Blocks of k that are packed at a time.
template <typename T>
static inline int64_t chunk_count(const Blocks<T>& of_k) {
  const int64_t fit = kChunkBytes / (2 * of_k.size * static_cast<int64_t>(sizeof(T)));
  const int64_t least = fit < 1 ? 1 : fit;
  return least < of_k.count ? least : of_k.count;
}

// How many tasks share a row block, taking turns at the blocks of a chunk: two a thread, unless there are not so many.
template <typename T>
static inline int64_t split_count(const Blocks<T>& of_q, const Blocks<T>& of_k, int64_t threads) {
  const int64_t wanted = (2 * threads + of_q.count - 1) / of_q.count, most = chunk_count(of_k);
  return wanted < most ? wanted : most;
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
