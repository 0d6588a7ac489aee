// The first pass over a view: crop, antialiased resize, flip, and the colours up to contrast, which needs the mean of
// the whole grey image. What needs neither that mean nor a blur is finished here.
#pragma once
#include "view_sample.h"

namespace sslfast {
namespace {

constexpr int kResampleThreads = 256;
constexpr int kResampleWarps = kResampleThreads / kWarp;
constexpr int kRowsPerThread = kTile / kResampleWarps;
constexpr int kBand = 48;  // rows of the crop held at once, which a tile needs up to a scale of about 1.3
constexpr int kHeld = 4;   // taps of a filter whose weights stay in registers

// How the pixels of a row lie: planes, all channels of a pixel side by side, or in any other way.
enum Layout : int { kPlanar, kInterleaved, kStrided };

// On the scale of the semantics but for the bytes of torchvision's, which the filters down divide by 255.
template <bool kPil>
__device__ float pixel_value(uint8_t x) {
  return static_cast<float>(x);
}
template <bool kPil, typename T>
__device__ float pixel_value(T x) {
  return kPil ? byte_of_unit(widen(x)) : widen(x);
}

__device__ inline int rounded(int sum) { return fixed_to_byte(sum); }
__device__ inline float rounded(float sum) { return sum; }

// One column of a tile, and its filter across.
template <bool kPil, int kChannels, typename T, int kLayout>
struct Across {
  using S = Sum<kPil>;
  static constexpr int kStep = kLayout == kPlanar ? 1 : (kLayout == kInterleaved ? kChannels : 0);

  Place taps;
  const S* weights;  // `apart` from each other
  int64_t apart, column, channel;
  S held[kHeld];
  bool wide;  // some lane of the warp has a third tap

  __device__ Across(const Sample& s, int x, int width)
      : taps{x < width ? s.across_places[x] : Place{}},
        weights(reinterpret_cast<const S*>(s.across_weights) + x),
        apart(width),
        column(kStep > 0 ? kStep : s.column),
        channel(kLayout == kInterleaved ? 1 : s.channel) {
#pragma unroll
    for (int t = 0; t < kHeld; ++t) held[t] = t < taps.count ? weights[t * apart] : S(0);
    wide = __ballot_sync(0xffffffffu, taps.count > 2) != 0;
  }

  // `in`: the pixel under the first tap; `out`: the first channel, kTile further the next.
  __device__ __forceinline__ void filter(const T* in, S* out) const {
    const T* from[kChannels];
    S value[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      value[c] = S(0);
      from[c] = in + c * channel;
    }
    const auto add = [&](int t, S weight) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        value[c] += weight * static_cast<S>(pixel_value<kPil>(from[c][t * column]));
      }
    };
    if (taps.count > 0) add(0, held[0]);
    if (taps.count > 1) add(1, held[1]);
    if (wide) {
      if (taps.count > 2) add(2, held[2]);
      if (taps.count > 3) add(3, held[3]);
#pragma unroll 1
      for (int t = kHeld; t < taps.count; ++t) add(t, weights[t * apart]);
    }
#pragma unroll
    for (int c = 0; c < kChannels; ++c) out[c * kTile] = rounded(value[c]);
  }
};

// The mean of a sample's grey image from the sums of its tiles, by the block that is the last of them to be done.
template <bool kPil>
__device__ void find_mean(const Views& views, float grey, float* partial, int tile, Progress& progress) {
  __shared__ bool last;
  grey = sum_over_block<kResampleThreads>(grey);
  if (threadIdx.x == 0) {
    partial[tile] = grey;
    __threadfence();
    last = atomicAdd(&progress.tiles, 1u) + 1 == static_cast<unsigned>(views.tiles);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  const volatile float* of_tile = partial;  // written by other blocks of this launch: not from a cache
  double sum = 0;
  for (int t = threadIdx.x; t < views.tiles; t += kResampleThreads) sum += of_tile[t];
  const double exact = sum_over_block<kResampleThreads>(sum) / static_cast<double>(views.pixels());
  if (threadIdx.x != 0) return;
  progress.mean = kPil ? static_cast<float>(static_cast<int>(exact + 0.5)) : static_cast<float>(exact);
}

// The pixels of one column and as many neighbouring rows, finished.
template <bool kPil, int kChannels>
__device__ void finish_column(const Views& views, const Sample& s, int64_t n, int x, int y,
                              const Rgb<float> (&p)[kRowsPerThread]) {
  const int rows = x < views.width ? min(kRowsPerThread, views.height - y) : 0;
  const int64_t pixel = static_cast<int64_t>(y) * views.width + x;
  const bool solarize = s.solarize;
  with_type(views, [&](auto element) {
    const int64_t row = static_cast<int64_t>(views.width) * (views.channels_last ? kChannels : 1);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      auto* to = place_of<decltype(element)>(views, n, c, pixel);
#pragma unroll
      for (int j = 0; j < kRowsPerThread; ++j) {
        if (j < rows) narrow(finished<kPil>(views, solarize, c, channel_of(p[j], c)), to + j * row);
      }
    }
  });
}

// A tile of sample first + blockIdx.z. The crop's rows come band by band: each is filtered across into shared memory,
// then the band's share is added to the tile's pixels, which lie in registers; so a crop may be of any size.
// `planes` [group, tiles, C, kTile, kTile] takes what is not finished here, `partial` [group, tiles] the sums of the
// grey values.
template <bool kPil, int kChannels, typename T, int kLayout>
__global__ void __launch_bounds__(kResampleThreads, 4)
    resample_kernel(const __grid_constant__ Views views, const Sample* __restrict__ samples, int64_t first,
                    float* __restrict__ planes, float* partial, Progress* progress) {
  using S = Sum<kPil>;
  __shared__ S band[kBand][kChannels][kTile];
  const int64_t n = first + blockIdx.z;
  const Sample& s = samples[n];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int x = blockIdx.x * kTile + lane, y0 = blockIdx.y * kTile, y = y0 + warp * kRowsPerThread;
  const Across<kPil, kChannels, T, kLayout> across(s, x, views.width);
  const Place top = s.down_places[y0], bottom = s.down_places[min(y0 + kTile, views.height) - 1];
  const int end = bottom.first + bottom.count, taps_down = s.taps_down;
  const Place* down_places = s.down_places + y;
  const S* down_weights = reinterpret_cast<const S*>(s.down_weights) + static_cast<int64_t>(y) * taps_down;
  const T* in = static_cast<const T*>(s.crop) + (top.first + warp) * s.row +
                static_cast<int64_t>(across.taps.first) * across.column;
  S sum[kRowsPerThread][kChannels] = {};
  for (int begin = top.first; begin < end; begin += kBand) {
    const int rows = min(kBand, end - begin);
    S* out = &band[warp][0][lane];
#pragma unroll 1
    for (int row = warp; row < rows; row += kResampleWarps) {
      across.filter(in, out);
      in += kResampleWarps * s.row;
      out += kResampleWarps * kChannels * kTile;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRowsPerThread; ++j) {
      if (y + j >= views.height) break;
      const Place taps = down_places[j];
      const S* weights = down_weights + j * taps_down;
      const int from = max(begin - taps.first, 0), to = min(taps.count, begin + rows - taps.first);
      const S* column = &band[0][0][lane] + (taps.first - begin) * (kChannels * kTile);
      const auto add = [&](int t, S weight) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[j][c] += weight * column[(t * kChannels + c) * kTile];
      };
      if (from == 0 && to <= kHeld) {
        const auto held = *reinterpret_cast<const Pack<S, 4>*>(weights);
        if (to > 0) add(0, held.of[0]);
        if (to > 1) add(1, held.of[1]);
        if (to > 2) {
          add(2, held.of[2]);
          if (to > 3) add(3, held.of[3]);
        }
      } else {
#pragma unroll 1
        for (int t = from; t < to; ++t) add(t, weights[t]);
      }
    }
    __syncthreads();
  }

  Rgb<float> p[kRowsPerThread];
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
    float value[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) value[c] = static_cast<float>(rounded(sum[j][c]));
    p[j] = {value[0], value[kChannels / 2], value[kChannels - 1]};
  }
  jitter<kPil>(p, s, 0, s.before, 0.0f);
  if (s.grey && !s.needs_mean) make_grey<kPil>(p);
  if (!s.needs_mean && s.radius < 0) return finish_column<kPil, kChannels>(views, s, n, x, y, p);
  const int tile = blockIdx.y * gridDim.x + blockIdx.x;
  float* to = tile_of<kChannels>(planes, views, blockIdx.z, tile) + warp * kRowsPerThread * kTile + lane;
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) to[c * kTilePixels + j * kTile] = channel_of(p[j], c);
  }
  if (!s.needs_mean) return;
  float grey = 0;
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
    if (x < views.width && y + j < views.height) grey += grey_value<kPil, kChannels>(p[j]);
  }
  find_mean<kPil>(views, grey, partial + blockIdx.z * static_cast<int64_t>(views.tiles), tile, progress[n]);
}

}  // namespace
}  // namespace sslfast
