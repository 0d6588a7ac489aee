// What a view of an image, one sample, is made of, as the kernels of augment_views see it: where the crop lies and its
// filters, what the other parameters say, what lies between the passes, and how pixels are coloured and written.
#pragma once
#include <cuda_runtime.h>
#include <torch/headeronly/core/ScalarType.h>

#include <type_traits>

#include "common/blur.h"
#include "common/pixel.h"
#include "common/resample.h"
#include "common/view_params.h"

namespace sslfast {
namespace {

constexpr int kWarp = 32;
constexpr int kTile = 32;  // a block makes kTile × kTile pixels of a view
constexpr int kHalfFilter = kMaxBlurRadius + 1;
constexpr size_t kSharedBytes = 48 << 10;  // what a block may have without asking for more

struct Image {
  const void* data;
  int64_t channel, row, column;  // strides in elements
  int height, width;
  int taps_down, taps_across;  // of a filter, at most; down, a multiple of four
  int64_t weights;             // where its filters' begin among those of all images; of a batch: how many an image has
};

// One batch, or the table of a ragged list in device memory.
struct Images {
  Image batch;
  int64_t step;     // elements from one image of the batch to the next
  int64_t weights;  // of the filters of one view of all images
  const Image* list;
};

// What all samples of a call have in common. Sample n is view n / B of image n % B.
struct Views {
  int64_t samples, count;  // V·B, B
  int height, width;       // of a view
  int tiles_across, tiles;
  int channels;
  int blur_limit;  // half the kernel
  bool cubic, channels_last;
  torch::headeronly::ScalarType dtype;
  float threshold;
  float scale[3], shift[3];  // normalisation: x · scale + shift
  void* result;              // [V, B, C, h, w] or [V, B, h, w, C]

  __host__ __device__ int64_t pixels() const { return static_cast<int64_t>(height) * width; }
};

// Where a filter lies in the crop, loaded at once.
struct alignas(8) Place : Taps {};

// What lies between the passes: the tiles of a sample one after the other, kTile × kTile floats of every channel each,
// beyond the view's edge too; so a thread has its pixels of a tile at distances that are known when it is compiled.
constexpr int kTilePixels = kTile * kTile;

template <int kChannels>
__device__ float* tile_of(float* planes, const Views& views, int64_t sample, int tile) {
  return planes + (sample * views.tiles + tile) * (kChannels * kTilePixels);
}

// Row y of channel c, column x, is at places.column(x, c) + places.row(y) · kTile. Rows are few and used again and
// again, so they are looked up, as an int each.
struct Places {
  int tiles_across, channels;

  __device__ int row(int y) const { return y / kTile * tiles_across * channels * kTile + y % kTile; }
  __device__ int64_t column(int x, int c) const {
    return (static_cast<int64_t>(x / kTile) * channels + c) * kTilePixels + x % kTile;
  }
};

// One row of parameters, in the form in which the kernels use it.
struct Sample {
  const void* crop;                          // the first pixel of it,
  int64_t channel, row, column;              // and from there to the others, in elements
  const Place *down_places, *across_places;  // [h] and [w]
  // Torchvision's down weights turn bytes into numbers from 0 to 1, too.
  const float *down_weights, *across_weights;  // [h, image.taps_down] and [image.taps_across, w], of Sum<kPil>
  int taps_down;
  int radius;         // of the blur; −1: none
  int before, after;  // order[0 … before) precedes contrast, order[before … after) begins with it
  int order[4];
  float factor[4];  // of the operation at the same place in the order
  Box3 box;         // of PIL's blur
  bool needs_mean, grey, solarize;
};

// What becomes known of a sample on the way: how many tiles have been resampled, and the mean of the grey image.
struct Progress {
  unsigned tiles;
  float mean;
};

// What is loaded or stored at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Pack {
  T of[kCount];
};

// What is summed: floats, or in PIL's semantics bytes times weights in fixed point, columns first, with a byte between.
template <bool kPil>
using Sum = std::conditional_t<kPil, int, float>;

// order[begin … end) on some pixels.
template <bool kPil, int kCount>
__device__ void jitter(Rgb<float> (&p)[kCount], const Sample& s, int begin, int end, float mean) {
  for (int k = begin; k < end; ++k) {
    const float factor = s.factor[k];
    const auto all = [&](auto operation) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) p[i] = jittered<kPil>(p[i], decltype(operation)::value, factor, mean);
    };
    switch (s.order[k]) {
      case kJitterBrightness: all(std::integral_constant<int, kJitterBrightness>{}); break;
      case kJitterContrast: all(std::integral_constant<int, kJitterContrast>{}); break;
      case kJitterSaturation: all(std::integral_constant<int, kJitterSaturation>{}); break;
      default: all(std::integral_constant<int, kJitterHue>{});
    }
  }
}

// A single channel is its own grey image.
template <bool kPil, int kChannels>
__device__ float grey_value(const Rgb<float>& p) {
  return kChannels == 1 ? p.r : grey_of<kPil>(p);
}

template <bool kPil, int kCount>
__device__ void make_grey(Rgb<float> (&p)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) p[i].r = p[i].g = p[i].b = grey_of<kPil>(p[i]);
}

__device__ inline float channel_of(const Rgb<float>& p, int c) { return c == 0 ? p.r : (c == 1 ? p.g : p.b); }

// In thread 0: the same in every run, a fixed order of additions.
template <int kThreads, typename A>
__device__ A sum_over_block(A value) {
  __shared__ A of_warp[kThreads / kWarp];  // one sum a block, so no second barrier before it is written again
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x != 0) return value;
  value = of_warp[0];
  for (int w = 1; w < kThreads / kWarp; ++w) value += of_warp[w];
  return value;
}

// The last steps, solarize and normalise.
template <bool kPil>
__device__ float finished(const Views& views, bool solarize, int c, float value) {
  if (solarize) value = solarized<kPil>(value, views.threshold);
  return value * views.scale[c] + views.shift[c];
}

// Calls write(T{}) with the type of the result.
template <typename F>
__device__ void with_type(const Views& views, F write) {
  switch (views.dtype) {
    case torch::headeronly::ScalarType::BFloat16: return write(bf16{});
    case torch::headeronly::ScalarType::Half: return write(fp16{});
    default: return write(float{});
  }
}

// Where channel c of a pixel of sample n is written.
template <typename T>
__device__ T* place_of(const Views& views, int64_t n, int c, int64_t pixel) {
  const int64_t pixels = views.pixels();
  T* view = static_cast<T*>(views.result) + n * pixels * views.channels;
  return view + (views.channels_last ? pixel * views.channels + c : c * pixels + pixel);
}

}  // namespace
}  // namespace sslfast
