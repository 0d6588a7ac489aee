// build: one level
// A mask as lists of kept and of masked patches, on the CPU. Bytes read and written are all there is to it.
#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <tuple>
#include <vector>

#include "checks/partition_mask.h"
#include "common/masks_host.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> partition_mask_cpu(const Tensor& mask_any, int64_t kept) {
  PartitionMaskArguments arguments(mask_any, kept);
  const int64_t count = arguments.count, patches = arguments.patches;
  const auto* row = static_cast<const uint8_t*>(arguments.mask.const_data_ptr());
  auto *keep = mutable_data<int64_t>(arguments.keep), *masked = mutable_data<int64_t>(arguments.masked);
  auto* restore = mutable_data<int64_t>(arguments.restore);
  std::vector<int64_t> row_kept(count);
  const int64_t rows_per_task = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, patches));
  auto task = [&](int64_t t) {
    for (int64_t b = t * rows_per_task; b < std::min(count, (t + 1) * rows_per_task); ++b) {
      const uint8_t* gone = row + b * patches;
      int64_t sum = 0;
      for (int64_t l = 0; l < patches; ++l) sum += gone[l] != 0;
      row_kept[b] = patches - sum;
      if (row_kept[b] != kept) continue;  // there is no room for another number
      partition_items(
          patches, kept, [=](int64_t l) { return gone[l] != 0; }, keep + b * kept, masked + b * (patches - kept),
          restore + b * patches);
    }
  };
  parallel_each(torch_parallel(), (count + rows_per_task - 1) / rows_per_task, task);
  for (int64_t b = 0; b < count; ++b) {
    SSLFAST_CHECK(row_kept[b] == kept, "mask must keep the same number of patches in every row, ", kept, ", but row ",
                  b, " keeps ", row_kept[b]);
  }
  return {arguments.keep, arguments.masked, arguments.restore};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, partition_mask)
#endif  // SSLFAST_CPU_DISPATCH
