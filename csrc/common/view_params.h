// What is drawn at random for one view of one image, for the host and the device: the same bits on both.
#pragma once
#include "exact.h"

namespace sslfast {

// The columns of a row of parameters (float32), in the order of sslfast.augment.ViewParams.COLUMNS.
enum Column : int {
  kTop,
  kLeft,
  kHeight,
  kWidth,  // crop box in pixels of the source, whole numbers
  kFlip,   // 1: mirrored left to right
  kBrightness,
  kContrast,
  kSaturation,
  kHue,  // factors
  kOrder0,
  kOrder1,
  kOrder2,
  kOrder3,    // which of the four comes first, second, ...; −1: none
  kGrey,      // 1: greyscale
  kSigma,     // standard deviation of the blur in output pixels; 0: none
  kSolarize,  // 1: solarised
  kColumns
};

// The numbers of a ViewSpec that sampling needs, in the order of ViewSpec.numbers().
struct ViewNumbers {
  Range scale;      // share of the image's area; low = 0: no crop, the whole image
  Range log_ratio;  // log of width / height
  double flip_p;
  double jitter_p;
  Range factor[4];  // brightness, contrast, saturation, hue
  double used[4];   // 1: this one takes part
  double shuffle;   // 1: in random order
  double grey_p;
  double blur_p;
  Range sigma;
  double solarize_p;
};
inline constexpr int kViewNumbers = sizeof(ViewNumbers) / sizeof(double);

inline constexpr uint32_t kCoinsBlock = 0;   // flip, jitter, grey, blur
inline constexpr uint32_t kShapeBlock = 1;   // solarize, sigma, order, –
inline constexpr uint32_t kFactorBlock = 2;  // brightness, contrast, saturation, hue
inline constexpr uint32_t kCropBlock = 3;    // area, ratio, top, left: one block an attempt
inline constexpr int kCropAttempts = 10;

struct Box {
  int64_t top, left, height, width;
};

// Torchvision's RandomResizedCrop.get_params: ten attempts at an area and a log-uniform ratio, then the largest centred
// box whose ratio is allowed.
SSLFAST_INLINE Box random_box(const Stream& stream, const ViewNumbers& v, int64_t height, int64_t width) {
  if (v.scale.low <= 0) return {0, 0, height, width};
  const double area = static_cast<double>(height) * static_cast<double>(width);
  for (int attempt = 0; attempt < kCropAttempts; ++attempt) {
    const Philox4 d = draw(stream, kCropBlock + attempt);
    const double target = SSLFAST_MUL(area, uniform(v.scale, d.word[0]));
    const double ratio = exponential(uniform(v.log_ratio, d.word[1]));
    const double w = nearest(root(SSLFAST_MUL(target, ratio))), h = nearest(root(target / ratio));
    if (w >= 1 && w <= static_cast<double>(width) && h >= 1 && h <= static_cast<double>(height)) {
      const auto rows = static_cast<int64_t>(h), columns = static_cast<int64_t>(w);
      return {static_cast<int64_t>(SSLFAST_MUL(static_cast<double>(height - rows + 1), unit(d.word[2]))),
              static_cast<int64_t>(SSLFAST_MUL(static_cast<double>(width - columns + 1), unit(d.word[3]))), rows,
              columns};
    }
  }
  const double ratio = static_cast<double>(width) / static_cast<double>(height);
  const double low = exponential(v.log_ratio.low), high = exponential(v.log_ratio.high);
  int64_t h = height, w = width;
  if (ratio < low) h = static_cast<int64_t>(nearest(static_cast<double>(width) / low));
  if (ratio > high) w = static_cast<int64_t>(nearest(SSLFAST_MUL(static_cast<double>(height), high)));
  h = h < 1 ? 1 : h > height ? height : h;
  w = w < 1 ? 1 : w > width ? width : w;
  return {(height - h) / 2, (width - w) / 2, h, w};
}

SSLFAST_INLINE void sample_view(const Stream& stream, const ViewNumbers& v, int64_t height, int64_t width, float* row) {
  const Philox4 coins = draw(stream, kCoinsBlock), shape = draw(stream, kShapeBlock);
  const Philox4 factors = draw(stream, kFactorBlock);
  const Box box = random_box(stream, v, height, width);
  row[kTop] = static_cast<float>(box.top);
  row[kLeft] = static_cast<float>(box.left);
  row[kHeight] = static_cast<float>(box.height);
  row[kWidth] = static_cast<float>(box.width);
  row[kFlip] = unit(coins.word[0]) < v.flip_p;
  for (int f = 0; f < 4; ++f) row[kBrightness + f] = static_cast<float>(uniform(v.factor[f], factors.word[f]));
  // The order from its Lehmer code: the next operation is number code / (left − 1)! of those that are left.
  int code = static_cast<int>(24 * unit(shape.word[2])), next = 0;
  int left[4] = {0, 1, 2, 3};
  const int weight[4] = {6, 2, 1, 1};
  const bool jitter = unit(coins.word[1]) < v.jitter_p, shuffle = v.shuffle != 0;
  for (int f = 0; f < 4; ++f) row[kOrder0 + f] = -1;
  for (int f = 0; f < 4; ++f) {
    const int pick = shuffle && f < 3 ? code / weight[f] : 0;
    code -= pick * weight[f];
    const int chosen = left[pick];
    for (int l = pick; l < 3; ++l) left[l] = left[l + 1];
    if (jitter && v.used[chosen] != 0) row[kOrder0 + next++] = static_cast<float>(chosen);
  }
  row[kGrey] = unit(coins.word[2]) < v.grey_p;
  row[kSigma] = unit(coins.word[3]) < v.blur_p ? static_cast<float>(uniform(v.sigma, shape.word[1])) : 0.0f;
  row[kSolarize] = unit(shape.word[0]) < v.solarize_p;
}

}  // namespace sslfast
