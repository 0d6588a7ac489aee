// Antialiased resampling by a separable filter, for the host and the device: where a filter lies and what it weighs.
// As in PIL and in PyTorch's interpolate(antialias=True): the filter is stretched by the scale where the image shrinks, it
// ends at the border of the crop, and its weights are divided by their sum.
#pragma once
#include "half.h"

namespace sslfast {

struct Resampling {
  int in, out;     // pixels of the crop and of the view along this axis
  double scale;    // in / out
  double support;  // half the width of the filter in pixels of the crop
  float inverse;   // 1 / max(scale, 1)
  bool cubic;
};

SSLFAST_INLINE Resampling resampling(int in, int out, bool cubic) {
  const double scale = static_cast<double>(in) / out, stretch = scale > 1 ? scale : 1.0;
  return {in, out, scale, (cubic ? 2.0 : 1.0) * stretch, static_cast<float>(1.0 / stretch), cubic};
}

// An upper bound of the number of pixels under one filter.
SSLFAST_INLINE int most_taps(const Resampling& r) { return static_cast<int>(2 * r.support) + 2; }

struct Taps {
  int first, count;
};

SSLFAST_INLINE Taps taps_of(const Resampling& r, int i) {
  const double center = r.scale * (i + 0.5);
  const int low = static_cast<int>(center - r.support + 0.5), high = static_cast<int>(center + r.support + 0.5);
  const int first = low > 0 ? low : 0;
  return {first, (high < r.in ? high : r.in) - first};
}

// The filter at x ≥ 0 or x < 0: a triangle, or Keys' cubic with a = −1/2.
SSLFAST_INLINE float filter_at(bool cubic, float x) {
  x = x < 0 ? -x : x;
  if (!cubic) return x < 1 ? 1 - x : 0.0f;
  if (x < 1) return (1.5f * x - 2.5f) * x * x + 1;
  return x < 2 ? ((-0.5f * x + 2.5f) * x - 4) * x + 2 : 0.0f;
}

// The weight of pixel first + t of output pixel i, before the division by their sum.
SSLFAST_INLINE float tap_weight(const Resampling& r, int i, int pixel) {
  return filter_at(r.cubic, static_cast<float>(pixel + 0.5 - r.scale * (i + 0.5)) * r.inverse);
}

}  // namespace sslfast
