// The first pass over a view: crop, antialiased resize, flip, and the colours up to contrast, which needs the mean of
// the whole grey image. What needs neither that mean nor a blur is finished here.
#pragma once
#include <type_traits>

#include "view_sample.h"

namespace sslfast {
namespace {

constexpr int kResampleThreads = 256;
constexpr int kResampleWarps = kResampleThreads / kWarp;
constexpr int kRowsPerThread = kTile / kResampleWarps;
constexpr int kBand = 48;      // rows of the crop held at once, which a tile needs up to a scale of about 1.3
constexpr int kMostTaps = 64;  // a filter of more pixels is weighed anew for every product

// What is summed: floats, or in PIL's semantics bytes times weights in fixed point, columns first, with a byte between.
template <bool kPil>
using Sum = std::conditional_t<kPil, int, float>;

// The filters of a tile's pixels along one axis.
struct Filters {
  double sum[kTile];               // of the weights
  int first[kTile], count[kTile];  // beyond the view's edge: none
};
static_assert((3 * kBand + 2 * kMostTaps) * kTile * sizeof(float) + 2 * sizeof(Filters) + 1024 <= kSharedBytes);
static_assert(kTile <= kBand);

// On the scale of the semantics but for the bytes of torchvision's, which are divided by 255 once they are resampled.
template <bool kPil>
__device__ float pixel_value(uint8_t x) {
  return static_cast<float>(x);
}
template <bool kPil, typename T>
__device__ float pixel_value(T x) {
  return kPil ? byte_of_unit(widen(x)) : widen(x);
}

template <bool kPil>
__device__ Sum<kPil> weight_of(const Resampling& r, int i, int pixel, double sum) {
  const double weight = tap_weight(r, i, pixel) / sum;
  if constexpr (kPil) {
    return fixed_weight(weight);
  } else {
    return static_cast<float>(weight);
  }
}

__device__ inline int rounded(int sum) { return fixed_to_byte(sum); }
__device__ inline float rounded(float sum) { return sum; }

// By one warp, a pixel a lane; weight [taps, kTile], where they are kept.
template <bool kPil>
__device__ void find_filters(const Resampling& r, int begin, bool mirrored, bool kept, Filters& f, Sum<kPil>* weight) {
  const int lane = threadIdx.x % kWarp, place = begin + lane, i = mirrored ? r.out - 1 - place : place;
  Taps taps{0, 0};
  double sum = 0;
  if (place < r.out) taps = taps_of(r, i);
  for (int t = 0; t < taps.count; ++t) sum += tap_weight(r, i, taps.first + t);
  for (int t = 0; kept && t < taps.count; ++t) weight[t * kTile + lane] = weight_of<kPil>(r, i, taps.first + t, sum);
  f.sum[lane] = sum;
  f.first[lane] = taps.first;
  f.count[lane] = taps.count;
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
__global__ void __launch_bounds__(kResampleThreads, 3)
    resample_kernel(const Views views, const Images images, const Sample* __restrict__ samples, int64_t first,
                    int most_kept, float* __restrict__ planes, float* __restrict__ partial) {
  using S = Sum<kPil>;
  __shared__ S band[kBand][kChannels][kTile];
  __shared__ Filters across, down;
  extern __shared__ float shared_weights[];  // [2, most_kept, kTile] of S, which is as large
  const int64_t n = first + blockIdx.y;
  const Sample& s = samples[n];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int x0 = blockIdx.x % views.tiles_across * kTile, y0 = blockIdx.x / views.tiles_across * kTile;
  const bool across_kept = most_taps(s.across) <= most_kept, down_kept = most_taps(s.down) <= most_kept;
  S *across_weight = reinterpret_cast<S*>(shared_weights), *down_weight = across_weight + most_kept * kTile;
  if (warp == 0) find_filters<kPil>(s.across, x0, s.flip, across_kept, across, across_weight);
  if (warp == 1) find_filters<kPil>(s.down, y0, false, down_kept, down, down_weight);
  __syncthreads();

  const Image image = image_of<T>(images, n % views.count);
  const T* crop = static_cast<const T*>(image.data) + s.top * image.row + s.left * image.column;
  const int last_row = min(kTile, views.height - y0) - 1;
  const int end = down.first[last_row] + down.count[last_row];
  const int x = x0 + lane, pixel_across = s.flip ? views.width - 1 - x : x;
  S sum[kRowsPerThread][kChannels] = {};
  for (int begin = down.first[0]; begin < end; begin += kBand) {
    const int rows = min(kBand, end - begin);
    for (int row = warp; row < rows; row += kResampleWarps) {
      const int tap = across.first[lane];
      const T* in = crop + (begin + row) * image.row + tap * image.column;
      S value[kChannels] = {};
      const auto add = [&](S weight) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c)
          value[c] += weight * static_cast<S>(pixel_value<kPil>(in[c * image.channel]));
        in += image.column;
      };
      if (across_kept) {
        for (int t = 0; t < across.count[lane]; ++t) add(across_weight[t * kTile + lane]);
      } else {
#pragma unroll 1
        for (int t = 0; t < across.count[lane]; ++t)
          add(weight_of<kPil>(s.across, pixel_across, tap + t, across.sum[lane]));
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) band[row][c][lane] = rounded(value[c]);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRowsPerThread; ++j) {
      const int y = warp * kRowsPerThread + j, tap = down.first[y];
      const int from = max(tap, begin), to = min(tap + down.count[y], begin + rows);
      const auto add = [&](int row, S weight) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) sum[j][c] += weight * band[row - begin][c][lane];
      };
      if (down_kept) {
        for (int row = from; row < to; ++row) add(row, down_weight[(row - tap) * kTile + y]);
      } else {
#pragma unroll 1
        for (int row = from; row < to; ++row) add(row, weight_of<kPil>(s.down, y0 + y, row, down.sum[y]));
      }
    }
    __syncthreads();
  }

  // The pixels go on one by one, through the thread's own places in the band: all at once would need as much more code.
#pragma unroll
  for (int j = 0; j < kRowsPerThread; ++j) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      band[warp * kRowsPerThread + j][c][lane] = rounded(sum[j][c]);
    }
  }
  float grey = 0;
#pragma unroll 1
  for (int j = 0; j < kRowsPerThread; ++j) {
    const int row = warp * kRowsPerThread + j, y = y0 + row;
    if (x >= views.width || y >= views.height) break;
    constexpr float kScale = !kPil && sizeof(T) == 1 ? 1.0f / 255.0f : 1.0f;
    Rgb<float> p{kScale * band[row][0][lane], kScale * band[row][kChannels / 2][lane],
                 kScale * band[row][kChannels - 1][lane]};
    p = jitter<kPil>(p, s, 0, s.before, 0.0f);
    if (s.needs_mean) {
      grey += grey_value<kPil, kChannels>(p);
    } else if (s.grey) {
      p.r = p.g = p.b = grey_value<kPil, kChannels>(p);
    }
    const float colours[3] = {p.r, p.g, p.b};
    float value[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) value[c] = colours[c];
    const int64_t pixels = views.pixels(), pixel = static_cast<int64_t>(y) * views.width + x;
    if (s.needs_mean || s.radius >= 0) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) planes[(blockIdx.y * kChannels + c) * pixels + pixel] = value[c];
    } else {
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
