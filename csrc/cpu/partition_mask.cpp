// build: one level
// A mask as lists of kept and of masked patches, on the CPU. Bytes read and written are all there is to it.
#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <tuple>
#include <vector>

#include "common/masks_host.h"
#include "torch_api.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> partition_mask_cpu(const Tensor& mask_any, int64_t kept) {
  SSLFAST_CHECK(mask_any.dim() == 2, "mask must be two-dimensional [images, patches], got ", mask_any.dim(),
                " dimensions");
  const int64_t count = mask_any.size(0), patches = mask_any.size(1);
  check_tensor(mask_any, "mask", {count, patches}, ScalarType::Bool, mask_any);
  SSLFAST_CHECK(kept >= 0 && kept <= patches, "kept must be between 0 and ", patches, ", got ", kept);
  const Tensor mask = contiguous(mask_any);
  Tensor keep = torch::stable::new_empty(mask, {count, kept}, ScalarType::Long);
  Tensor masked = torch::stable::new_empty(mask, {count, patches - kept}, ScalarType::Long);
  Tensor restore = torch::stable::new_empty(mask, {count, patches}, ScalarType::Long);
  const auto* row = static_cast<const uint8_t*>(mask.const_data_ptr());
  auto *keep_row = mutable_data<int64_t>(keep), *masked_row = mutable_data<int64_t>(masked);
  auto* restore_row = mutable_data<int64_t>(restore);
  std::vector<int64_t> kept_of(count);
  const int64_t rows_per_task = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, patches));
  auto task = [&](int64_t t) {
    for (int64_t b = t * rows_per_task; b < std::min(count, (t + 1) * rows_per_task); ++b) {
      const uint8_t* gone = row + b * patches;
      int64_t sum = 0;
      for (int64_t l = 0; l < patches; ++l) sum += gone[l] != 0;
      kept_of[b] = patches - sum;
      if (kept_of[b] != kept) continue;  // there is no room for another number
      partition_items(
          patches, kept, [=](int64_t l) { return gone[l] != 0; }, keep_row + b * kept,
          masked_row + b * (patches - kept), restore_row + b * patches);
    }
  };
  parallel_each(torch_parallel(), (count + rows_per_task - 1) / rows_per_task, task);
  for (int64_t b = 0; b < count; ++b) {
    SSLFAST_CHECK(kept_of[b] == kept, "mask must keep the same number of patches in every row, ", kept, ", but row ", b,
                  " keeps ", kept_of[b]);
  }
  return {keep, masked, restore};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) { m.impl("partition_mask", TORCH_BOX(&sslfast::partition_mask_cpu)); }
#endif  // SSLFAST_CPU_DISPATCH
