// Arguments of masked_feature_loss, checked alike on every device. For registration code alone.
#pragma once
#include "common/patch_target.h"
#include "torch_api.h"

namespace sslfast {
namespace {

void check_feature_loss(const Tensor& pred, const Tensor& teacher, const Tensor& ids, int64_t kind, double beta) {
  const int64_t images = teacher.size(0);
  check_tensor(teacher, "teacher", {images, teacher.size(1), pred.size(2)}, teacher.scalar_type(), pred);
  check_tensor(ids, "ids", {pred.size(0), pred.size(1)}, ScalarType::Long, pred);
  SSLFAST_CHECK(images > 0 ? pred.size(0) % images == 0 : pred.size(0) == 0,
                "pred must have a whole number of masks of each image");
  SSLFAST_CHECK(kind >= kSquared && kind <= kSmooth, "kind must be 0, 1 or 2, got ", kind);
  SSLFAST_CHECK(kind != kSmooth || beta > 0, "beta must be positive, got ", beta);
}

}  // namespace
}  // namespace sslfast
