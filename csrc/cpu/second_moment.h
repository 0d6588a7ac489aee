// Second moments of columns, M = ÂᵀB̂ or M = X̂ᵀX̂ of each view, as sums over M: see sslfast/ops/second_moment.py.
#pragma once
#include "cpu/engine/levels.h"
#include "cpu/engine/packed_rows.h"

namespace sslfast {

enum class ColumnScale { none, variance, norm };

struct MomentInput {
  Rows views[2];  // [n, d] each; the second's data is null for one view
  int64_t n, d;
  bool cross, center;
  ColumnScale scale;
  double eps;
  bool dual;

  int64_t view_count() const { return views[1].data == nullptr ? 1 : 2; }
  int64_t matrix_count() const { return cross ? 1 : view_count(); }  // R
  bool has_distance() const { return view_count() == 2 && !cross; }
  // The view whose columns multiply those of view v.
  int64_t partner(int64_t v) const { return cross ? 1 - v : v; }
};

// What the forward leaves for the backward: arrays of float, or of double for double rows.
struct MomentSaved {
  void* diagonal;  // [R, d]
  void* mean;      // [views, d]; x̂ = (x − mean)·factor
  void* factor;    // [views, d]
  void* moments;   // dual: Gram matrices [views, n, n]; primal: M [R, d, d]; or null
};

struct MomentSums {
  double off_diagonal[2], distance;
};

struct MomentGradient {
  double off_diagonal[2], distance;  // incoming
  const void* diagonal;              // incoming, [R, d] of the accumulator
  void* views[2];                    // [n, d] of the rows' element type, or null where none is wanted
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t second_moment_workspace(const MomentInput& input, int64_t threads))
SSLFAST_DECLARE(MomentSums second_moment_forward(const MomentInput& input, const MomentSaved& saved, void* workspace,
                                                 const Parallel& parallel))
SSLFAST_DECLARE(int64_t second_moment_backward_workspace(const MomentInput& input, bool kept, int64_t threads))
SSLFAST_DECLARE(void second_moment_backward(const MomentInput& input, const MomentSaved& saved,
                                            const MomentGradient& gradient, void* workspace, const Parallel& parallel))
