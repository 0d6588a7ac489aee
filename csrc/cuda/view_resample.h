// The first pass over a view: crop, antialiased resize, flip, and the colours up to contrast, which needs the mean of the
// whole grey image. What needs neither that mean nor a blur is finished here.
#pragma once
#include "view_sample.h"

namespace sslfast {
namespace {

constexpr int kResampleThreads = 256;
constexpr int kResampleWarps = kResampleThreads / kWarp;
constexpr int kRowsPerThread = kTile / kResampleWarps;
constexpr int kBand = 48;      // rows of the crop held at once, which a tile needs up to a scale of about 1.3
constexpr int kMostTaps = 64;  // a filter of more pixels is weighed anew for every product

// The filters of a tile's pixels along one axis.
struct Filters {
  int first[kTile], count[kTile];  // beyond the view's edge: none
  float inverse[kTile];            // 1 / sum of the weights
};

// On the scale of the semantics but for the bytes of torchvision's, which are divided by 255 once they are resampled.
template <bool kPil>
__device__ float pixel_value(uint8_t x) {
  return static_cast<float>(x);
}
template <bool kPil, typename T>
__device__ float pixel_value(T x) {
  const float value = widen(x);
  return kPil ? floor_of(clamp(value, 0.0f, 1.0f) * 255.0f + 0.5f) : value;
}

// By one warp, a pixel a lane; weight [taps, kTile]. Returns nothing to a lane beyond the view.
__device__ inline void find_filters(const Resampling& r, int begin, bool mirrored, bool kept, Filters& f,
                                    float* weight) {
  const int lane = threadIdx.x % kWarp, place = begin + lane;
  Taps taps{0, 0};
  float sum = 1;
  if (place < r.out) {
    const int i = mirrored ? r.out - 1 - place : place;
    taps = taps_of(r, i);
    sum = 0;
    for (int t = 0; t < taps.count; ++t) {
      const float w = tap_weight(r, i, taps.first + t);
      if (kept) weight[t * kTile + lane] = w;
      sum += w;
    }
  }
  f.first[lane] = taps.first;
  f.count[lane] = taps.count;
  f.inverse[lane] = 1 / sum;
}

// The same in every thread and every run: a fixed order of additions.
template <int kThreads, typename A>
__device__ A sum_over_block(A value) {
  __shared__ A of_warp[kThreads / kWarp];  // one sum a block, so no second barrier before it is written again
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (int w = 1; w < kThreads / kWarp; ++w) value += of_warp[w];
  return value;
}

// A tile of sample first + blockIdx.y. The crop's rows come band by band: each is filtered across into shared memory,
// then the band's share is added to the tile's pixels, which lie in registers; so a crop may be of any size.
// `planes` [group, C, h, w] takes what is not finished here, `partial` [group, tiles] the sums of the grey values.
template <bool kPil, int kChannels, typename T>
__global__ void __launch_bounds__(kResampleThreads)
    resample_kernel(const Views views, const Images images, const Sample* __restrict__ samples, int64_t first,
                    int most_kept, float* __restrict__ planes, float* __restrict__ partial) {
  __shared__ float band[kBand][kChannels][kTile];
  __shared__ Filters across, down;
  extern __shared__ float shared_weights[];  // [2, most_kept, kTile]
  const int64_t n = first + blockIdx.y;
  const Sample& s = samples[n];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int x0 = blockIdx.x % views.tiles_across * kTile, y0 = blockIdx.x / views.tiles_across * kTile;
  const bool across_kept = most_taps(s.across) <= most_kept, down_kept = most_taps(s.down) <= most_kept;
  float *across_weight = shared_weights, *down_weight = shared_weights + most_kept * kTile;
  if (warp == 0) find_filters(s.across, x0, s.flip, across_kept, across, across_weight);
  if (warp == 1) find_filters(s.down, y0, false, down_kept, down, down_weight);
  __syncthreads();

  const Image image = image_of<T>(images, n % views.count);
  const T* crop = static_cast<const T*>(image.data) + s.top * image.row + s.left * image.column;
  const int last_row = min(kTile, views.height - y0) - 1;
  const int end = down.first[last_row] + down.count[last_row];
  const int x = x0 + lane, pixel_across = s.flip ? views.width - 1 - x : x;
  float sum[kRowsPerThread][kChannels] = {};
  for (int begin = down.first[0]; begin < end; begin += kBand) {
    const int rows = min(kBand, end - begin);
    for (int row = warp; row < rows; row += kResampleWarps) {
      const int tap = across.first[lane];
      const T* in = crop + (begin + row) * image.row + tap * image.column;
      float value[kChannels] = {};
      for (int t = 0; t < across.count[lane]; ++t, in += image.column) {
        const float weight =
            across_kept ? across_weight[t * kTile + lane] : tap_weight(s.across, pixel_across, tap + t);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) value[c] += weight * pixel_value<kPil>(in[c * image.channel]);
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) band[row][c][lane] = value[c] * across.inverse[lane];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRowsPerThread; ++j) {
      const int y = warp * kRowsPerThread + j, tap = down.first[y];
      for (int row = max(tap, begin); row < min(tap + down.count[y], begin + rows); ++row) {
        const float weight = down_kept ? down_weight[(row - tap) * kTile + y] : tap_weight(s.down, y0 + y, row);
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[j][c] += weight * band[row - begin][c][lane];
      }
    }
    __syncthreads();
  }

  float grey = 0;
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
    const int y = y0 + warp * kRowsPerThread + j;
    if (x >= views.width || y >= views.height) continue;
    float value[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      value[c] = sum[j][c] * down.inverse[y - y0];
      if (kPil) value[c] = floor_of(clamp(value[c], 0.0f, 255.0f) + 0.5f);
      if (!kPil && sizeof(T) == 1) value[c] *= 1.0f / 255.0f;
    }
    Rgb<float> p{value[0], value[kChannels / 2], value[kChannels - 1]};
    p = jitter<kPil>(p, s, 0, s.before, 0.0f);
    if (s.needs_mean) {
      grey += grey_value<kPil, kChannels>(p);
    } else if (s.grey) {
      p.r = p.g = p.b = grey_value<kPil, kChannels>(p);
    }
    float out[3] = {p.r, p.g, p.b};
    const int64_t pixels = views.pixels(), pixel = static_cast<int64_t>(y) * views.width + x;
    if (s.needs_mean || s.radius >= 0) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) planes[(blockIdx.y * kChannels + c) * pixels + pixel] = out[c];
    } else {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) value[c] = out[c];
      finish_pixel<kPil>(views, s, n, pixel, value);
    }
  }
  if (s.needs_mean) {
    grey = sum_over_block<kResampleThreads>(grey);
    if (threadIdx.x == 0) partial[blockIdx.y * static_cast<int64_t>(views.tiles) + blockIdx.x] = grey;
  }
}

}  // namespace
}  // namespace sslfast
