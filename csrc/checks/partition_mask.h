// Arguments of partition_mask, checked alike on every device. For registration code alone.
#pragma once
#include "mask.h"

namespace sslfast {
namespace {

struct PartitionMaskArguments {
  int64_t count, patches;
  Tensor mask;                   // [B, patches]
  Tensor keep, masked, restore;  // [B, kept], [B, patches − kept], [B, patches]: the results

  PartitionMaskArguments(const Tensor& mask_any, int64_t kept) : mask(checked_mask(mask_any, "patches")) {
    count = mask.size(0);
    patches = mask.size(1);
    SSLFAST_CHECK(kept >= 0 && kept <= patches, "kept must be between 0 and ", patches, ", got ", kept);
    keep = allocate(mask, {count, kept}, ScalarType::Long);
    masked = allocate(mask, {count, patches - kept}, ScalarType::Long);
    restore = allocate(mask, {count, patches}, ScalarType::Long);
  }
};

}  // namespace
}  // namespace sslfast
