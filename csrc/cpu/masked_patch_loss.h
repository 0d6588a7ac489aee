// What the kernel of masked_patch_loss is told: the images with their patches, which rows, and the loss.
#pragma once
#include "cpu/engine/target_rows.h"

namespace sslfast {

constexpr int64_t kPixelBytes[] = {1, 4, 8, 2, 2};

// Images [B, C, T, H, W] of any strides (in elements), cut into patches; value = (pixel − mean[c]) · inv_std[c].
struct TargetImages {
  const void* data;
  TargetPixel type;
  int64_t channels;
  int64_t grid[3], patch[3], stride[5];
  const double *mean, *inv_std;
};

// Of one channel of a patch.
SSLFAST_INLINE int64_t values_of(const TargetImages& x) { return x.patch[0] * x.patch[1] * x.patch[2]; }

struct PatchLoss {
  TargetImages images;
  PredictedRows pred;
  const uint8_t* mask;  // [rows], or
  const int64_t* ids;   // [rows], the patch of each row
  PointLoss loss;
  int target;
  double eps;
  bool channels_inner;
  int64_t pieces;
  char* scratch;  // for each piece two patches of the accumulator
};

}  // namespace sslfast

SSLFAST_DECLARE_ROW_LOSS(masked_patch_loss, PatchLoss)
