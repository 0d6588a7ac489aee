// I-JEPA's multi-block masks on the GPU: a block of threads a sample, a thread a patch. What is drawn, and the order in
// which patches are taken, is in common/multiblock_mask.h.
#include "checks/multiblock_mask.h"

#include <tuple>

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct MultiBlockOut {
  const int64_t* samples;  // [B]
  int64_t* context;        // [B, kept]
  int64_t* targets;        // [T, B, h·w]
  int64_t* counts;         // [B]
  uint64_t* ranks;         // [B, H·W], where kept > 0
};

// How many of the threads' own ranks are at most `bound`; the same number in every thread.
__device__ int32_t count_at_most(const uint64_t* rank, int32_t patches, uint64_t bound) {
  int32_t count = 0;
  for (int32_t first = 0; first < patches; first += kThreads) {
    const int32_t l = first + static_cast<int32_t>(threadIdx.x);
    count += __syncthreads_count(l < patches && rank[l] <= bound);
  }
  return count;
}

// The kept-th smallest rank, bit by bit: ranks have 50 bits, those of targets' patches all 64.
__device__ uint64_t largest_kept(const uint64_t* rank, int32_t patches, int32_t kept) {
  constexpr uint64_t kLargest = (uint64_t{1} << 50) - 1;
  uint64_t low = 0, high = kLargest;  // in every step count(≤ high) ≥ kept, unless there are too few
  while (low < high) {
    const uint64_t middle = low + (high - low) / 2;
    if (count_at_most(rank, patches, middle) >= kept)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Numbers of the patches up to `bound` in ascending order, and −1 where there are fewer than kept.
__device__ void write_kept(const uint64_t* rank, int32_t patches, uint64_t bound, int32_t kept, int64_t* context) {
  __shared__ int32_t of_warp[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int32_t found = 0;
  for (int32_t first = 0; first < patches; first += kThreads) {
    const int32_t l = first + static_cast<int32_t>(threadIdx.x);
    const bool mine = l < patches && rank[l] <= bound;
    const unsigned together = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) of_warp[warp] = __popc(together);
    __syncthreads();
    int32_t at = found + __popc(together & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += of_warp[w];
      found += of_warp[w];
    }
    if (mine) context[at] = l;
    __syncthreads();  // before of_warp is written again
  }
  for (int32_t k = found + static_cast<int32_t>(threadIdx.x); k < kept; k += kThreads) context[k] = -1;
}

__global__ void multiblock_kernel(MultiBlockRules rules, MultiBlockOut out) {
  __shared__ Corner corners[kMostTargets];
  const int64_t b = blockIdx.x, samples = gridDim.x;
  const Stream stream = multiblock_stream(rules, static_cast<uint64_t>(out.samples[b]));
  const int32_t patches = rules.height * rules.width;
  const int64_t of_target = int64_t{rules.target_height} * rules.target_width;
  for (int t = threadIdx.x; t < rules.targets; t += kThreads) corners[t] = draw_target(rules, stream, t);
  __syncthreads();
  for (int64_t i = threadIdx.x; i < rules.targets * of_target; i += kThreads) {
    const int64_t t = i / of_target, k = i % of_target;
    const int64_t y = corners[t].top + k / rules.target_width, x = corners[t].left + k % rules.target_width;
    out.targets[(t * samples + b) * of_target + k] = y * rules.width + x;
  }

  Corner best{};
  int best_avoids = 0;
  int32_t most = -1;
  for (int n = 0; n < attempts(rules) && !(most >= 0 && enough(rules, most)); ++n) {
    const Corner corner = draw_context(rules, stream, n);
    const int avoids = avoided(rules, n);
    const int32_t area = rules.context_height * rules.context_width;
    int32_t count = 0;
    for (int32_t first = 0; first < area; first += kThreads) {
      const int32_t k = first + static_cast<int32_t>(threadIdx.x);
      const int32_t y = corner.top + k / rules.context_width, x = corner.left + k % rules.context_width;
      count += __syncthreads_count(k < area && first_target(rules, corners, y, x) >= avoids);
    }
    if (count > most) {
      best = corner;
      best_avoids = avoids;
      most = count;
    }
  }
  if (threadIdx.x == 0) out.counts[b] = most;
  if (rules.kept == 0) return;

  const bool by_key = most != rules.kept && !rules.upstream;
  uint64_t* const ranks = out.ranks + b * patches;  // each thread reads back what it wrote itself
  for (int32_t l = threadIdx.x; l < patches; l += kThreads) {
    const Philox4 random = by_key ? draw(stream, kPatchKeyBlock + static_cast<uint32_t>(l / 4)) : Philox4{};
    const uint32_t low = l & 1 ? random.word[1] : random.word[0], high = l & 1 ? random.word[3] : random.word[2];
    const int32_t y = l / rules.width, x = l % rules.width;
    ranks[l] = rank(rules, best, best_avoids, first_target(rules, corners, y, x), l & 2 ? high : low, y, x);
  }
  write_kept(ranks, patches, largest_kept(ranks, patches, rules.kept), rules.kept, out.context + b * rules.kept);
}

std::tuple<Tensor, Tensor, Tensor> multiblock_mask_cuda(const Tensor& samples_any, std::vector<int64_t> grid,
                                                        int64_t targets, std::vector<int64_t> target_block,
                                                        std::vector<int64_t> context_block, int64_t kept,
                                                        int64_t min_keep, bool allow_overlap, bool upstream,
                                                        int64_t seed, int64_t epoch, int64_t view) {
  const torch::stable::accelerator::DeviceGuard guard(samples_any.get_device_index());
  MultiBlockArguments arguments(samples_any, grid, targets, target_block, context_block, kept, min_keep, allow_overlap,
                                upstream, seed, epoch, view);
  const int64_t count = arguments.count;
  SSLFAST_CHECK(count < (int64_t{1} << 31), "samples must be fewer than 2^31, got ", count);
  const Tensor& samples = arguments.samples;
  Tensor ranks = allocate(samples, {kept == 0 ? 0 : count, grid[0] * grid[1]});
  const std::tuple results{arguments.context, arguments.target, arguments.counts};
  if (count == 0) return results;
  const MultiBlockOut out{const_data<int64_t>(samples), mutable_data<int64_t>(arguments.context),
                          mutable_data<int64_t>(arguments.target), mutable_data<int64_t>(arguments.counts),
                          mutable_data<uint64_t>(ranks)};
  multiblock_kernel<<<static_cast<unsigned>(count), kThreads, 0, current_stream(samples)>>>(arguments.rules, out);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return results;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, multiblock_mask)
