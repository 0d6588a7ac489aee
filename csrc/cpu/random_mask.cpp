// build: one level
// Random masks on the CPU: the arithmetic is in common/masks.h. One level serves all.
#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/masks_host.h"
#include "torch_api.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> random_mask_cpu(const Tensor& samples_any, std::optional<Tensor> noise_any,
                                                   std::vector<int64_t> grid, std::vector<int64_t> unit, int64_t kept,
                                                   bool ascending, int64_t seed, int64_t epoch, int64_t view) {
  RandomMask mask{};
  const std::string wrong = make_random_mask(grid, unit, kept, ascending, seed, epoch, view, &mask);
  SSLFAST_CHECK(wrong.empty(), wrong);
  make_tables(&mask);
  const int64_t count = samples_any.numel(), cells = cells_of(mask.shape), keep_size = kept * (cells / mask.units);
  check_tensor(samples_any, "samples", {count}, ScalarType::Long, samples_any);
  const Tensor samples = contiguous(samples_any);
  std::optional<Tensor> noise;
  if (noise_any.has_value()) {
    check_tensor(*noise_any, "noise", {count, mask.units}, ScalarType::Float, samples);
    noise = contiguous(*noise_any);
  }
  Tensor keep = torch::stable::new_empty(samples, {count, keep_size});
  Tensor masked = torch::stable::new_empty(samples, {count, cells - keep_size});
  Tensor restore = torch::stable::new_empty(samples, {count, cells});
  const auto* sample = const_data<int64_t>(samples);
  const float* of_noise = noise.has_value() ? const_data<float>(*noise) : nullptr;
  auto *keep_row = mutable_data<int64_t>(keep), *masked_row = mutable_data<int64_t>(masked);
  auto* restore_row = mutable_data<int64_t>(restore);
  const int64_t images_per_task = std::max<int64_t>(1, (1 << 13) / cells);
  auto task = [&](int64_t t) {
    MaskScratch scratch;
    for (int64_t b = t * images_per_task; b < std::min(count, (t + 1) * images_per_task); ++b) {
      random_mask_image(mask, sample[b], of_noise ? of_noise + b * mask.units : nullptr, scratch,
                        keep_row + b * keep_size, masked_row + b * (cells - keep_size), restore_row + b * cells);
    }
  };
  parallel_each(torch_parallel(), (count + images_per_task - 1) / images_per_task, task);
  return {keep, masked, restore};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) { m.impl("random_mask", TORCH_BOX(&sslfast::random_mask_cpu)); }
#endif  // SSLFAST_CPU_DISPATCH
