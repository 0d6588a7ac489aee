// Arguments of negative_cosine and its backward, checked alike on every device. For registration code alone.
#pragma once
#include <tuple>

#include "torch_api.h"

namespace sslfast {
namespace {

constexpr int64_t kSaved = 3;  // numbers of a row that the backward needs: Cosine

struct CosineArguments {
  int64_t rows, features;
  Tensor p, z;  // [N, D]

  CosineArguments(const Tensor& p_any, const Tensor& z_any) {
    SSLFAST_CHECK(p_any.dim() == 2, "p must be two-dimensional, got ", p_any.dim(), " dimensions");
    rows = p_any.size(0);
    features = p_any.size(1);
    SSLFAST_CHECK(rows < (int64_t{1} << 31), "p must have fewer than 2^31 rows, got ", rows);
    check_tensor(z_any, "z", {rows, features}, p_any.scalar_type(), p_any);
    p = as_contiguous(p_any);
    z = as_contiguous(z_any);
  }

  // The loss and the saved numbers.
  std::tuple<Tensor, Tensor> results() const {
    const ScalarType kind = accumulator_type(p);
    return {allocate(p, {}, kind), allocate(p, {rows, kSaved}, kind)};
  }

  void check_saved(const Tensor& grad, const Tensor& saved) const {
    check_tensor(grad, "grad", {}, accumulator_type(p), p);
    check_tensor(saved, "saved", {rows, kSaved}, accumulator_type(p), p);
  }

  // dp and dz, each without rows where it is not wanted.
  std::tuple<Tensor, Tensor> gradients(bool of_p, bool of_z) const {
    return {allocate(p, {of_p ? rows : 0, features}), allocate(p, {of_z ? rows : 0, features})};
  }
};

}  // namespace
}  // namespace sslfast
