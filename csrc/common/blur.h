// The filters of a view's blur, for the host and the device.
#pragma once
#include "half.h"

namespace sslfast {

inline constexpr int kMaxBlurRadius = 127;

// What lies beyond the image's border: torchvision mirrors (without repeating the border pixel), PIL repeats the
// border.
template <bool kPil>
SSLFAST_INLINE int inside(int i, int size) {
  if constexpr (kPil) return i < 0 ? 0 : i >= size ? size - 1 : i;
  i = i < 0 ? -i : i;
  i = i >= size ? 2 * (size - 1) - i : i;
  return i < 0 ? 0 : i;  // reached only where the filter is wider than the image allows
}

SSLFAST_INLINE float exp_of(float x) { return SSLFAST_DEVICE_OR_HOST(expf(x), __builtin_expf(x)); }

// A Gaussian cut at `limit` pixels; what it weighs there in float32 beyond 5.5 σ (3e-7) is left out. weight[0 …
// radius].
SSLFAST_INLINE int gaussian_weights(float sigma, int limit, float* weight) {
  const int radius = 5.5f * sigma < static_cast<float>(limit) ? static_cast<int>(5.5f * sigma) + 1 : limit;
  float sum = 0;
  for (int t = radius; t >= 0; --t) {
    const float x = static_cast<float>(t) / sigma;
    weight[t] = exp_of(-0.5f * x * x);
    sum += t == 0 ? weight[t] : 2 * weight[t];
  }
  for (int t = 0; t <= radius; ++t) weight[t] /= sum;
  return radius;
}

// PIL's GaussianBlur is three box filters along each row and then three along each column, each rounded to a byte. A
// box is 2 · radius + 1 whole pixels and a share of one more at either end, such that the variances of three add up to
// σ².
struct Box3 {
  int radius;
  uint32_t whole, end;  // weights, in units of 2^-24
};

SSLFAST_INLINE Box3 box_of_sigma(float sigma) {
  constexpr float kWidest = kMaxBlurRadius / 3.0f;
  sigma = sigma < kWidest ? sigma : kWidest;
  const float variance = sigma * sigma / 3;
  const double square = 12.0 * variance + 1.0;
  const float length = static_cast<float>(SSLFAST_DEVICE_OR_HOST(__dsqrt_rn(square), __builtin_sqrt(square)));
  const int l = static_cast<int>((length - 1) / 2);
  const float share = (2 * l + 1) * (l * (l + 1) - 3 * variance) / (6 * (variance - (l + 1) * (l + 1)));
  const float width = 2 * (l + share) + 1;
  const auto whole = static_cast<uint32_t>((1 << 24) / (width > 1 ? width : 1.0f));
  return {l, whole, ((1u << 24) - (2 * l + 1) * whole) / 2};
}

// The box filter's byte from the sum over the whole pixels and that of the two ends; U: uint32_t or a vector of them.
template <typename U>
SSLFAST_INLINE U boxed(const Box3& box, U sum, U ends) {
  return (sum * box.whole + ends * box.end + (1u << 23)) >> 24;
}

}  // namespace sslfast
