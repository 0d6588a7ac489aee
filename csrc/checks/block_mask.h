// Arguments of block_mask, checked alike on every device. For registration code alone.
#pragma once
#include <vector>

#include "common/masks_host.h"
#include "torch_api.h"

namespace sslfast {
namespace {

struct BlockMaskArguments {
  BlockRule rule;
  int64_t count, patches;
  Tensor samples, counts;  // [B]
  Tensor mask;             // [B, patches], the result

  BlockMaskArguments(const Tensor& samples_any, const Tensor& counts_any, const std::vector<int64_t>& grid,
                     const std::vector<double>& area, const std::vector<double>& log_aspect, int64_t tries,
                     bool complete)
      : rule{} {
    const std::string wrong = make_block_rule(grid, area, log_aspect, tries, complete, &rule);
    SSLFAST_CHECK(wrong.empty(), wrong);
    count = samples_any.numel();
    patches = grid[0] * grid[1];
    check_tensor(samples_any, "samples", {count}, ScalarType::Long, samples_any);
    check_tensor(counts_any, "counts", {count}, ScalarType::Double, samples_any);
    samples = as_contiguous(samples_any);
    counts = as_contiguous(counts_any);
    mask = allocate(samples, {count, patches}, ScalarType::Bool);
  }
};

}  // namespace
}  // namespace sslfast
