// Arguments of gather_patches and scatter_patches, checked alike on every device. For registration code alone.
#pragma once
#include <optional>
#include <vector>

#include "common/patches.h"
#include "torch_api.h"

namespace sslfast {

// The layout of a patch row in an image of these sides.
inline PatchLayout patch_layout(const int64_t (&sides)[4], const std::vector<int64_t>& patch, bool channels_inner) {
  SSLFAST_CHECK(patch.size() == 3, "patch must have three sides, time, height and width, got ", patch.size());
  constexpr int64_t kMost = int64_t{1} << 31;
  int64_t features = sides[0], count = 1;
  for (int i = 0; i < 3; ++i) {
    SSLFAST_CHECK(patch[i] > 0 && sides[i + 1] % patch[i] == 0,
                  "sides of the images must be multiples of the patch's, got ", sides[i + 1], " and ", patch[i]);
    SSLFAST_CHECK(sides[i + 1] < kMost && sides[0] < kMost && patch[i] < kMost,
                  "sides of the images and of the patches must be below 2^31");
    features = features < kMost ? features * patch[i] : kMost;
    count = count < kMost ? count * (sides[i + 1] / patch[i]) : kMost;
  }
  SSLFAST_CHECK(features < kMost && count < kMost, "patches and their numbers must be fewer than 2^31");
  auto small = [](int64_t x) { return static_cast<int>(x); };
  return {small(sides[0]),
          small(sides[1]),
          small(sides[2]),
          small(sides[3]),
          {small(patch[0]), small(patch[1]), small(patch[2])},
          channels_inner};
}

// Images [B, C, H, W] or [B, C, T, H, W] with any strides.
struct PatchImages {
  int64_t batch;
  int64_t stride[5];  // of b, c, t, y, x, in numbers
  PatchLayout layout;
};

inline PatchImages patch_images(const Tensor& images, const std::vector<int64_t>& patch, bool channels_inner) {
  const int64_t d = images.dim();
  SSLFAST_CHECK(d == 4 || d == 5, "images must be [B, C, H, W] or [B, C, T, H, W], got ", d, " dimensions");
  const bool still = d == 4;
  const int64_t sides[4] = {images.size(1), still ? 1 : images.size(2), images.size(d - 2), images.size(d - 1)};
  return {
      images.size(0),
      {images.stride(0), images.stride(1), still ? 0 : images.stride(2), images.stride(d - 2), images.stride(d - 1)},
      patch_layout(sides, patch, channels_inner)};
}

// K: ids [B, K] int64, or all L patches without ids.
inline int64_t kept_patches(const std::optional<Tensor>& ids, int64_t batch, const PatchLayout& layout,
                            const Tensor& like) {
  if (!ids.has_value()) return patch_count(layout);
  SSLFAST_CHECK(ids->dim() == 2, "ids must be two-dimensional [B, K], got ", ids->dim(), " dimensions");
  check_tensor(*ids, "ids", {batch, ids->size(1)}, ScalarType::Long, like);
  return ids->size(1);
}

inline void check_channels(const char* name, const std::vector<double>& numbers, const PatchLayout& layout) {
  SSLFAST_CHECK(
      numbers.empty() || (static_cast<int>(numbers.size()) == layout.channels && layout.channels <= kMostChannels),
      name, " must have one number for each of the ", layout.channels, " channels, at most ", kMostChannels,
      ", or none; got ", numbers.size());
}

// The map of pixels to numbers: mean and std have one number a channel, or none.
template <typename A>
PixelScale<A> pixel_scale_of(const std::vector<double>& mean, const std::vector<double>& std, const PatchLayout& layout,
                             ScalarType images) {
  check_channels("mean", mean, layout);
  check_channels("std", std, layout);
  return pixel_scale<A>(mean.empty() ? nullptr : mean.data(), std.empty() ? nullptr : std.data(), layout.channels,
                        images == ScalarType::Byte ? 1.0 / 255.0 : 1.0);
}

// The factors of scatter_patches: one number a channel, or none.
template <typename A>
PixelScale<A> patch_factors(const std::vector<double>& scale, const PatchLayout& layout) {
  check_channels("scale", scale, layout);
  PixelScale<A> factors{};
  factors.count = scale.empty() ? 1 : layout.channels;
  factors.scale[0] = A(1);
  for (size_t c = 0; c < scale.size(); ++c) factors.scale[c] = static_cast<A>(scale[c]);
  return factors;
}

}  // namespace sslfast
