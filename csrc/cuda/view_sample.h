// What a view of an image, one sample, is made of, as the kernels of augment_views see it: where the image lies, what
// its parameters say once they are read and made safe, and how its pixels are written.
#pragma once
#include <cuda_runtime.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../common/blur.h"
#include "../common/pixel.h"
#include "../common/resample.h"
#include "../common/view_params.h"

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
};

// One batch, or the table of a ragged list in device memory.
struct Images {
  Image batch;
  int64_t step;  // elements from one image of the batch to the next
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

// One row of parameters, in the form in which the kernels use it.
struct Sample {
  Resampling down, across;
  int top, left;
  int radius;         // of the blur; −1: none
  int before, after;  // order[0 … before) precedes contrast, order[before … after) begins with it
  int order[4];
  float factor[4];  // of the operation at the same place in the order
  Box3 box;         // of PIL's blur
  bool flip, needs_mean, grey, solarize;
};

template <typename T>
__device__ Image image_of(const Images& images, int64_t b) {
  if (images.list) return images.list[b];
  Image image = images.batch;
  image.data = static_cast<const T*>(image.data) + b * images.step;
  return image;
}

// A whole number from a parameter, whatever it holds: NaN is `low`.
__device__ inline int whole(float x, int low, int high) {
  if (!(x >= static_cast<float>(low))) return low;
  return x >= static_cast<float>(high) ? high : static_cast<int>(x);
}

// One thread a sample. Crops are cut to the image, so that no parameter makes a kernel read beyond it. `half_filters`
// [samples, kHalfFilter] takes the weights of torchvision's blur, which every block of the sample then shares.
template <bool kPil>
__global__ void prepare_kernel(const Views views, const Images images, const float* __restrict__ params,
                               Sample* __restrict__ samples, float* __restrict__ half_filters) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= views.samples) return;
  const float* row = params + n * kColumns;
  const Image& image = images.list ? images.list[n % views.count] : images.batch;
  Sample& s = samples[n];
  const int top = whole(row[kTop], 0, image.height - 1), left = whole(row[kLeft], 0, image.width - 1);
  s.top = top;
  s.left = left;
  s.down = resampling(whole(row[kHeight], 1, image.height - top), views.height, views.cubic);
  s.across = resampling(whole(row[kWidth], 1, image.width - left), views.width, views.cubic);
  s.flip = row[kFlip] != 0;
  s.grey = views.channels == 3 && row[kGrey] != 0;
  s.solarize = row[kSolarize] != 0;

  int before = 0, after = 0;
  bool needs_mean = false;
  for (int k = 0; k < 4; ++k) {
    const float wanted = row[kOrder0 + k];
    const int operation = wanted >= 0 && wanted <= 3 ? static_cast<int>(wanted) : kNoJitter;
    if (operation == kNoJitter || (views.channels == 1 && operation >= kJitterSaturation)) continue;
    if (operation == kJitterContrast) {
      if (needs_mean) continue;  // once at most: the second would need another mean
      needs_mean = true;
      before = after;
    }
    s.order[after] = operation;
    s.factor[after++] = row[kBrightness + operation];
  }
  s.before = needs_mean ? before : after;
  s.after = after;
  s.needs_mean = needs_mean;
  s.radius = -1;
  if (!(row[kSigma] > 0)) return;
  const float sigma = fminf(row[kSigma], 1e6f);  // beyond it nothing changes, but whole numbers overflow
  if constexpr (kPil) {
    s.box = box_of_sigma(sigma);
    s.radius = 3 * (s.box.radius + 1);
  } else {
    s.radius = gaussian_weights(sigma, views.blur_limit, half_filters + n * kHalfFilter);
  }
}

// order[begin … end) on one pixel.
template <bool kPil>
__device__ Rgb<float> jitter(Rgb<float> p, const Sample& s, int begin, int end, float mean) {
  for (int k = begin; k < end; ++k) p = jittered<kPil>(p, s.order[k], s.factor[k], mean);
  return p;
}

// A single channel is its own grey image.
template <bool kPil, int kChannels>
__device__ float grey_value(const Rgb<float>& p) {
  return kChannels == 1 ? p.r : grey_of<kPil>(p);
}

template <typename T, int kChannels>
__device__ void write_pixel(const Views& views, int64_t n, int64_t pixel, const float (&value)[kChannels]) {
  const int64_t pixels = views.pixels(), step = views.channels_last ? 1 : pixels;
  T* out = static_cast<T*>(views.result) + n * pixels * kChannels + pixel * (views.channels_last ? kChannels : 1);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) narrow(value[c], out + c * step);
}

// The last steps, solarize and normalise, and out.
template <bool kPil, int kChannels>
__device__ void finish_pixel(const Views& views, const Sample& s, int64_t n, int64_t pixel, float (&value)[kChannels]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (s.solarize) value[c] = solarized<kPil>(value[c], views.threshold);
    value[c] = value[c] * views.scale[c] + views.shift[c];
  }
  switch (views.dtype) {
    case torch::headeronly::ScalarType::BFloat16: return write_pixel<bf16>(views, n, pixel, value);
    case torch::headeronly::ScalarType::Half: return write_pixel<fp16>(views, n, pixel, value);
    default: return write_pixel<float>(views, n, pixel, value);
  }
}

}  // namespace
}  // namespace sslfast
