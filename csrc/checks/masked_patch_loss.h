// Arguments of masked_patch_loss, checked alike on every device. For registration code alone.
#pragma once
#include <vector>

#include "common/patch_target.h"
#include "torch_api.h"

namespace sslfast {
namespace {

TargetPixel target_pixel(const Tensor& images) {
  switch (images.scalar_type()) {
    case ScalarType::Byte: return kByte;
    case ScalarType::Float: return kFloat;
    case ScalarType::Double: return kDouble;
    case ScalarType::BFloat16: return kBrain;
    case ScalarType::Half: return kHalf;
    default:
      SSLFAST_CHECK(false, "images must be uint8, float32, float64, bfloat16 or float16, got ",
                    torch::headeronly::toString(images.scalar_type()));
  }
}

struct PatchLossShape {
  int64_t channels, grid[3], patches;
  bool masked;  // the index is a mask [B, patches], else ids [B, rows]
};

PatchLossShape patch_loss_shape(const Tensor& images, const Tensor& pred, const Tensor& index,
                                const std::vector<int64_t>& patch, int64_t kind, int64_t target,
                                const std::vector<double>& mean, const std::vector<double>& std) {
  SSLFAST_CHECK(images.dim() == 5, "images must be [B, C, T, H, W], got ", images.dim(), " dimensions");
  SSLFAST_CHECK(pred.dim() == 3, "pred must be [B, rows, values], got ", pred.dim(), " dimensions");
  SSLFAST_CHECK(patch.size() == 3, "patch must have three numbers, got ", patch.size());
  PatchLossShape shape{images.size(1), {}, 1, index.scalar_type() == ScalarType::Bool};
  int64_t width = shape.channels;
  for (int d = 0; d < 3; ++d) {
    SSLFAST_CHECK(patch[d] > 0 && images.size(2 + d) % patch[d] == 0, "patch must divide the image");
    shape.grid[d] = images.size(2 + d) / patch[d];
    shape.patches *= shape.grid[d];
    width *= patch[d];
  }
  const int64_t rows = pred.size(1);
  check_tensor(pred, "pred", {images.size(0), shape.masked ? shape.patches : rows, width}, pred.scalar_type(), images);
  check_tensor(index, "index", {images.size(0), rows}, shape.masked ? ScalarType::Bool : ScalarType::Long, images);
  SSLFAST_CHECK(kind == kSquared || kind == kAbsolute, "kind must be 0 or 1, got ", kind);
  SSLFAST_CHECK(target >= kPlain && target <= kChannelNorm, "target must be 0, 1 or 2, got ", target);
  const auto channels = static_cast<size_t>(shape.channels);
  SSLFAST_CHECK((mean.empty() || mean.size() == channels) && (std.empty() || std.size() == channels),
                "mean and std must have one number a channel");
  return shape;
}

// What comes to the backward: the gradient of the loss, and the number of masked rows.
void check_patch_gradient(const Tensor& grad_loss, const Tensor& count, const Tensor& pred) {
  check_tensor(grad_loss, "grad_loss", {}, accumulator_type(pred), pred);
  check_tensor(count, "count", {}, accumulator_type(pred), pred);
}

}  // namespace
}  // namespace sslfast
