// Arguments of multiblock_mask, checked alike on every device. For registration code alone.
#pragma once
#include <vector>

#include "common/multiblock_mask.h"
#include "torch_api.h"

namespace sslfast {
namespace {

struct MultiBlockArguments {
  int64_t count, target_patches;  // B, and the patches of one target
  Tensor samples;                 // [B]
  MultiBlockRules rules;
  Tensor context, target, counts;  // [B, kept], [targets, B, target_patches], [B]: the results

  MultiBlockArguments(const Tensor& samples_any, const std::vector<int64_t>& grid, int64_t targets,
                      const std::vector<int64_t>& target_block, const std::vector<int64_t>& context_block, int64_t kept,
                      int64_t min_keep, bool allow_overlap, bool upstream, int64_t seed, int64_t epoch, int64_t view) {
    count = samples_any.numel();
    check_tensor(samples_any, "samples", {count}, ScalarType::Long, samples_any);
    SSLFAST_CHECK(fits(grid, targets, target_block, context_block, kept, upstream), kMultiBlockLimits);
    samples = as_contiguous(samples_any);
    rules = rules_of(grid, targets, target_block, context_block, kept, min_keep, allow_overlap, upstream, seed, epoch,
                     view);
    target_patches = target_block[0] * target_block[1];
    context = allocate(samples, {count, kept});
    target = allocate(samples, {targets, count, target_patches});
    counts = allocate(samples, {count});
  }
};

}  // namespace
}  // namespace sslfast
