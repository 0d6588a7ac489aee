// Sums over rows for every column of a matrix: a block of threads has a tile of columns, a warp wide, for a piece of
// the rows; its warps take rows in turn, and their results are joined in their order.
#pragma once
#include <algorithm>

#include "logit_rows.h"

namespace sslfast {
namespace {

constexpr int kTileColumns = kWarp, kTileWarps = kRowBlock / kWarp;
constexpr int64_t kWantedBlocks = 1024, kMostPieces = 64, kLeastRows = 4 * kTileWarps;

// Pieces of so many rows where there are so many tiles of columns.
int64_t row_pieces(int64_t rows, int64_t tiles) {
  const int64_t most = std::clamp<int64_t>(rows / kLeastRows, 1, kMostPieces);
  return std::clamp<int64_t>(kWantedBlocks / std::max<int64_t>(1, tiles), 1, most);
}

// join(join(x of warp 0, x of warp 1), ...) of this thread's column, for the threads of warp 0.
template <typename V, typename F>
__device__ V over_warps(V x, F join) {
  __shared__ V of_warp[kTileWarps][kTileColumns];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  of_warp[warp][lane] = x;
  __syncthreads();
  if (warp != 0) return x;
  for (int w = 1; w < kTileWarps; ++w) x = join(x, of_warp[w][lane]);
  return x;
}

}  // namespace
}  // namespace sslfast
