// Before any pixel is read: the rows of parameters are made safe, and the filters of every sample are made once.
#pragma once
#include "view_sample.h"

namespace sslfast {
namespace {

constexpr int kPrepareThreads = 128;

// A whole number from a parameter, whatever it holds: NaN is `low`.
__device__ __forceinline__ int whole(float x, int low, int high) {
  if (!(x >= static_cast<float>(low))) return low;
  return x >= static_cast<float>(high) ? high : static_cast<int>(x);
}

// What prepare_kernel fills.
struct Prepared {
  int pixel_bytes;      // of the images
  double white;         // what the weights of a filter down add up to: 1, or 1/255
  Sample* samples;      // [V·B]
  Progress* progress;   // [V·B]
  Place* places;        // [V·B, h + w]
  float* weights;       // [V·B, ...], of an image as many as image.weights leaves room for
  float* half_filters;  // [V·B, kHalfFilter]: of torchvision's blur
};

// Jitter operations and switches from a row of parameters.
__device__ __forceinline__ void read_colours(const float* row, int channels, Sample& s) {
  s.grey = channels == 3 && row[kGrey] != 0;
  s.solarize = row[kSolarize] != 0;
  int before = 0, after = 0;
  bool needs_mean = false;
  for (int k = 0; k < 4; ++k) {
    const float wanted = row[kOrder0 + k];
    const int operation = wanted >= 0 && wanted <= 3 ? static_cast<int>(wanted) : kNoJitter;
    if (operation == kNoJitter || (channels == 1 && operation >= kJitterSaturation)) continue;
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
}

template <bool kPil>
__device__ __forceinline__ void read_blur(float sigma, int limit, Sample& s, float* half_filter) {
  s.radius = -1;
  if (!(sigma > 0)) return;
  sigma = fminf(sigma, 1e6f);  // beyond it nothing changes, but whole numbers overflow
  if constexpr (kPil) {
    s.box = box_of_sigma(sigma);
    s.radius = 3 * (s.box.radius + 1);
  } else {
    s.radius = gaussian_weights(sigma, limit, half_filter);
  }
}

// The filter of output pixel i: where it lies, and its weights, whose sum is `white`, `step` apart.
template <bool kPil>
__device__ __forceinline__ void find_filter(const Resampling& r, int i, double white, Place* place, float* weights,
                                            int64_t step) {
  const Taps taps = taps_of(r, i);
  *place = {taps};
  double sum = 0;
  for (int t = 0; t < taps.count; ++t) sum += tap_weight(r, i, taps.first + t);
  auto* to = reinterpret_cast<Sum<kPil>*>(weights);
  for (int t = 0; t < taps.count; ++t) {
    const double weight = tap_weight(r, i, taps.first + t);
    if constexpr (kPil) {
      to[t * step] = fixed_weight(weight / sum);
    } else {
      to[t * step] = static_cast<float>(weight * (white / sum));
    }
  }
}

// One block a sample: one thread reads the parameters, another makes the blur's filter, and then all of them make the
// filters of the resampling, which every tile of the sample shares. Crops are cut to the image, so that no parameter
// makes a kernel read beyond it.
template <bool kPil>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ Views views, const __grid_constant__ Images images,
                   const float* __restrict__ params, const Prepared out) {
  __shared__ Resampling down, across;
  __shared__ bool flip;
  const int64_t n = blockIdx.x, b = n % views.count;
  const float* row = params + n * kColumns;
  const Image& image = images.list ? images.list[b] : images.batch;
  float* weights = out.weights + n / views.count * images.weights + (images.list ? image.weights : b * image.weights);
  Place* places = out.places + n * (views.height + views.width);
  if (threadIdx.x == 0) {
    Sample& s = out.samples[n];
    s.down_places = places;
    s.across_places = places + views.height;
    s.down_weights = weights;
    s.across_weights = weights + static_cast<int64_t>(views.height) * image.taps_down;
    s.taps_down = image.taps_down;
    const int top = whole(row[kTop], 0, image.height - 1), left = whole(row[kLeft], 0, image.width - 1);
    const int64_t offset = top * image.row + left * image.column + (images.list ? 0 : b * images.step);
    s.crop = static_cast<const char*>(image.data) + offset * out.pixel_bytes;
    s.channel = image.channel;
    s.row = image.row;
    s.column = image.column;
    down = resampling(whole(row[kHeight], 1, image.height - top), views.height, views.cubic);
    across = resampling(whole(row[kWidth], 1, image.width - left), views.width, views.cubic);
    flip = row[kFlip] != 0;
    read_colours(row, views.channels, s);
    out.progress[n] = {0, 0};
  }
  if (threadIdx.x == kWarp) {
    read_blur<kPil>(row[kSigma], views.blur_limit, out.samples[n], out.half_filters + n * kHalfFilter);
  }
  __syncthreads();
  for (int y = threadIdx.x; y < views.height; y += kPrepareThreads) {
    find_filter<kPil>(down, y, out.white, places + y, weights + static_cast<int64_t>(y) * image.taps_down, 1);
  }
  weights += static_cast<int64_t>(views.height) * image.taps_down;
  for (int x = threadIdx.x; x < views.width; x += kPrepareThreads) {
    const int i = flip ? views.width - 1 - x : x;
    find_filter<kPil>(across, i, 1.0, places + views.height + x, weights + x, views.width);
  }
}

}  // namespace
}  // namespace sslfast
