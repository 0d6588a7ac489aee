// A mask as lists of kept and of masked patches, on the GPU: one block an image.
#include "partition.h"

#include <tuple>

#include "checks/partition_mask.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> partition_mask_cuda(const Tensor& mask_any, int64_t kept) {
  const torch::stable::accelerator::DeviceGuard guard(mask_any.get_device_index());
  PartitionMaskArguments arguments(mask_any, kept);
  const int64_t count = arguments.count, patches = arguments.patches;
  SSLFAST_CHECK(count < (int64_t{1} << 31), "mask must have fewer than 2^31 rows, got ", count);
  if (count > 0 && patches > 0) {
    partition_kernel<<<static_cast<unsigned>(count), kPartitionThreads, 0, current_stream(arguments.mask)>>>(
        patches, kept, static_cast<const uint8_t*>(arguments.mask.const_data_ptr()),
        mutable_data<int64_t>(arguments.keep), mutable_data<int64_t>(arguments.masked),
        mutable_data<int64_t>(arguments.restore));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {arguments.keep, arguments.masked, arguments.restore};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, partition_mask)
