// One call of augment_views: images, parameters and what the views have in common.
#pragma once
#include "common/view_params.h"
#include "cpu/engine/levels.h"

namespace sslfast {

enum class PixelType : int { u8, f32, b16, f16 };

struct Image {
  const void* data;
  int64_t height, width;                 // pixels
  int64_t stride_c, stride_h, stride_w;  // elements
};

struct AugmentCall {
  const Image* images;  // [B]
  const float* params;  // [V, B, kColumns]
  int64_t views, count;
  int channels;  // 1 or 3
  PixelType in, out;
  int height, width;  // of a view
  bool cubic, pil, channels_last;
  int blur_limit;  // half the kernel
  float threshold;
  float scale[3], shift[3];         // normalisation: x · scale + shift
  void* result;                     // [V, B, C, h, w] or [V, B, h, w, C]
  int64_t crop_height, crop_width;  // the largest of all views
  int64_t workers;
  char* scratch;  // workers · scratch_bytes, on 64 bytes
};

// A crop of an image, cut to the image whatever the parameters say.
static inline int64_t whole(float x, int64_t low, int64_t high) {
  if (!(x >= static_cast<float>(low))) return low;
  return x >= static_cast<float>(high) ? high : static_cast<int64_t>(x);
}
static inline Box box_of(const float* row, const Image& image) {
  const int64_t top = whole(row[kTop], 0, image.height - 1), left = whole(row[kLeft], 0, image.width - 1);
  return {top, left, whole(row[kHeight], 1, image.height - top), whole(row[kWidth], 1, image.width - left)};
}

}  // namespace sslfast

SSLFAST_DECLARE(int64_t augment_scratch_bytes(const ::sslfast::AugmentCall&))
SSLFAST_DECLARE(void augment_views(const ::sslfast::Parallel&, const ::sslfast::AugmentCall&))
