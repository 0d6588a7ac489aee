// The passes over a view after the first: the colours from contrast on, and the blur. A block whose sample has no need
// of the pass leaves at once.
#pragma once
#include "view_resample.h"

namespace sslfast {
namespace {

constexpr int kColourThreads = 256;
constexpr int kColourPixels = 4;  // a thread
constexpr int kBlurThreads = 128;
constexpr int kBlurWarps = kBlurThreads / kWarp;
constexpr int kRun = kTile / kBlurWarps;  // neighbours that a thread filters together
constexpr int kMiddle = kTile + 1;        // floats of a row filtered across: odd, so that a warp meets every bank

// Contrast, what comes after it, and grey, on 1024 pixels of sample first + blockIdx.y.
template <bool kPil, int kChannels>
__global__ void __launch_bounds__(kColourThreads)
    colour_kernel(const Views views, const Sample* __restrict__ samples, int64_t first, float* __restrict__ planes,
                  const float* __restrict__ partial) {
  const int64_t n = first + blockIdx.y, pixels = views.pixels();
  const Sample& s = samples[n];
  if (!s.needs_mean) return;
  double sum = 0;
  for (int t = threadIdx.x; t < views.tiles; t += kColourThreads) {
    sum += partial[blockIdx.y * static_cast<int64_t>(views.tiles) + t];
  }
  const double exact = sum_over_block<kColourThreads>(sum) / static_cast<double>(pixels);
  const auto mean = kPil ? static_cast<float>(static_cast<int>(exact + 0.5)) : static_cast<float>(exact);
  float* plane = planes + blockIdx.y * kChannels * pixels;
#pragma unroll 1
  for (int k = 0; k < kColourPixels; ++k) {
    const int64_t pixel = (static_cast<int64_t>(blockIdx.x) * kColourPixels + k) * kColourThreads + threadIdx.x;
    if (pixel >= pixels) return;
    Rgb<float> p{plane[pixel], plane[kChannels / 2 * pixels + pixel], plane[(kChannels - 1) * pixels + pixel]};
    p = jitter<kPil>(p, s, s.before, s.after, mean);
    if (s.grey) p.r = p.g = p.b = grey_value<kPil, kChannels>(p);
    const float colours[3] = {p.r, p.g, p.b};
    float value[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) value[c] = colours[c];
    if (s.radius >= 0) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) plane[c * pixels + pixel] = value[c];
    } else {
      finish_pixel<kPil>(views, s, n, pixel, value);
    }
  }
}

// How a filter of 2·radius + 1 weights runs over kRun neighbours at once: in groups of kRun taps, weights of 0 at the
// end.
__host__ __device__ constexpr int tap_groups(int radius) { return (2 * radius + kRun - 1) / kRun + 1; }
// Columns of the tile with its border, odd, for a warp that reads one column of 32 rows.
__host__ __device__ constexpr int bordered(int radius) { return (kTile - kRun + tap_groups(radius) * kRun) | 1; }

__host__ constexpr size_t blur_shared_bytes(int radius) {
  return (static_cast<size_t>(kTile) * (bordered(radius) + kMiddle) + tap_groups(radius) * kRun) * sizeof(float);
}
static_assert(blur_shared_bytes(kMaxBlurRadius) <= kSharedBytes);

// sum[j] += Σ_i weight[i − j] value[i] over one group of taps i. `window` holds the last kRun weights, weight[i] at
// place i mod kRun: a weight and a value are loaded once for kRun products each.
__device__ inline void add_taps(const float* value, int step, const float* weight, float (&window)[kRun],
                                float (&sum)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    window[i] = weight[i];
    const float v = value[i * step];
#pragma unroll
    for (int j = 0; j < kRun; ++j) sum[j] += window[(i - j + kRun) % kRun] * v;
  }
}

// Torchvision's blur of a tile, a channel at a time, kTile rows of its border at a time: filtered across by lanes that
// stand on rows, then down by lanes that stand on columns. The zero weights that pad the filter meet up to kRun − 1
// pixels more on either side, so a NaN or an infinity spreads that much further than the filter.
template <int kChannels>
__global__ void __launch_bounds__(kBlurThreads)
    gaussian_kernel(const Views views, const Sample* __restrict__ samples, int64_t first,
                    const float* __restrict__ half_filters, const float* __restrict__ planes) {
  extern __shared__ float shared_tile[];
  const int64_t n = first + blockIdx.y, pixels = views.pixels();
  const Sample& s = samples[n];
  const int radius = s.radius;
  if (radius < 0) return;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int groups = tap_groups(radius), pitch = bordered(radius);
  float *tile = shared_tile, *middle = tile + kTile * pitch, *filter = middle + kTile * kMiddle;
  for (int t = threadIdx.x; t < groups * kRun; t += kBlurThreads) {
    filter[t] = t <= 2 * radius ? half_filters[n * kHalfFilter + abs(t - radius)] : 0.0f;
  }
  const int x0 = blockIdx.x % views.tiles_across * kTile, y0 = blockIdx.x / views.tiles_across * kTile;
  float down[kChannels][kRun] = {};
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float* plane = planes + (blockIdx.y * kChannels + c) * pixels;
    float down_window[kRun] = {};
    for (int begin = 0; begin < groups + kBlurWarps - 1; begin += kBlurWarps) {  // in groups of kRun rows
      for (int row = warp; row < kTile; row += kBlurWarps) {
        const float* in =
            plane + static_cast<int64_t>(inside<false>(y0 - radius + begin * kRun + row, views.height)) * views.width;
        for (int x = lane; x < pitch; x += kWarp)
          tile[row * pitch + x] = in[inside<false>(x0 - radius + x, views.width)];
      }
      __syncthreads();
      float across[kRun] = {}, window[kRun] = {};
      const float* value = tile + lane * pitch + warp * kRun;
      for (int g = 0; g < groups; ++g) add_taps(value + g * kRun, 1, filter + g * kRun, window, across);
#pragma unroll
      for (int j = 0; j < kRun; ++j) middle[lane * kMiddle + warp * kRun + j] = across[j];
      __syncthreads();
      for (int k = 0; k < kBlurWarps; ++k) {
        const int g = begin + k - warp;  // this group of rows, counted from the first that the warp needs
        if (g < 0 || g >= groups) continue;
        add_taps(middle + k * kRun * kMiddle + lane, kMiddle, filter + g * kRun, down_window, down[c]);
      }
      // No barrier: the next write to `middle` waits for the one after the loads, and `tile` is no longer read.
    }
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const int x = x0 + lane, y = y0 + warp * kRun + j;
    if (x >= views.width || y >= views.height) continue;
    float value[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) value[c] = down[c][j];
    finish_pixel<false>(views, s, n, static_cast<int64_t>(y) * views.width + x, value);
  }
}

// A box filter at `place` of a line of bytes, of which place 0 is pixel `origin` of an image of this size.
__device__ inline uint8_t box_at(const Box3& box, const uint8_t* line, int step, int place, int origin, int size) {
  const auto at = [&](int t) -> uint32_t { return line[(inside<true>(origin + place + t, size) - origin) * step]; };
  uint32_t sum = 0;
  for (int t = -box.radius; t <= box.radius; ++t) sum += at(t);
  return static_cast<uint8_t>(boxed<uint32_t>(box, sum, at(-box.radius - 1) + at(box.radius + 1)));
}

constexpr size_t kBoxBytes = 4 * kTile * (kTile + 2 * kMaxBlurRadius);
static_assert(kBoxBytes <= kSharedBytes);

// PIL's blur of a tile, a channel at a time: three boxes along each of the rows with their border, then three along
// the columns. Every box leaves the outermost radius + 1 of its line unknown; beyond the image the border pixel is
// repeated.
template <int kChannels>
__global__ void __launch_bounds__(kBlurThreads, 6)
    box_kernel(const Views views, const Sample* __restrict__ samples, int64_t first, const float* __restrict__ planes) {
  extern __shared__ float shared_tile[];
  const int64_t n = first + blockIdx.y, pixels = views.pixels();
  const Sample& s = samples[n];
  if (s.radius < 0) return;
  const Box3 box = s.box;
  const int reach = s.radius, wide = kTile + 2 * reach, lost = box.radius + 1;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  auto* rows = reinterpret_cast<uint8_t*>(shared_tile);  // [2, kTile, wide]
  uint8_t* columns = rows + 2 * kTile * wide;            // [2, wide, kTile]
  const int size = kTile * wide;
  const int x0 = blockIdx.x % views.tiles_across * kTile, y0 = blockIdx.x / views.tiles_across * kTile;
  float result[kChannels][kRun];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const float* plane = planes + (blockIdx.y * kChannels + c) * pixels;
    for (int begin = 0; begin < wide; begin += kTile) {
      const int count = min(kTile, wide - begin);
      for (int row = warp; row < count; row += kBlurWarps) {
        const int y = inside<true>(y0 - reach + begin + row, views.height);
        for (int x = lane; x < wide; x += kWarp) {
          const float value = plane[static_cast<int64_t>(y) * views.width + inside<true>(x0 - reach + x, views.width)];
          rows[row * wide + x] = static_cast<uint8_t>(value);
        }
      }
      __syncthreads();
      for (int pass = 0; pass < 3; ++pass) {
        const uint8_t* from = rows + pass % 2 * size;
        uint8_t* to = rows + (pass + 1) % 2 * size;
        for (int row = warp; row < count; row += kBlurWarps) {
          for (int x = (pass + 1) * lost + lane; x < wide - (pass + 1) * lost; x += kWarp) {
            to[row * wide + x] = box_at(box, from + row * wide, 1, x, x0 - reach, views.width);
          }
        }
        __syncthreads();
      }
      for (int row = warp; row < count; row += kBlurWarps) {
        columns[(begin + row) * kTile + lane] = rows[size + row * wide + reach + lane];
      }
    }
    __syncthreads();
    for (int pass = 0; pass < 3; ++pass) {
      const uint8_t* from = columns + pass % 2 * size;
      uint8_t* to = columns + (pass + 1) % 2 * size;
      for (int y = (pass + 1) * lost + warp; y < wide - (pass + 1) * lost; y += kBlurWarps) {
        to[y * kTile + lane] = box_at(box, from + lane, kTile, y, y0 - reach, views.height);
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) result[c][j] = columns[size + (reach + warp * kRun + j) * kTile + lane];
  }
#pragma unroll
  for (int j = 0; j < kRun; ++j) {
    const int x = x0 + lane, y = y0 + warp * kRun + j;
    if (x >= views.width || y >= views.height) continue;
    float value[kChannels];
#pragma unroll
    for (int c = 0; c < kChannels; ++c) value[c] = result[c][j];
    finish_pixel<true>(views, s, n, static_cast<int64_t>(y) * views.width + x, value);
  }
}

}  // namespace
}  // namespace sslfast
