// A mask, checked alike on every device. For registration code alone.
#pragma once
#include "torch_api.h"

namespace sslfast {
namespace {

// A bool mask [images, `columns`], row by row without gaps.
Tensor checked_mask(const Tensor& mask, const char* columns) {
  SSLFAST_CHECK(mask.dim() == 2, "mask must be two-dimensional [images, ", columns, "], got ", mask.dim(),
                " dimensions");
  check_tensor(mask, "mask", {mask.size(0), mask.size(1)}, ScalarType::Bool, mask);
  return as_contiguous(mask);
}

}  // namespace
}  // namespace sslfast
