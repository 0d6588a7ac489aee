// Gram anchoring: the mean square of the differences of two Gram matrices, image by image.
#pragma once
#include "cpu/engine/levels.h"
#include "cpu/engine/packed_rows.h"

namespace sslfast {

// What happens to negative similarities.
enum class Negatives { keep, clamp, clamp_teacher };

struct GramInput {
  Rows student, teacher;  // [images · rows, d]
  int64_t images, rows, d;
  bool normalize;  // divide each row by max(‖row‖, 1e-12) first
  Negatives negatives;
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t gram_anchor_workspace(const ::sslfast::GramInput&, bool with_gradient, int64_t threads);
                // Returns the loss; `gradient`: of the student's rows, in the accumulator's type, or null.
                double gram_anchor(const ::sslfast::GramInput&, void* gradient, void* memory,
                                   const ::sslfast::Parallel&))
