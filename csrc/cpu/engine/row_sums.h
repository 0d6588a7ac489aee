// Sums over a row in an order that is written down: a compiler may not reorder them. Lane l takes the elements l,
// l + kSumLanes, ...; four vectors of sums hide the latency of the addition even at 512 bits.
#pragma once
#include <cstdint>

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

inline constexpr int kSumLanes = 64;

// Σ over the lanes, pairwise; the error then grows as log(kSumLanes) + D/kSumLanes.
template <typename A>
static inline A sum_of_lanes(A* lane) {
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
