// build: one level
// Random masks on the CPU: the arithmetic is in common/masks.h. One level serves all.
#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks/random_mask.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> random_mask_cpu(const Tensor& samples_any, std::optional<Tensor> noise_any,
                                                   std::vector<int64_t> grid, std::vector<int64_t> unit, int64_t kept,
                                                   bool ascending, int64_t seed, int64_t epoch, int64_t view) {
  RandomMaskArguments arguments(samples_any, noise_any, grid, unit, kept, ascending, seed, epoch, view);
  const int64_t count = arguments.count, cells = arguments.cells, kept_cells = arguments.kept_cells;
  RandomMask& mask = arguments.mask;
  make_tables(&mask);
  const auto* sample = const_data<int64_t>(arguments.samples);
  const float* noise = arguments.noise_data();
  auto *keep = mutable_data<int64_t>(arguments.keep), *masked = mutable_data<int64_t>(arguments.masked);
  auto* restore = mutable_data<int64_t>(arguments.restore);
  const int64_t images_per_task = std::max<int64_t>(1, (1 << 13) / cells);
  auto task = [&](int64_t t) {
    MaskScratch scratch;
    for (int64_t b = t * images_per_task; b < std::min(count, (t + 1) * images_per_task); ++b) {
      random_mask_image(mask, sample[b], noise ? noise + b * mask.units : nullptr, scratch, keep + b * kept_cells,
                        masked + b * (cells - kept_cells), restore + b * cells);
    }
  };
  parallel_each(torch_parallel(), (count + images_per_task - 1) / images_per_task, task);
  return {arguments.keep, arguments.masked, arguments.restore};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, random_mask)
#endif  // SSLFAST_CPU_DISPATCH
