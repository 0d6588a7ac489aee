// The pass over a view after the first, where there is contrast: the colours from there on.
#pragma once
#include "view_sample.h"

namespace sslfast {
namespace {

constexpr int kColourPixels = 4;  // a thread, side by side
constexpr int kColourThreads = kTilePixels / kColourPixels;
constexpr int kColourLanes = kTile / kColourPixels;  // of a row

// Neighbouring pixels, finished: four numbers at once where all rows of the view are whole fours.
template <bool kPil, int kChannels>
__device__ void finish_run(const Views& views, const Sample& s, int64_t n, int x, int y,
                           const Rgb<float> (&p)[kColourPixels]) {
  const int count = y < views.height ? min(kColourPixels, views.width - x) : 0;
  const bool whole = views.width % kColourPixels == 0, solarize = s.solarize;
  if (count <= 0) return;
  const int64_t pixel = static_cast<int64_t>(y) * views.width + x;
  with_type(views, [&](auto element) {
    using T = decltype(element);
    const auto write = [&](auto last) {  // the numbers that lie side by side are those of a pixel, or of a channel
      constexpr bool kLast = decltype(last)::value;
      Pack<T, 4> run[kChannels];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int i = 0; i < kColourPixels; ++i) {
          const int at = kLast ? i * kChannels + c : c * kColourPixels + i;
          narrow(finished<kPil>(views, solarize, c, channel_of(p[i], c)), &run[at / 4].of[at % 4]);
        }
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        T* to = kLast ? place_of<T>(views, n, 0, pixel) + c * 4 : place_of<T>(views, n, c, pixel);
        if (whole) {
          *reinterpret_cast<Pack<T, 4>*>(to) = run[c];
          continue;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if ((kLast ? (c * 4 + i) / kChannels : i) < count) to[i] = run[c].of[i];
        }
      }
    };
    views.channels_last ? write(std::true_type{}) : write(std::false_type{});
  });
}

// Contrast, what comes after it, and grey, on a tile of sample first + blockIdx.z. A block whose sample has no need of
// that leaves at once.
template <bool kPil, int kChannels>
__global__ void __launch_bounds__(kColourThreads)
    colour_kernel(const __grid_constant__ Views views, const Sample* __restrict__ samples,
                  const Progress* __restrict__ progress, int64_t first, float* __restrict__ planes) {
  const int64_t n = first + blockIdx.z;
  const Sample& s = samples[n];
  if (!s.needs_mean) return;
  const int tile = blockIdx.y * gridDim.x + blockIdx.x;
  float* at = tile_of<kChannels>(planes, views, blockIdx.z, tile) + threadIdx.x * kColourPixels;
  Pack<float, 4> value[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) value[c] = *reinterpret_cast<const Pack<float, 4>*>(at + c * kTilePixels);
  Rgb<float> p[kColourPixels];
#pragma unroll
  for (int i = 0; i < kColourPixels; ++i) {
    p[i] = {value[0].of[i], value[kChannels / 2].of[i], value[kChannels - 1].of[i]};
  }
  jitter<kPil>(p, s, s.before, s.after, progress[n].mean);
  if (s.grey) make_grey<kPil>(p);
  if (s.radius < 0) {
    const int x = blockIdx.x * kTile + threadIdx.x % kColourLanes * kColourPixels;
    return finish_run<kPil, kChannels>(views, s, n, x, blockIdx.y * kTile + threadIdx.x / kColourLanes, p);
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
#pragma unroll
    for (int i = 0; i < kColourPixels; ++i) value[c].of[i] = channel_of(p[i], c);
    *reinterpret_cast<Pack<float, 4>*>(at + c * kTilePixels) = value[c];
  }
}

}  // namespace
}  // namespace sslfast
