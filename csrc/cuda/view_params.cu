// Sampling of augmentation parameters on the GPU, one thread a view of an image: the arithmetic, and so every bit of
// the result, is that of common/view_params.h.
#include "checks/view_params.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace sslfast {
namespace {

constexpr int kThreads = 128;
constexpr int kViewsPerLaunch = 16;  // their numbers travel as a kernel's argument, of which there may be 4 KiB

struct Draw {
  uint64_t seed;
  uint32_t epoch;
  uint32_t view;  // number of the launch's first view
  int64_t count;  // B
  int64_t height, width;
  const int64_t* ids;    // [B]
  const int64_t* sizes;  // [B, 2], or null: all are height × width
  ViewNumbers of_view[kViewsPerLaunch];
};
static_assert(sizeof(Draw) <= 4096 - 2 * sizeof(void*));

__global__ void sample_kernel(const __grid_constant__ Draw draw, float* __restrict__ params) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b >= draw.count) return;
  const Stream stream{draw.seed, static_cast<uint64_t>(draw.ids[b]), draw.epoch, draw.view + blockIdx.y};
  const int64_t height = draw.sizes ? draw.sizes[2 * b] : draw.height;
  const int64_t width = draw.sizes ? draw.sizes[2 * b + 1] : draw.width;
  sample_view(stream, draw.of_view[blockIdx.y], height, width, params + (blockIdx.y * draw.count + b) * kColumns);
}

Tensor view_params_cuda(const Tensor& ids_any, std::optional<Tensor> sizes_any, std::vector<int64_t> size, int64_t seed,
                        int64_t epoch, int64_t view, std::vector<double> numbers) {
  const torch::stable::accelerator::DeviceGuard guard(ids_any.get_device_index());
  ViewParamsArguments arguments(ids_any, sizes_any, size, numbers);
  const int64_t views = arguments.views, count = arguments.count;
  if (views * count == 0) return arguments.params;
  const cudaStream_t stream = current_stream(arguments.ids);
  Draw draw{};
  draw.seed = static_cast<uint64_t>(seed);
  draw.epoch = static_cast<uint32_t>(epoch);
  draw.count = count;
  draw.height = arguments.sizes.has_value() ? 0 : size[0];
  draw.width = arguments.sizes.has_value() ? 0 : size[1];
  draw.ids = const_data<int64_t>(arguments.ids);
  draw.sizes = arguments.each_size();
  const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  for (int64_t v = 0; v < views; v += kViewsPerLaunch) {
    const int64_t some = std::min<int64_t>(views - v, kViewsPerLaunch);
    draw.view = static_cast<uint32_t>(view + v);
    __builtin_memcpy(draw.of_view, numbers.data() + v * kViewNumbers, some * sizeof(ViewNumbers));
    sample_kernel<<<dim3(blocks, static_cast<unsigned>(some)), kThreads, 0, stream>>>(
        draw, mutable_data<float>(arguments.params) + v * count * kColumns);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return arguments.params;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, view_params)
