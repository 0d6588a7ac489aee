// Arguments of augment_views, checked alike on every device. For registration code alone.
#pragma once
#include <vector>

#include "common/blur.h"
#include "common/view_params.h"
#include "torch_api.h"

namespace sslfast {
namespace {

// On a side, since boxes are float32 numbers.
inline constexpr int64_t kMostPixels = int64_t{1} << 24;

struct ViewArguments {
  int64_t views, count, channels, height, width;
  int blur_limit;            // half the kernel
  float scale[3], shift[3];  // normalisation: x · scale + shift
  Tensor params;             // [V, B, kColumns]
  Tensor result;             // [V, B, C, h, w] or [V, B, h, w, C]

  ViewArguments(const std::vector<Tensor>& images, const Tensor& params_any, const std::vector<int64_t>& size,
                int64_t blur_kernel, const std::vector<double>& mean, const std::vector<double>& std, bool pil,
                ScalarType dtype, bool channels_last) {
    check_images(images, params_any);
    const Tensor& first = images[0];
    channels = first.size(first.dim() - 3);
    SSLFAST_CHECK(channels == 1 || channels == 3, "images must have 1 or 3 channels, got ", channels);
    SSLFAST_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0 && size[0] < kMostPixels && size[1] < kMostPixels,
                  "size must be two numbers from 1 to 2^24 − 1");
    height = size[0];
    width = size[1];
    SSLFAST_CHECK(mean.size() == static_cast<size_t>(channels) && std.size() == mean.size(),
                  "mean and std must have one number a channel");
    for (int64_t c = 0; c < channels; ++c) {
      scale[c] = static_cast<float>(1 / (std[c] * (pil ? 255 : 1)));
      shift[c] = static_cast<float>(-mean[c] / std[c]);
    }
    SSLFAST_CHECK(blur_kernel >= 1 && blur_kernel / 2 <= kMaxBlurRadius, "blur_kernel must be from 1 to ",
                  2 * kMaxBlurRadius + 1, ", got ", blur_kernel);
    blur_limit = static_cast<int>(blur_kernel / 2);
    SSLFAST_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "dtype must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
    count = first.dim() == 4 ? first.size(0) : static_cast<int64_t>(images.size());
    views = params_any.dim() == 3 ? params_any.size(0) : 0;
    check_tensor(params_any, "params", {views, count, kColumns}, ScalarType::Float, params_any);
    params = as_contiguous(params_any);
    result = channels_last ? allocate(first, {views, count, height, width, channels}, dtype)
                           : allocate(first, {views, count, channels, height, width}, dtype);
  }

  static void check_images(const std::vector<Tensor>& images, const Tensor& params) {
    SSLFAST_CHECK(!images.empty(), "images must hold at least one image");
    const Tensor& first = images[0];
    const ScalarType type = first.scalar_type();
    SSLFAST_CHECK(type == ScalarType::Byte || type == ScalarType::Float || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "images must be uint8, float32, bfloat16 or float16, got ", torch::headeronly::toString(type));
    for (const Tensor& t : images) {
      SSLFAST_CHECK(t.dim() == 3 || (t.dim() == 4 && images.size() == 1), "images must have three or four dimensions");
      SSLFAST_CHECK(t.size(t.dim() - 3) == first.size(first.dim() - 3), "images must have the same number of channels");
      SSLFAST_CHECK(t.scalar_type() == type, "images must have the same dtype");
      SSLFAST_CHECK(t.device() == params.device(), "images must be on the device of params");
      for (int64_t d = t.dim() - 2; d < t.dim(); ++d)
        SSLFAST_CHECK(t.size(d) > 0 && t.size(d) < kMostPixels, "images must be from 1 to 2^24 − 1 pixels on a side");
    }
  }
};

}  // namespace
}  // namespace sslfast
