// build: one level, exact
// Masks of blocks on the CPU: the arithmetic is in common/masks.h. One level serves all, and the build switches the
// joining of products and sums off for this file, so that the bits are the same everywhere.
#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <vector>

#include "checks/block_mask.h"

namespace sslfast {
namespace {

Tensor block_mask_cpu(const Tensor& samples_any, const Tensor& counts_any, std::vector<int64_t> grid,
                      std::vector<double> area, std::vector<double> log_aspect, int64_t tries, bool complete,
                      int64_t seed, int64_t epoch, int64_t view) {
  BlockMaskArguments arguments(samples_any, counts_any, grid, area, log_aspect, tries, complete);
  const int64_t count = arguments.count, patches = arguments.patches;
  const auto* sample = const_data<int64_t>(arguments.samples);
  const auto* wanted = const_data<double>(arguments.counts);
  auto* row = static_cast<uint8_t*>(arguments.mask.mutable_data_ptr());
  const int64_t images_per_task = std::max<int64_t>(1, (1 << 12) / patches);
  auto task = [&](int64_t t) {
    MaskScratch scratch;
    for (int64_t b = t * images_per_task; b < std::min(count, (t + 1) * images_per_task); ++b) {
      const Stream stream{static_cast<uint64_t>(seed), static_cast<uint64_t>(sample[b]), static_cast<uint32_t>(epoch),
                          kBlockMaskStream + static_cast<uint32_t>(view)};
      block_mask_image(stream, arguments.rule, wanted[b], scratch, row + b * patches);
    }
  };
  parallel_each(torch_parallel(), (count + images_per_task - 1) / images_per_task, task);
  return arguments.mask;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, block_mask)
#endif  // SSLFAST_CPU_DISPATCH
