// Arguments of the cross-entropy of student against teacher over prototypes, for every instruction-set level.
#pragma once
#include "cpu/engine/prototype_tiles.h"

namespace sslfast {

inline constexpr int64_t kMostViews = 192;  // one sample of each makes a tile

struct PrototypeInput {
  Views student, teacher;  // [V_s, B, D], [V_t, B, D]
  int64_t samples, d, prototypes;
  Prototypes of_student, of_teacher;  // [K, D] each
  const void* teacher_bias;           // [K], and
  const void* row_weights;            // [B], in the accumulator's type, or null: no bias, weights 1/B
  const int64_t *teacher_views, *student_views;
  int64_t pairs;  // of a teacher's and a student's view: how many in those two lists
  double student_temperature, teacher_temperature;
};

// Where the gradients go, in the accumulator's type; null where none is wanted. The gain's comes with the prototypes'.
struct PrototypeGradient {
  void* student;     // [V_s, B, D]
  void* prototypes;  // [K, D]
  void* gain;        // [K]
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t prototype_cross_entropy_workspace(const PrototypeInput& input,
                                                          const PrototypeGradient& gradient, int64_t threads))
SSLFAST_DECLARE(double prototype_cross_entropy(const PrototypeInput& input, const PrototypeGradient& gradient,
                                               void* workspace, const Parallel& parallel))
