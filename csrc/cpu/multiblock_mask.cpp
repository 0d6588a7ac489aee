// build: one level, exact
// I-JEPA's multi-block masks on the CPU, samples shared among threads; what is drawn is in common/multiblock_mask.h.
#ifdef SSLFAST_CPU_DISPATCH
#include "common/multiblock_mask.h"

#include <tuple>

#include "checks/multiblock_mask.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> multiblock_mask_cpu(const Tensor& samples_any, std::vector<int64_t> grid,
                                                       int64_t targets, std::vector<int64_t> target_block,
                                                       std::vector<int64_t> context_block, int64_t kept,
                                                       int64_t min_keep, bool allow_overlap, bool upstream,
                                                       int64_t seed, int64_t epoch, int64_t view) {
  MultiBlockArguments arguments(samples_any, grid, targets, target_block, context_block, kept, min_keep, allow_overlap,
                                upstream, seed, epoch, view);
  const int64_t count = arguments.count, target_patches = arguments.target_patches;
  const auto* sample = const_data<int64_t>(arguments.samples);
  auto *context = mutable_data<int64_t>(arguments.context), *target = mutable_data<int64_t>(arguments.target);
  auto* counts = mutable_data<int64_t>(arguments.counts);
  constexpr int64_t kSamplesPerTask = 8;
  auto task = [&](int64_t t) {
    MultiBlockScratch scratch;
    for (int64_t b = t * kSamplesPerTask; b < std::min((t + 1) * kSamplesPerTask, count); ++b)
      counts[b] = multiblock_sample(arguments.rules, static_cast<uint64_t>(sample[b]), context + b * kept,
                                    target + b * target_patches, count * target_patches, scratch);
  };
  parallel_each(torch_parallel(), (count + kSamplesPerTask - 1) / kSamplesPerTask, task);
  return {arguments.context, arguments.target, arguments.counts};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, multiblock_mask)
#endif  // SSLFAST_CPU_DISPATCH
