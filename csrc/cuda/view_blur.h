// The blur of torchvision's semantics, the last pass over a view that has one.
#pragma once
#include "view_sample.h"

namespace sslfast {
namespace {

constexpr int kBlurThreads = 128;
constexpr int kBlurWarps = kBlurThreads / kWarp;
constexpr int kRun = 8;          // neighbours that a thread filters together
constexpr int kStripRows = 16;   // a block makes a strip of a view's rows, one channel of it,
constexpr int kStripWide = 256;  // of so many columns at most
constexpr int kLines = 8;        // rows that a warp filters across at once

// Floats from a row of the strip with its border to the next: odd, so that kLines rows meet different banks.
__host__ __device__ constexpr int strip_pitch(int wide, int radius) {
  return ((wide + kRun - 1) / kRun * kRun + 2 * radius) | 1;
}
// In front of them in shared memory: the filter, from its second place on, and the rows that lie under it.
__host__ __device__ constexpr int filter_room(int radius) { return 2 * radius + 2; }
__host__ __device__ constexpr int rows_room(int radius) { return kStripRows + 2 * radius; }

__host__ constexpr size_t blur_shared_bytes(int wide, int radius) {
  return sizeof(float) *
         (static_cast<size_t>(kStripRows) * strip_pitch(wide, radius) + filter_room(radius) + rows_room(radius));
}
static_assert(blur_shared_bytes(kStripWide, kMaxBlurRadius) <= kSharedBytes);
static_assert(kStripRows % kRun == 0 && kRun % 2 == 0 && kStripRows % kLines == 0);

// sum[j] = Σ_t weight[t] x[t + j] over the 2·radius + 1 taps, and no more: what lies beyond the filter, such as a NaN,
// has no part in it. `filter[t + 1]` is weight[t]; two(i, …) gives x[i] and x[i + 1], for an even i. Position p of x
// stands at place p mod kRun of the window, so that a value is loaded once for kRun products.
template <typename F>
__device__ __forceinline__ void run_filter(const float* filter, int radius, F two, float (&sum)[kRun]) {
  float window[kRun];
#pragma unroll
  for (int i = 0; i < kRun; i += 2) two(i, window[i], window[i + 1]);
  const float weight = filter[1];
#pragma unroll
  for (int j = 0; j < kRun; ++j) sum[j] = weight * window[j];
  for (int t = 1;; t += kRun) {
#pragma unroll
    for (int k = 0; k < kRun; k += 2) {  // taps t + k and t + k + 1: after the first their number is even
      if (t + k > 2 * radius) return;
      const auto pair = *reinterpret_cast<const Pack<float, 2>*>(filter + t + k + 1);
      float next;
      two(t + k + kRun - 1, window[k], next);
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[j] += pair.of[0] * window[(1 + k + j) % kRun];
      window[k + 1] = next;
#pragma unroll
      for (int j = 0; j < kRun; ++j) sum[j] += pair.of[1] * window[(2 + k + j) % kRun];
    }
  }
}

// A strip of channel blockIdx.z of sample first + blockIdx.y, if that has a blur: filtered down by threads that stand
// on columns and read the planes, its border of columns too; then across by threads that stand on rows, kLines of them
// at a time, whose place in the strip the result takes.
__global__ void __launch_bounds__(kBlurThreads)
    gaussian_kernel(const __grid_constant__ Views views, const Sample* __restrict__ samples, int64_t first,
                    const float* __restrict__ half_filters, const float* __restrict__ planes) {
  extern __shared__ __align__(16) float shared_strip[];
  const int64_t n = first + blockIdx.y;
  const Sample& s = samples[n];
  const int radius = s.radius, c = blockIdx.z;
  if (radius < 0) return;
  const int strips_across = (views.width + kStripWide - 1) / kStripWide;
  const int x0 = blockIdx.x % strips_across * kStripWide, y0 = blockIdx.x / strips_across * kStripRows;
  const int wide = min(kStripWide, views.width - x0), pitch = strip_pitch(wide, radius), columns = wide + 2 * radius;
  const Places places{views.tiles_across, views.channels};
  float *filter = shared_strip, *strip = filter + filter_room(radius) + rows_room(radius);
  auto* row_of = reinterpret_cast<int*>(filter + filter_room(radius));
  for (int t = threadIdx.x; t <= 2 * radius; t += kBlurThreads) {
    filter[t + 1] = half_filters[n * kHalfFilter + abs(t - radius)];
  }
  for (int i = threadIdx.x; i < rows_room(radius); i += kBlurThreads) {
    row_of[i] = places.row(inside<false>(y0 - radius + i, views.height));
  }
  __syncthreads();

  const float* plane = planes + blockIdx.y * static_cast<int64_t>(views.tiles) * views.channels * kTilePixels;
  for (int item = threadIdx.x; item < columns * (kStripRows / kRun); item += kBlurThreads) {
    const int run = item / columns, column = item - run * columns;
    const float* in = plane + places.column(inside<false>(x0 - radius + column, views.width), c);
    const int* rows = row_of + run * kRun;
    const auto two = [&](int i, float& a, float& b) {
      const auto pair = *reinterpret_cast<const Pack<int, 2>*>(rows + i);
      a = in[static_cast<int64_t>(pair.of[0]) * kTile];
      b = in[static_cast<int64_t>(pair.of[1]) * kTile];
    };
    float sum[kRun];
    run_filter(filter, radius, two, sum);
#pragma unroll
    for (int j = 0; j < kRun; ++j) strip[(run * kRun + j) * pitch + column] = sum[j];
  }
  __syncthreads();

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  constexpr int kRunsOfWarp = kWarp / kLines, kRounds = kStripWide / (kRun * kRunsOfWarp * kBlurWarps);
#pragma unroll 1
  for (int line = lane % kLines; line < kStripRows; line += kLines) {
    float* row = strip + line * pitch;
    float sum[kRounds][kRun];
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      const int x = ((k * kBlurWarps + warp) * kRunsOfWarp + lane / kLines) * kRun;
      const auto two = [&](int i, float& a, float& b) { a = row[x + i], b = row[x + i + 1]; };
      if (x < wide) run_filter(filter, radius, two, sum[k]);
    }
    __syncthreads();  // these rows have been read
#pragma unroll
    for (int k = 0; k < kRounds; ++k) {
      const int x = ((k * kBlurWarps + warp) * kRunsOfWarp + lane / kLines) * kRun;
      if (x >= wide) continue;
#pragma unroll
      for (int j = 0; j < kRun; ++j) row[x + j] = sum[k][j];
    }
  }
  __syncthreads();

  const bool solarize = s.solarize;
  with_type(views, [&](auto element) {
    const int step = views.channels_last ? views.channels : 1;
    for (int r = warp; r < kStripRows && y0 + r < views.height; r += kBlurWarps) {
      auto* to = place_of<decltype(element)>(views, n, c, static_cast<int64_t>(y0 + r) * views.width + x0);
      for (int x = lane; x < wide; x += kWarp) {
        narrow(finished<false>(views, solarize, c, strip[r * pitch + x]), to + static_cast<int64_t>(x) * step);
      }
    }
  });
}

}  // namespace
}  // namespace sslfast
