// Arguments of masked_rows, checked alike on every device. For registration code alone.
#pragma once
#include "mask.h"

namespace sslfast {
namespace {

struct MaskedRowsArguments {
  int64_t images, tokens;
  Tensor mask;                  // [B, tokens]
  Tensor rows, weights, count;  // [size], [size], [1]: the results

  MaskedRowsArguments(const Tensor& mask_any, int64_t size) : mask(checked_mask(mask_any, "tokens")) {
    images = mask.size(0);
    tokens = mask.size(1);
    SSLFAST_CHECK(size >= 0, "size must not be negative, got ", size);
    rows = allocate(mask, {size}, ScalarType::Long);
    weights = allocate(mask, {size}, ScalarType::Float);
    count = allocate(mask, {1}, ScalarType::Long);
  }
};

}  // namespace
}  // namespace sslfast
