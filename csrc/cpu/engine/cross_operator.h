// How the operators on q [M, D] and k [N, D] take their arguments. Include it behind #ifdef SSLFAST_CPU_DISPATCH.
#pragma once
#include "cross_similarity.h"
#include "operator.h"

namespace sslfast {

// The arguments that every such operator has, contiguous and checked; `input` points into the tensors here.
struct CrossArguments {
  Tensor q, k;
  MaybeTensor bias, row_ids, col_ids, positives;
  ScalarType kind;  // the accumulator's dtype
  CrossInput input;

  CrossArguments(const Tensor& q_any, const Tensor& k_any, const Tensor& scale, const MaybeTensor& bias_any,
                 const MaybeTensor& row_ids_any, const MaybeTensor& col_ids_any, const MaybeTensor& positives_any)
      : q(as_contiguous(q_any)),
        k(as_contiguous(k_any)),
        bias(contiguous_or_none(bias_any)),
        row_ids(contiguous_or_none(row_ids_any)),
        col_ids(contiguous_or_none(col_ids_any)),
        positives(contiguous_or_none(positives_any)),
        kind(accumulator_type(q)) {
    SSLFAST_CHECK(q.dim() == 2 && k.dim() == 2 && q.size(1) == k.size(1) && q.scalar_type() == k.scalar_type(),
                  "q and k must be two-dimensional with the same width and dtype");
    SSLFAST_CHECK(q.size(0) > 0 && k.size(0) > 0 && q.size(1) > 0, "q and k must have rows and features");
    SSLFAST_CHECK(row_ids.has_value() == col_ids.has_value(), "row_ids and col_ids must be given together");
    check_tensor(scale, "scale", {}, kind, q);
    check_optional(bias, "bias", k.size(0), kind, q);
    check_optional(row_ids, "row_ids", q.size(0), ScalarType::Long, q);
    check_optional(col_ids, "col_ids", k.size(0), ScalarType::Long, q);
    check_optional(positives, "positives", q.size(0), ScalarType::Long, q);
    const ElementType type = element_type(q, "q");
    input = {{q.const_data_ptr(), type},
             {k.const_data_ptr(), type},
             q.size(0),
             k.size(0),
             q.size(1),
             scalar(scale),
             data_or_null(bias),
             static_cast<const int64_t*>(data_or_null(row_ids)),
             static_cast<const int64_t*>(data_or_null(col_ids)),
             static_cast<const int64_t*>(data_or_null(positives))};
  }
  CrossArguments(const CrossArguments&) = delete;

  // [length] in the accumulator's dtype.
  Tensor vector(int64_t length) const { return allocate(q, {length}, kind); }
  Tensor number() const { return allocate(q, {}, kind); }
  // Like x in the accumulator's dtype, or empty [0].
  Tensor gradient(const Tensor& x, bool wanted) const {
    return wanted ? allocate(q, {x.size(0), x.size(1)}, kind) : vector(0);
  }
};

}  // namespace sslfast
