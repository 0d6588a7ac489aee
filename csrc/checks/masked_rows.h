// Arguments of masked_rows, checked alike on every device. For registration code alone.
#pragma once
#include "torch_api.h"

namespace sslfast {
namespace {

struct MaskedRowsArguments {
  int64_t images, tokens;
  Tensor mask;                  // [B, tokens]
  Tensor rows, weights, count;  // [size], [size], [1]: the results

  MaskedRowsArguments(const Tensor& mask_any, int64_t size) {
    SSLFAST_CHECK(mask_any.dim() == 2, "mask must be two-dimensional [images, tokens], got ", mask_any.dim(),
                  " dimensions");
    images = mask_any.size(0);
    tokens = mask_any.size(1);
    check_tensor(mask_any, "mask", {images, tokens}, ScalarType::Bool, mask_any);
    SSLFAST_CHECK(size >= 0, "size must not be negative, got ", size);
    mask = as_contiguous(mask_any);
    rows = allocate(mask, {size}, ScalarType::Long);
    weights = allocate(mask, {size}, ScalarType::Float);
    count = allocate(mask, {1}, ScalarType::Long);
  }
};

}  // namespace
}  // namespace sslfast
