// The arithmetic of losses on masked positions, for the host and the device: what a prediction is compared with, and
// the loss's value and slope of one difference d = prediction − target. `A` is the accumulator, float or double.
#pragma once
#include "square_root.h"

namespace sslfast {

// The numbers that stand in the operators' arguments `kind` and `target`.
enum LossKind : int { kSquared, kAbsolute, kSmooth };
enum TargetKind : int { kPlain, kPatchNorm, kChannelNorm, kLayerNorm };

// The images' element type.
enum TargetPixel : int { kByte, kFloat, kDouble, kBrain, kHalf };

// The loss of one difference, times `scale`. `beta` is where the smooth L1 loss turns from a parabola into a line.
struct PointLoss {
  int kind;
  double beta;
};

// Pixels as numbers: bytes are shares of 255.
template <typename A>
SSLFAST_INLINE A pixel_value(uint8_t x) {
  return static_cast<A>(x) * (A(1) / A(255));
}
template <typename A, typename P>
SSLFAST_INLINE A pixel_value(P x) {
  return static_cast<A>(widen(x));
}

// One over the deviation of `count` numbers whose squared distances from their mean sum up to `squares`:
//     kPatchNorm    1 / √(squares/(count − 1) + eps)      MAE, over the whole patch
//     kChannelNorm  1 / (√(squares/(count − 1)) + eps)    VideoMAE, over a channel of the patch
//     kLayerNorm    1 / √(squares/count + eps)            layer normalisation, over the features
// A single number has no unbiased variance: 0/0, as in PyTorch.
template <typename A>
SSLFAST_INLINE A target_factor(A squares, A count, A eps, int kind) {
  if (kind == kLayerNorm) return A(1) / square_root(squares / count + eps);
  const A variance = squares / (count - A(1));
  return A(1) / (kind == kPatchNorm ? square_root(variance + eps) : square_root(variance) + eps);
}

template <int kKind, typename A>
SSLFAST_INLINE A point_loss(A d, A beta) {
  const A size = d < A(0) ? -d : d;
  if constexpr (kKind == kSquared) {
    return d * d;
  } else if constexpr (kKind == kAbsolute) {
    return size;
  } else {
    return size < beta ? A(0.5) * d * d / beta : size - A(0.5) * beta;
  }
}

// Its derivative; a NaN stays a NaN.
template <int kKind, typename A>
SSLFAST_INLINE A point_slope(A d, A beta) {
  const A sign = d > A(0) ? A(1) : (d < A(0) ? A(-1) : d);
  if constexpr (kKind == kSquared) {
    return d + d;
  } else if constexpr (kKind == kAbsolute) {
    return sign;
  } else {
    return (d < A(0) ? -d : d) < beta ? d / beta : sign;
  }
}

}  // namespace sslfast
