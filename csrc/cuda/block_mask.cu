// Masks of blocks on the GPU, one warp an image with its mask in shared memory, a bit a patch: the arithmetic, and so
// every bit of the result, is that of common/masks.h.
#include <vector>

#include "checks/block_mask.h"
#include "partition.h"

namespace sslfast {
namespace {

constexpr int kWarpsPerBlock = 4;           // images of a block, where their masks fit
constexpr size_t kSharedBytes = 48 << 10;   // what a block may have without asking for more
constexpr int kPatchesPerStep = 4 * kWarp;  // four keys a block of random words, one block a lane

struct BlockTask {
  BlockRule rule;
  Stream stream;  // but for the sample
  int64_t count;
  const int64_t* samples;
  const double* counts;
  uint8_t* mask;  // [count, height · width]
};

__device__ int64_t sum_over_warp(int64_t value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Every lane calls masked and fill with the same block.
struct WarpMask {
  uint64_t* words;
  int per_row, lane;

  __device__ bool at(int32_t row, int32_t column) const {
    return words[row * per_row + (column >> 6)] >> (column & 63) & 1;
  }
  __device__ int64_t masked(const Block& b) const {
    int64_t sum = 0;
    for (int i = lane; i < b.height * per_row; i += kWarp) {
      const uint64_t columns = columns_in_word(b.left, b.left + b.width, i % per_row);
      sum += ones(words[b.top * per_row + i] & columns);
    }
    return sum_over_warp(sum);
  }
  __device__ void fill(const Block& b) {
    __syncwarp();
    for (int i = lane; i < b.height * per_row; i += kWarp) {
      words[b.top * per_row + i] |= columns_in_word(b.left, b.left + b.width, i % per_row);
    }
    __syncwarp();
  }
};

// The key up to which patches that are not masked are added, so that `missing` are; in `ties` how many of those whose
// key is equal. Bit by bit from the highest: how many of the keys that agree so far have a 0 next?
__device__ uint32_t completion_key(const Stream& stream, const WarpMask& mask, int32_t patches, int32_t width,
                                   int64_t missing, int64_t* ties) {
  uint32_t key = 0;
  for (int bit = 31; bit >= 0; --bit) {
    int64_t below = 0;
    for (int32_t start = 0; start < patches; start += kPatchesPerStep) {
      const int32_t first = start + 4 * mask.lane;
      if (first >= patches) continue;
      const Philox4 block = draw(stream, kCompletionBlock + static_cast<uint32_t>(first / 4));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t l = first + i;
        below += l < patches && block.word[i] >> bit == key >> bit && !mask.at(l / width, l % width);
      }
    }
    below = sum_over_warp(below);
    if (missing > below) {
      missing -= below;
      key |= 1u << bit;
    }
  }
  *ties = missing;
  return key;
}

__global__ void block_kernel(const __grid_constant__ BlockTask task) {
  extern __shared__ uint64_t words[];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (b >= task.count) return;  // a whole warp leaves, and no barrier of the block follows
  const BlockRule& rule = task.rule;
  const int32_t per_row = words_of_row(rule.width), patches = rule.height * rule.width;
  WarpMask mask{words + warp * rule.height * per_row, per_row, lane};
  for (int i = lane; i < rule.height * per_row; i += kWarp) mask.words[i] = 0;
  __syncwarp();
  Stream stream = task.stream;
  stream.sample = static_cast<uint64_t>(task.samples[b]);
  const double wanted = task.counts[b];
  const int64_t placed = place_blocks(stream, rule, wanted, mask);
  const int64_t missing = rule.complete ? whole_count(wanted, patches) - placed : 0;
  int64_t ties = 0;
  uint32_t limit = 0;
  if (missing > 0) limit = completion_key(stream, mask, patches, rule.width, missing, &ties);
  uint8_t* row = task.mask + b * patches;
  int64_t seen = 0;  // patches so far whose key is the limit
  for (int32_t start = 0; start < patches; start += kWarp) {
    const int32_t l = start + lane;
    const bool exists = l < patches, masked = exists && mask.at(l / rule.width, l % rule.width);
    bool added = false;
    if (missing > 0) {
      const uint32_t key = exists && !masked ? item_key(stream, kCompletionBlock, l) : 0;
      const bool equal = exists && !masked && key == limit;
      const unsigned votes = __ballot_sync(kAllLanes, equal);
      added = exists && !masked && (key < limit || (equal && seen + votes_before(votes) < ties));
      seen += __popc(votes);
    }
    if (exists) row[l] = masked || added;
  }
}

Tensor block_mask_cuda(const Tensor& samples_any, const Tensor& counts_any, std::vector<int64_t> grid,
                       std::vector<double> area, std::vector<double> log_aspect, int64_t tries, bool complete,
                       int64_t seed, int64_t epoch, int64_t view) {
  const torch::stable::accelerator::DeviceGuard guard(samples_any.get_device_index());
  BlockMaskArguments arguments(samples_any, counts_any, grid, area, log_aspect, tries, complete);
  const int64_t count = arguments.count;
  SSLFAST_CHECK(count < (int64_t{1} << 31), "samples must be fewer than 2^31, got ", count);
  if (count == 0) return arguments.mask;
  BlockTask task{};
  task.rule = arguments.rule;
  task.stream = {static_cast<uint64_t>(seed), 0, static_cast<uint32_t>(epoch),
                 kBlockMaskStream + static_cast<uint32_t>(view)};
  task.count = count;
  task.samples = const_data<int64_t>(arguments.samples);
  task.counts = const_data<double>(arguments.counts);
  task.mask = static_cast<uint8_t*>(arguments.mask.mutable_data_ptr());
  const size_t bytes = sizeof(uint64_t) * static_cast<size_t>(task.rule.height) * words_of_row(task.rule.width);
  const int warps = bytes * kWarpsPerBlock <= kSharedBytes ? kWarpsPerBlock : 1;  // one is at most 24 KiB
  block_kernel<<<static_cast<unsigned>((count + warps - 1) / warps), warps * kWarp, bytes * warps,
                 current_stream(arguments.samples)>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return arguments.mask;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, block_mask)
