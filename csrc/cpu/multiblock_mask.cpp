// build: one level, exact
// I-JEPA's multi-block masks on the CPU, samples shared among threads; what is drawn is in common/multiblock_mask.h.
#ifdef SSLFAST_CPU_DISPATCH
#include "common/multiblock_mask.h"

#include <tuple>

#include "torch_api.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> multiblock_mask_cpu(const Tensor& samples_any, std::vector<int64_t> grid,
                                                       int64_t targets, std::vector<int64_t> target_block,
                                                       std::vector<int64_t> context_block, int64_t kept,
                                                       int64_t min_keep, bool allow_overlap, bool upstream,
                                                       int64_t seed, int64_t epoch, int64_t view) {
  const int64_t count = samples_any.numel();
  check_tensor(samples_any, "samples", {count}, ScalarType::Long, samples_any);
  SSLFAST_CHECK(fits(grid, targets, target_block, context_block, kept, upstream), kMultiBlockLimits);
  const Tensor samples = contiguous(samples_any);
  const MultiBlockRules rules =
      rules_of(grid, targets, target_block, context_block, kept, min_keep, allow_overlap, upstream, seed, epoch, view);
  const int64_t of_target = target_block[0] * target_block[1];
  Tensor context = torch::stable::new_empty(samples, {count, kept});
  Tensor target = torch::stable::new_empty(samples, {targets, count, of_target});
  Tensor counts = torch::stable::new_empty(samples, {count});
  const auto* sample = const_data<int64_t>(samples);
  auto *context_out = mutable_data<int64_t>(context), *target_out = mutable_data<int64_t>(target);
  auto* counts_out = mutable_data<int64_t>(counts);
  constexpr int64_t kSamplesPerTask = 8;
  auto task = [&](int64_t t) {
    MultiBlockScratch scratch;
    for (int64_t b = t * kSamplesPerTask; b < std::min((t + 1) * kSamplesPerTask, count); ++b)
      counts_out[b] = multiblock_sample(rules, static_cast<uint64_t>(sample[b]), context_out + b * kept,
                                        target_out + b * of_target, count * of_target, scratch);
  };
  parallel_each(torch_parallel(), (count + kSamplesPerTask - 1) / kSamplesPerTask, task);
  return {context, target, counts};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) { m.impl("multiblock_mask", TORCH_BOX(&sslfast::multiblock_mask_cpu)); }
#endif  // SSLFAST_CPU_DISPATCH
