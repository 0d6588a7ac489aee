// Patches of images: which pixel stands where in a patch's row of numbers, and how a pixel becomes a number. For the
// host and the device.
//
// An image [C, T, H, W] (T = 1 for a still one) is cut into a raster of patches pt × ph × pw; a patch is a row of
// C·pt·ph·pw numbers, in the order of a convolution's weight, (c, t, y, x), or with the channels innermost,
// (t, y, x, c), as MAE's patchify has it.
#pragma once
#include <cstdint>

#include "half.h"

namespace sslfast {

// Most channels that can have a mean and a deviation of their own: they travel by value.
inline constexpr int kMostChannels = 64;

// Sides, patches and features are below 2^31; offsets into memory are 64-bit.
struct PatchLayout {
  int channels, frames, height, width;  // C, T, H, W
  int patch[3];                         // pt, ph, pw; each divides its side
  bool channels_inner;
};

SSLFAST_INLINE int patch_columns(const PatchLayout& layout) { return layout.width / layout.patch[2]; }
SSLFAST_INLINE int patch_rows(const PatchLayout& layout) { return layout.height / layout.patch[1]; }

// L, the patches of one image.
SSLFAST_INLINE int patch_count(const PatchLayout& layout) {
  return layout.frames / layout.patch[0] * patch_rows(layout) * patch_columns(layout);
}

// C·pt·ph·pw, the numbers of one patch.
SSLFAST_INLINE int patch_features(const PatchLayout& layout) {
  return layout.channels * layout.patch[0] * layout.patch[1] * layout.patch[2];
}

// A place in an image; the first pixel of a patch has c = 0.
struct PatchPixel {
  int c, t, y, x;
};

// Where patch `l` (0 ≤ l < L) begins.
SSLFAST_INLINE PatchPixel patch_corner(const PatchLayout& layout, int l) {
  const int columns = patch_columns(layout), rows = patch_rows(layout), line = l / columns;
  return {0, line / rows * layout.patch[0], line % rows * layout.patch[1], l % columns * layout.patch[2]};
}

// The pixel that is number `f` (0 ≤ f < features) of the patch with this corner.
SSLFAST_INLINE PatchPixel patch_pixel(const PatchLayout& layout, const PatchPixel& corner, int f) {
  int c = 0;
  if (layout.channels_inner) {
    c = f % layout.channels;
    f /= layout.channels;
  }
  const int x = f % layout.patch[2];
  f /= layout.patch[2];
  const int y = f % layout.patch[1];
  f /= layout.patch[1];
  const int t = f % layout.patch[0];
  if (!layout.channels_inner) c = f / layout.patch[0];
  return {c, corner.t + t, corner.y + y, corner.x + x};
}

// The patch in which a pixel lies, and its number there: the inverse of the two above.
SSLFAST_INLINE int patch_of(const PatchLayout& layout, const PatchPixel& at) {
  const int row = at.t / layout.patch[0] * patch_rows(layout) + at.y / layout.patch[1];
  return row * patch_columns(layout) + at.x / layout.patch[2];
}
SSLFAST_INLINE int feature_of(const PatchLayout& layout, const PatchPixel& at) {
  const int t = at.t % layout.patch[0], y = at.y % layout.patch[1], x = at.x % layout.patch[2];
  const int place = (t * layout.patch[1] + y) * layout.patch[2] + x;
  return layout.channels_inner ? place * layout.channels + at.c
                               : at.c * (layout.patch[0] * layout.patch[1] * layout.patch[2]) + place;
}

// value = pixel·scale + offset, of each channel, or the same for all where count is 1.
template <typename A>
struct PixelScale {
  int count;
  A scale[kMostChannels], offset[kMostChannels];
};

SSLFAST_INLINE float widen(uint8_t x) { return static_cast<float>(x); }

// One number of a patch; `A`: double where the image or the result is float64, else float.
template <typename A>
SSLFAST_INLINE A pixel_value(const PixelScale<A>& affine, int c, A x) {
  const int at = affine.count == 1 ? 0 : c;
  return x * affine.scale[at] + affine.offset[at];
}

// The affine map of (x·unit − mean_c) / std_c, unit being 1/255 for bytes and 1 else; `channels` numbers each, or null
// for no mean and no deviation.
template <typename A>
static inline PixelScale<A> pixel_scale(const double* mean, const double* std, int channels, double unit) {
  PixelScale<A> affine{};
  affine.count = mean == nullptr && std == nullptr ? 1 : channels;
  for (int c = 0; c < affine.count; ++c) {
    const double divisor = std == nullptr ? 1.0 : std[c];
    affine.scale[c] = static_cast<A>(unit / divisor);
    affine.offset[c] = static_cast<A>(mean == nullptr ? 0.0 : -mean[c] / divisor);
  }
  return affine;
}

}  // namespace sslfast
