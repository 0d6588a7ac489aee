// Arguments of mean_assignment, checked alike on every device. For registration code alone.
#pragma once
#include <cmath>
#include <optional>

#include "common/mean_assignment.h"
#include "torch_api.h"

namespace sslfast {
namespace {

void check_mean_assignment(const Tensor& logits, const std::optional<Tensor>& targets,
                           const std::optional<Tensor>& weights, double temperature,
                           const std::optional<Tensor>& rows) {
  SSLFAST_CHECK(logits.dim() == 2, "logits must have two dimensions, got ", logits.dim());
  SSLFAST_CHECK(std::isfinite(temperature) && temperature != 0, "temperature must be finite and not zero, got ",
                temperature);
  const ScalarType type = accumulator_type(logits);
  if (targets) {
    SSLFAST_CHECK(targets->dim() == 2 && targets->size(0) > 0, "targets must have at least one row");
    check_tensor(*targets, "targets", {targets->size(0), logits.size(1)}, type, logits);
  }
  if (weights) check_tensor(*weights, "weights", {logits.size(0)}, type, logits);
  if (rows) check_tensor(*rows, "rows", {}, ScalarType::Long, logits);
}

// Gradients of the sums [K] and of two numbers of each row, none of which need be there.
void check_assignment_gradients(const std::optional<Tensor>& sums, const std::optional<Tensor>& cross_entropy,
                                const std::optional<Tensor>& entropy, const Tensor& stats, const Tensor& logits) {
  const ScalarType type = accumulator_type(logits);
  if (sums) check_tensor(*sums, "grad_sums", {logits.size(1)}, type, logits);
  if (cross_entropy) check_tensor(*cross_entropy, "grad_cross_entropy", {logits.size(0)}, type, logits);
  if (entropy) check_tensor(*entropy, "grad_entropy", {logits.size(0)}, type, logits);
  check_tensor(stats, "stats", {logits.size(0), kAssignmentStats}, type, logits);
}

}  // namespace
}  // namespace sslfast
