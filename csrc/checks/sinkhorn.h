// Arguments of the operators of sinkhorn, checked alike on every device. For registration code alone.
#pragma once
#include <cmath>
#include <optional>

#include "torch_api.h"

namespace sslfast {
namespace {

void check_sinkhorn(const Tensor& logits, double temperature, const std::optional<Tensor>& rows) {
  SSLFAST_CHECK(logits.dim() == 3, "logits must have three dimensions, got ", logits.dim());
  SSLFAST_CHECK(std::isfinite(temperature) && temperature != 0, "temperature must be finite and not zero, got ",
                temperature);
  if (rows) check_tensor(*rows, "rows", {}, ScalarType::Long, logits);
}

void check_sinkhorn_bias(const Tensor& bias, const Tensor& logits) {
  check_tensor(bias, "bias", {logits.size(1), logits.size(2)}, accumulator_type(logits), logits);
}

}  // namespace
}  // namespace sslfast
