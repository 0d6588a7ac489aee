// How the operators on views and slices take their arguments. Include it behind #ifdef SSLFAST_CPU_DISPATCH.
#pragma once
#include "operator.h"
#include "slice_tiles.h"

namespace sslfast {

// Contiguous and checked; `input` points into the tensors here.
struct SliceArguments {
  Tensor z, slices;
  ScalarType kind;  // the accumulator's dtype
  SliceInput input;

  SliceArguments(const Tensor& z_any, const Tensor& slices_any, int64_t knots, double step)
      : z(as_contiguous(z_any)), slices(as_contiguous(slices_any)), kind(accumulator_type(z)) {
    SSLFAST_CHECK(z.dim() == 3 && z.numel() > 0, "z must have shape [views, rows, features], none of them 0");
    SSLFAST_CHECK(slices.dim() == 2 && slices.size(1) > 0, "slices must have shape [features, slices], not empty");
    check_tensor(slices, "slices", {z.size(2), slices.size(1)}, kind, z);
    SSLFAST_CHECK(knots > 0, "knots must be positive, got ", knots);
    input = {{z.const_data_ptr(), element_type(z, "z")},
             slices.const_data_ptr(),
             z.size(0),
             z.size(1),
             z.size(2),
             slices.size(1),
             knots,
             step};
  }
};

}  // namespace sslfast
