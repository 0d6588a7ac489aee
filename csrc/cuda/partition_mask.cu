// A mask as lists of kept and of masked patches, on the GPU: one block an image.
#include "partition.h"

#include <tuple>

#include "torch_api.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> partition_mask_cuda(const Tensor& mask_any, int64_t kept) {
  SSLFAST_CHECK(mask_any.dim() == 2, "mask must be two-dimensional [images, patches], got ", mask_any.dim(),
                " dimensions");
  const int64_t count = mask_any.size(0), patches = mask_any.size(1);
  check_tensor(mask_any, "mask", {count, patches}, ScalarType::Bool, mask_any);
  SSLFAST_CHECK(kept >= 0 && kept <= patches, "kept must be between 0 and ", patches, ", got ", kept);
  SSLFAST_CHECK(count < (int64_t{1} << 31), "mask must have fewer than 2^31 rows, got ", count);
  const torch::stable::accelerator::DeviceGuard guard(mask_any.get_device_index());
  const Tensor mask = contiguous(mask_any);
  Tensor keep = torch::stable::new_empty(mask, {count, kept}, ScalarType::Long);
  Tensor masked = torch::stable::new_empty(mask, {count, patches - kept}, ScalarType::Long);
  Tensor restore = torch::stable::new_empty(mask, {count, patches}, ScalarType::Long);
  if (count > 0 && patches > 0) {
    partition_kernel<<<static_cast<unsigned>(count), kPartitionThreads, 0, current_stream(mask)>>>(
        patches, kept, static_cast<const uint8_t*>(mask.const_data_ptr()), mutable_data<int64_t>(keep),
        mutable_data<int64_t>(masked), mutable_data<int64_t>(restore));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {keep, masked, restore};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) { m.impl("partition_mask", TORCH_BOX(&sslfast::partition_mask_cuda)); }
