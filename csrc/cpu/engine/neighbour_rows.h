// What works on rows and on their given neighbours: scratch memory, tasks, and the pairs by the row they point at.
#pragma once
#include "levels.h"
#include "packed_rows.h"

namespace sslfast {

struct NeighbourPairs {
  Rows q, k;  // [m, d], [n, d]
  int64_t m, n, d, count;
  const int64_t* index;  // [m][count]: a column, or −1 for none
  double eps;
};

namespace SSLFAST_CPU_LEVEL {
namespace {

constexpr int64_t kTaskNumbers = 32768;  // of rows a task works on: enough to pay for waking a thread

// out += w·(own − other + eps)
template <typename T>
void add_difference(T w, const T* __restrict__ own, const T* __restrict__ other, T eps, int64_t d,
                    T* __restrict__ out) {
  for (int64_t x = 0; x < d; ++x) out[x] += w * (own[x] - other[x] + eps);
}

// out += w·other
template <typename T>
void add_row(T w, const T* __restrict__ other, int64_t d, T* __restrict__ out) {
  for (int64_t x = 0; x < d; ++x) out[x] += w * other[x];
}

template <typename T>
struct NeighbourRows {
  const NeighbourPairs& pairs;
  const int64_t padded;
  T* scratch;         // [workers][3][padded]
  int64_t* starts;    // [n + 2]
  int64_t* pointing;  // [m·count]: the pairs by their columns
  int64_t* next;

  NeighbourRows(const NeighbourPairs& given, int64_t threads, char* memory)
      : pairs(given), padded(round_up(given.d, 4 * kLanes<T>)) {
    scratch = reinterpret_cast<T*>(memory);
    starts = reinterpret_cast<int64_t*>(scratch + threads * 3 * padded);
    pointing = starts + given.n + 2;
    next = pointing + given.m * given.count;
  }
  int64_t bytes() const { return reinterpret_cast<char*>(next + 1) - reinterpret_cast<char*>(scratch); }

  // Calls row(i, three rows of scratch memory) for every i, with zeros in these beyond d.
  template <typename F>
  void each_row(int64_t rows, const Parallel& parallel, F&& row) const {
    const int64_t numbers = pairs.d * (1 + pairs.count), share = kTaskNumbers / numbers;
    const int64_t rows_per_task = share < 1 ? 1 : share, tasks = (rows + rows_per_task - 1) / rows_per_task;
    for (int64_t at = 0; at < parallel.threads * 3 * padded; ++at) scratch[at] = 0;
    each_task(parallel, tasks, next, [&](int64_t worker, int64_t task) {
      const int64_t begin = task * rows_per_task;
      const int64_t end = begin + rows_per_task < rows ? begin + rows_per_task : rows;
      for (int64_t i = begin; i < end; ++i) row(i, scratch + worker * 3 * padded);
    });
  }

  // The pairs by the column they point at, those without one last.
  void sort_pairs() const {
    const int64_t count = pairs.m * pairs.count;
    auto column = [&](int64_t c) { return pairs.index[c] < 0 ? pairs.n : pairs.index[c]; };
    for (int64_t j = 0; j < pairs.n + 2; ++j) starts[j] = 0;
    for (int64_t c = 0; c < count; ++c) ++starts[column(c) + 1];
    for (int64_t j = 0; j < pairs.n + 1; ++j) starts[j + 1] += starts[j];
    for (int64_t c = 0; c < count; ++c) pointing[starts[column(c)]++] = c;
    for (int64_t j = pairs.n + 1; j > 0; --j) starts[j] = starts[j - 1];
    starts[0] = 0;
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
