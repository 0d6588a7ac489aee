// The weights of a view's blur, for the host and the device: one half of a symmetric filter whose sum is 1.
#pragma once
#include "half.h"

namespace sslfast {

inline constexpr int kMaxBlurRadius = 127;

// What lies beyond the image's border: torchvision mirrors (without repeating the border pixel), PIL repeats the border.
template <bool kPil>
SSLFAST_INLINE int inside(int i, int size) {
  if constexpr (kPil) return i < 0 ? 0 : i >= size ? size - 1 : i;
  i = i < 0 ? -i : i;
  i = i >= size ? 2 * (size - 1) - i : i;
  return i < 0 ? 0 : i;  // reached only where the filter is wider than the image allows
}

SSLFAST_INLINE float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  return __builtin_expf(x);
#endif
}

// A Gaussian cut at `limit` pixels; what it weighs there in float32 beyond 5.5 σ (3e-7) is left out. weight[0 … radius].
SSLFAST_INLINE int gaussian_weights(float sigma, int limit, float* weight) {
  int radius = static_cast<int>(5.5f * sigma) + 1;
  radius = radius < limit ? radius : limit;
  float sum = 0;
  for (int t = radius; t >= 0; --t) {
    const float x = static_cast<float>(t) / sigma;
    weight[t] = exp_of(-0.5f * x * x);
    sum += t == 0 ? weight[t] : 2 * weight[t];
  }
  for (int t = 0; t <= radius; ++t) weight[t] /= sum;
  return radius;
}

// PIL's GaussianBlur: three box filters, each of 2l + 1 whole pixels and a share `edge` of one more at either end, such
// that the variance of the three together is σ².
SSLFAST_INLINE int box_weights(float sigma, float* weight) {
  const float variance = sigma * sigma / 3;
#ifdef __CUDA_ARCH__
  const float length = sqrtf(12 * variance + 1);
#else
  const float length = __builtin_sqrtf(12 * variance + 1);
#endif
  int l = static_cast<int>((length - 1) / 2);
  const int most = kMaxBlurRadius / 3 - 1;
  l = l < most ? l : most;
  float share = (2 * l + 1) * (l * (l + 1) - 3 * variance) / (6 * (variance - (l + 1) * (l + 1)));
  const float full = 1 / (2 * (l + share) + 1), edge = share * full;
  // The box at distance t, then box ∗ box, then box ∗ box ∗ box, each summed over the other filter's extent.
  const int reach = l + 1;
  float twice[2 * (kMaxBlurRadius / 3) + 1];
  for (int t = 0; t <= 2 * reach; ++t) {
    float sum = 0;
    for (int s = -reach; s <= reach; ++s) {
      const int other = t - s < 0 ? s - t : t - s;
      sum += (s == reach || s == -reach ? edge : full) * (other > reach ? 0.0f : other == reach ? edge : full);
    }
    twice[t] = sum;
  }
  for (int t = 0; t <= 3 * reach; ++t) {
    float sum = 0;
    for (int s = -reach; s <= reach; ++s) {
      const int other = t - s < 0 ? s - t : t - s;
      sum += (s == reach || s == -reach ? edge : full) * (other > 2 * reach ? 0.0f : twice[other]);
    }
    weight[t] = sum;
  }
  return 3 * reach;
}

// weight[0 … radius] of this σ; `limit` is half the kernel of the view (torchvision) and unused by PIL.
template <bool kPil>
SSLFAST_INLINE int blur_weights(float sigma, int limit, float* weight) {
  if constexpr (kPil) {
    return box_weights(sigma, weight);
  } else {
    return gaussian_weights(sigma, limit, weight);
  }
}

}  // namespace sslfast
