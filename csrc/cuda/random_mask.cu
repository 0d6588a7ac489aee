// Random masks on the GPU: one thread a unit, whose rank is the number of units of a smaller (key, number). The keys
// are those of common/masks.h. Ranks by counting are units² comparisons an image, at four instructions each, from
// shared memory: for the up to a few thousand units that models have that is less than the passes of a sort.
#include <optional>
#include <tuple>
#include <vector>

#include "checks/random_mask.h"
#include "partition.h"

namespace sslfast {
namespace {

constexpr int kRankThreads = 256;
constexpr int kTile = 4 * kRankThreads;  // keys in shared memory: four of each thread, one block of random words

struct RankTask {
  UnitGrid shape;
  int32_t units, kept, inside;  // cells of a unit
  int64_t cells;
  Stream stream;  // but for the sample
  const int64_t* samples;
  const float* noise;  // [images, units], or null
  uint8_t* gone;       // [images, cells], or null: ids in the order of the ranks are wanted
  int64_t *keep, *masked, *restore;
};

struct alignas(16) FourKeys {
  uint32_t key[4];
};

// Where there is no unit, the largest key: no key is larger.
__device__ void load_tile(const RankTask& task, const Stream& stream, const float* noise, int32_t start,
                          FourKeys* keys) {
  const int32_t first = start + 4 * static_cast<int32_t>(threadIdx.x);
  FourKeys four;
  Philox4 block{};
  if (!noise && first < task.units) block = draw(stream, static_cast<uint32_t>(first / 4));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    four.key[i] = ~0u;
    if (first + i < task.units) four.key[i] = noise ? noise_key(noise[first + i]) : block.word[i];
  }
  keys[threadIdx.x] = four;
}

// How many of the keys [begin, end), both multiples of four, come before one: `before(key, number)`.
template <typename F>
__device__ int32_t count_before(const FourKeys* keys, int32_t begin, int32_t end, F before) {
  int32_t count = 0;
#pragma unroll 4
  for (int32_t i = begin; i < end; i += 4) {
    const FourKeys four = keys[i / 4];
#pragma unroll
    for (int j = 0; j < 4; ++j) count += before(four.key[j], i + j);
  }
  return count;
}

// Blocks: (image, kRankThreads of its units).
__global__ void __launch_bounds__(kRankThreads) rank_kernel(const __grid_constant__ RankTask task) {
  __shared__ FourKeys keys[kTile / 4];
  const int64_t b = blockIdx.x;
  const auto unit = static_cast<int32_t>(blockIdx.y * kRankThreads + threadIdx.x);
  const bool exists = unit < task.units;
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarp);
  Stream stream = task.stream;
  stream.sample = static_cast<uint64_t>(task.samples[b]);
  const float* noise = task.noise ? task.noise + b * task.units : nullptr;
  uint32_t key = 0;
  if (exists) key = noise ? noise_key(noise[unit]) : item_key(stream, 0, unit);
  int32_t rank = 0;
  for (int32_t start = 0; start < task.units; start += kTile) {
    __syncthreads();
    load_tile(task, stream, noise, start, keys);
    __syncthreads();
    // Of equal keys the smaller number is first: that is known but for the warp's own units.
    const int32_t end = min(kTile, (task.units - start + 3) / 4 * 4), own = unit - lane - start;
    const int32_t begin_own = min(max(own, 0), end), end_own = min(max(own + kWarp, 0), end);
    rank += count_before(keys, 0, begin_own, [key](uint32_t other, int32_t) { return other <= key; });
    rank += count_before(keys, begin_own, end_own, [key, unit, start](uint32_t other, int32_t i) {
      return other < key || (other == key && start + i < unit);
    });
    rank += count_before(keys, end_own, end, [key](uint32_t other, int32_t) { return other < key; });
  }
  if (!exists) return;
  for (int32_t i = 0; i < task.inside; ++i) {
    const int32_t cell = cell_of_unit(task.shape, unit, i);
    if (task.gone) {
      task.gone[b * task.cells + cell] = rank >= task.kept;
      continue;
    }
    const int64_t place = int64_t{rank} * task.inside + i, keep_size = int64_t{task.kept} * task.inside;
    if (place < keep_size) {
      task.keep[b * keep_size + place] = cell;
    } else {
      task.masked[b * (task.cells - keep_size) + place - keep_size] = cell;
    }
    task.restore[b * task.cells + cell] = place;
  }
}

std::tuple<Tensor, Tensor, Tensor> random_mask_cuda(const Tensor& samples_any, std::optional<Tensor> noise_any,
                                                    std::vector<int64_t> grid, std::vector<int64_t> unit, int64_t kept,
                                                    bool ascending, int64_t seed, int64_t epoch, int64_t view) {
  const torch::stable::accelerator::DeviceGuard guard(samples_any.get_device_index());
  RandomMaskArguments arguments(samples_any, noise_any, grid, unit, kept, ascending, seed, epoch, view);
  const RandomMask& mask = arguments.mask;
  const int64_t count = arguments.count, cells = arguments.cells, kept_cells = arguments.kept_cells;
  SSLFAST_CHECK(count < (int64_t{1} << 31), "samples must be fewer than 2^31, got ", count);
  const std::tuple results{arguments.keep, arguments.masked, arguments.restore};
  if (count == 0) return results;
  Tensor gone = allocate(arguments.samples, {ascending ? count : 0, cells}, ScalarType::Byte);
  const cudaStream_t stream = current_stream(arguments.samples);
  const RankTask task{mask.shape,
                      static_cast<int32_t>(mask.units),
                      static_cast<int32_t>(kept),
                      static_cast<int32_t>(cells / mask.units),
                      cells,
                      mask.stream,
                      const_data<int64_t>(arguments.samples),
                      arguments.noise_data(),
                      ascending ? mutable_data<uint8_t>(gone) : nullptr,
                      mutable_data<int64_t>(arguments.keep),
                      mutable_data<int64_t>(arguments.masked),
                      mutable_data<int64_t>(arguments.restore)};
  const dim3 blocks(static_cast<unsigned>(count),
                    static_cast<unsigned>((mask.units + kRankThreads - 1) / kRankThreads));
  rank_kernel<<<blocks, kRankThreads, 0, stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (ascending) {
    partition_kernel<<<static_cast<unsigned>(count), kPartitionThreads, 0, stream>>>(
        cells, kept_cells, task.gone, task.keep, task.masked, task.restore);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return results;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, random_mask)
