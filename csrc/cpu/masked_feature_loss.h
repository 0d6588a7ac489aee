// What the kernel of masked_feature_loss is told.
#pragma once
#include "cpu/engine/target_rows.h"

namespace sslfast {

// The teacher's features [B, L, D]: row ids[r] of the image r / K mod B; the elements of a row lie side by side.
struct FeatureLoss {
  PredictedRows pred;  // [S·B, K, D]
  PredictedRows teacher;
  const int64_t* ids;  // [rows]
  int teacher_type;    // float, double, bf16, fp16: 0 to 3
  PointLoss loss;
  bool layer_norm;
  double eps;
  int64_t pieces;
  char* scratch;  // for each piece a row of the accumulator
};

}  // namespace sslfast

SSLFAST_DECLARE_ROW_LOSS(masked_feature_loss, FeatureLoss)
