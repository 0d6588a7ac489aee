// The masked tokens of a batch as one list of a fixed size, on the GPU: the tokens of each image are counted by a warp,
// then written by a block that first adds up the counts of the images before it.
#include <algorithm>
#include <tuple>

#include "checks/masked_rows.h"
#include "partition.h"

namespace sslfast {
namespace {

constexpr int kCountWarps = 4;

struct RowsTask {
  int64_t images, tokens, size;
  const uint8_t* mask;  // [images, tokens]
  int64_t* of_image;    // [images] masked tokens
  int64_t* rows;        // [size]
  float* weights;       // [size]
  int64_t* count;       // [1]
};

__device__ int64_t sum_over_warp(int64_t value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__global__ void count_kernel(const __grid_constant__ RowsTask task) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kCountWarps + threadIdx.x / kWarp;
  if (b >= task.images) return;  // a whole warp leaves
  int64_t sum = 0;
  for (int64_t l = threadIdx.x % kWarp; l < task.tokens; l += kWarp) sum += task.mask[b * task.tokens + l] != 0;
  sum = sum_over_warp(sum);
  if (threadIdx.x % kWarp == 0) task.of_image[b] = sum;
}

__global__ void __launch_bounds__(kPartitionThreads) rows_kernel(const __grid_constant__ RowsTask task) {
  constexpr int kWarps = kPartitionThreads / kWarp;
  __shared__ int64_t of_warp[2][kWarps];
  const int64_t b = blockIdx.x;
  int64_t before = 0, total = 0;  // masked tokens of the images before this one, and of all
  for (int64_t i = threadIdx.x; i < task.images; i += kPartitionThreads) {
    const int64_t n = task.of_image[i];
    total += n;
    if (i < b) before += n;
  }
  before = sum_over_warp(before);
  total = sum_over_warp(total);
  if (threadIdx.x % kWarp == 0) {
    of_warp[0][threadIdx.x / kWarp] = before;
    of_warp[1][threadIdx.x / kWarp] = total;
  }
  __syncthreads();
  before = total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += of_warp[0][w];
    total += of_warp[1][w];
  }
  if (b == 0 && threadIdx.x == 0) *task.count = total;
  // Every block fills its share of what is behind the last token.
  for (int64_t i = total + b * kPartitionThreads + threadIdx.x; i < task.size;
       i += static_cast<int64_t>(gridDim.x) * kPartitionThreads) {
    task.rows[i] = -1;
    task.weights[i] = 0;
  }
  if (b >= task.images) return;  // an empty batch has one block, for the lines above
  // A list that is too short must not pass for the whole.
  const float weight = total > task.size ? __int_as_float(0x7fc00000) : 1.0f / static_cast<float>(task.of_image[b]);
  for (int64_t start = 0; start < task.tokens; start += kPartitionThreads) {
    const int64_t l = start + threadIdx.x;
    const bool masked = l < task.tokens && task.mask[b * task.tokens + l] != 0;
    int some;
    const int64_t at = before + place_in_block(masked, &some);
    before += some;
    if (!masked || at >= task.size) continue;
    task.rows[at] = b * task.tokens + l;
    task.weights[at] = weight;
  }
}

std::tuple<Tensor, Tensor, Tensor> masked_rows_cuda(const Tensor& mask_any, int64_t size) {
  const torch::stable::accelerator::DeviceGuard guard(mask_any.get_device_index());
  MaskedRowsArguments arguments(mask_any, size);
  const int64_t images = arguments.images;
  SSLFAST_CHECK(images < (int64_t{1} << 31), "mask must have fewer than 2^31 rows, got ", images);
  const Tensor& mask = arguments.mask;
  Tensor image_counts = allocate(mask, {images}, ScalarType::Long);
  const RowsTask task{images,
                      arguments.tokens,
                      size,
                      static_cast<const uint8_t*>(mask.const_data_ptr()),
                      mutable_data<int64_t>(image_counts),
                      mutable_data<int64_t>(arguments.rows),
                      mutable_data<float>(arguments.weights),
                      mutable_data<int64_t>(arguments.count)};
  const cudaStream_t stream = current_stream(mask);
  if (images > 0) {
    const auto blocks = static_cast<unsigned>((images + kCountWarps - 1) / kCountWarps);
    count_kernel<<<blocks, kCountWarps * kWarp, 0, stream>>>(task);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const auto blocks = static_cast<unsigned>(std::max<int64_t>(1, images));
  rows_kernel<<<blocks, kPartitionThreads, 0, stream>>>(task);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {arguments.rows, arguments.weights, arguments.count};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, masked_rows)
