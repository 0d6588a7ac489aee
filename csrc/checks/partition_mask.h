// Arguments of partition_mask, checked alike on every device. For registration code alone.
#pragma once
#include "torch_api.h"

namespace sslfast {
namespace {

struct PartitionMaskArguments {
  int64_t count, patches;
  Tensor mask;                   // [B, patches]
  Tensor keep, masked, restore;  // [B, kept], [B, patches − kept], [B, patches]: the results

  PartitionMaskArguments(const Tensor& mask_any, int64_t kept) {
    SSLFAST_CHECK(mask_any.dim() == 2, "mask must be two-dimensional [images, patches], got ", mask_any.dim(),
                  " dimensions");
    count = mask_any.size(0);
    patches = mask_any.size(1);
    check_tensor(mask_any, "mask", {count, patches}, ScalarType::Bool, mask_any);
    SSLFAST_CHECK(kept >= 0 && kept <= patches, "kept must be between 0 and ", patches, ", got ", kept);
    mask = as_contiguous(mask_any);
    keep = allocate(mask, {count, kept}, ScalarType::Long);
    masked = allocate(mask, {count, patches - kept}, ScalarType::Long);
    restore = allocate(mask, {count, patches}, ScalarType::Long);
  }
};

}  // namespace
}  // namespace sslfast
