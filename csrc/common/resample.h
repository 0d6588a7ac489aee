// Antialiased resampling by a separable filter, for the host and the device: where a filter lies and what it weighs.
// As in PIL and in PyTorch's interpolate(antialias=True): the filter is stretched by the scale where the image
// shrinks, it ends at the border of the crop, and its weights are divided by their sum.
#pragma once
#include "half.h"

namespace sslfast {

struct Resampling {
  int in, out;     // pixels of the crop and of the view along this axis
  double scale;    // in / out
  double support;  // half the width of the filter in pixels of the crop
  double inverse;  // 1 / max(scale, 1)
  bool cubic;
};

SSLFAST_INLINE Resampling resampling(int in, int out, bool cubic) {
  const double scale = static_cast<double>(in) / out, stretch = scale > 1 ? scale : 1.0;
  return {in, out, scale, (cubic ? 2.0 : 1.0) * stretch, 1.0 / stretch, cubic};
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

// The filter at x: a triangle, or Keys' cubic with a = −1/2.
SSLFAST_INLINE double filter_at(bool cubic, double x) {
  x = x < 0 ? -x : x;
  if (!cubic) return x < 1 ? 1 - x : 0.0;
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

// The weight of a pixel of the crop in output pixel i, before the division by their sum.
SSLFAST_INLINE double tap_weight(const Resampling& r, int i, int pixel) {
  return filter_at(r.cubic, (pixel - r.scale * (i + 0.5) + 0.5) * r.inverse);
}

// PIL resamples bytes in fixed point, columns first, with a byte between the two passes; 22 bits, as 8 are the pixel's
// and 2 are left for sums that overshoot.
inline constexpr int kFixedBits = 22;

// A weight (already divided by the sum) in fixed point, to the nearest.
SSLFAST_INLINE int32_t fixed_weight(double weight) {
  const double scaled = weight * (1 << kFixedBits);
  return static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
}

// A sum of bytes times such weights, to the nearest byte; I: int32_t or a vector of them.
template <typename I>
SSLFAST_INLINE I fixed_to_byte(I sum) {
  const I black{}, white = black + 255, value = (sum + (1 << (kFixedBits - 1))) >> kFixedBits;
  const I positive = value < black ? black : value;
  return positive > white ? white : positive;
}

}  // namespace sslfast
