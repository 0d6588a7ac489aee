// Arguments of random_mask, checked alike on every device. For registration code alone.
#pragma once
#include <optional>
#include <vector>

#include "common/masks_host.h"
#include "torch_api.h"

namespace sslfast {
namespace {

struct RandomMaskArguments {
  RandomMask mask;
  int64_t count, cells, kept_cells;
  Tensor samples;                // [B]
  std::optional<Tensor> noise;   // [B, units]
  Tensor keep, masked, restore;  // [B, kept cells], [B, the others], [B, cells]: the results

  RandomMaskArguments(const Tensor& samples_any, const std::optional<Tensor>& noise_any,
                      const std::vector<int64_t>& grid, const std::vector<int64_t>& unit, int64_t kept, bool ascending,
                      int64_t seed, int64_t epoch, int64_t view)
      : mask{} {
    const std::string wrong = make_random_mask(grid, unit, kept, ascending, seed, epoch, view, &mask);
    SSLFAST_CHECK(wrong.empty(), wrong);
    count = samples_any.numel();
    cells = cells_of(mask.shape);
    kept_cells = kept * (cells / mask.units);
    check_tensor(samples_any, "samples", {count}, ScalarType::Long, samples_any);
    samples = as_contiguous(samples_any);
    if (noise_any.has_value()) {
      check_tensor(*noise_any, "noise", {count, mask.units}, ScalarType::Float, samples);
      noise = as_contiguous(*noise_any);
    }
    keep = allocate(samples, {count, kept_cells});
    masked = allocate(samples, {count, cells - kept_cells});
    restore = allocate(samples, {count, cells});
  }
  const float* noise_data() const { return noise.has_value() ? const_data<float>(*noise) : nullptr; }
};

}  // namespace
}  // namespace sslfast
