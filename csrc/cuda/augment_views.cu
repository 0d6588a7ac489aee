// Views of images on the GPU. The bound is memory traffic: the crop read once, the view written once. What lies
// between (a view whose contrast waits for the mean of its grey image, or whose blur waits for its neighbours) goes
// through planes of floats for so few samples at a time that they stay in the L2 cache. A group of samples is three
// launches:
//   resample_kernel (view_resample.h): crop, antialiased resize, flip, colours up to contrast;
//   colour_kernel (view_finish.h): contrast and the colours after it, where there is contrast;
//   gaussian_kernel or box_kernel (view_finish.h): where there is blur.
// The first of them that can, solarises, normalises and writes the view. Nothing is read back, and nothing waits: the
// operator can be captured in a CUDA graph, of a ragged list too, whose table travels as a kernel's
// argument.
#include <algorithm>
#include <vector>

#include "../torch_api.h"
#include "view_finish.h"

namespace sslfast {
namespace {

constexpr int64_t kPlanesBytes =
    32 << 20;                            // the planes of one group; the L2 caches of an A100 and an H100 have 40 and 50
constexpr int64_t kMostInGroup = 65535;  // blocks along a grid's second axis
constexpr int kPrepareThreads = 64;      // few, for there are few samples and each is a long chain
constexpr int kListed = 96;              // images a launch, in a kernel's argument of at most 4 KiB

struct ListedImages {
  Image image[kListed];
};
static_assert(sizeof(ListedImages) <= 4096 - 2 * sizeof(void*));

__global__ void list_kernel(const __grid_constant__ ListedImages images, int count, Image* __restrict__ list) {
  if (static_cast<int>(threadIdx.x) < count) list[threadIdx.x] = images.image[threadIdx.x];
}

struct Work {
  Views views;
  Images images;
  int64_t group;  // samples
  int most_kept;  // taps of a filter that fit in shared memory
  const float* params;
  Sample* samples;      // [V·B]
  float* half_filters;  // [V·B, kHalfFilter]
  float* planes;        // [group, C, h, w]
  float* partial;       // [group, tiles]
  cudaStream_t stream;
};

unsigned blocks_of(int64_t size, int64_t block) { return static_cast<unsigned>((size + block - 1) / block); }

template <bool kPil, int kChannels, typename T>
void launch(const Work& w) {
  const Views& views = w.views;
  prepare_kernel<kPil><<<blocks_of(views.samples, kPrepareThreads), kPrepareThreads, 0, w.stream>>>(
      views, w.images, w.params, w.samples, w.half_filters);
  const size_t weights = static_cast<size_t>(2 * w.most_kept) * kTile * sizeof(float);
  const auto tiles = static_cast<unsigned>(views.tiles);
  for (int64_t first = 0; first < views.samples; first += w.group) {
    const auto some = static_cast<unsigned>(std::min(w.group, views.samples - first));
    resample_kernel<kPil, kChannels, T><<<dim3(tiles, some), kResampleThreads, weights, w.stream>>>(
        views, w.images, w.samples, first, w.most_kept, w.planes, w.partial);
    colour_kernel<kPil, kChannels>
        <<<dim3(blocks_of(views.pixels(), kColourThreads * kColourPixels), some), kColourThreads, 0, w.stream>>>(
            views, w.samples, first, w.planes, w.partial);
    if constexpr (kPil) {
      box_kernel<kChannels>
          <<<dim3(tiles, some), kBlurThreads, kBoxBytes, w.stream>>>(views, w.samples, first, w.planes);
    } else {
      gaussian_kernel<kChannels><<<dim3(tiles, some), kBlurThreads, blur_shared_bytes(views.blur_limit), w.stream>>>(
          views, w.samples, first, w.half_filters, w.planes);
    }
  }
}

template <bool kPil, int kChannels>
void launch(const Work& w, ScalarType in) {
  switch (in) {
    case ScalarType::Byte: return launch<kPil, kChannels, uint8_t>(w);
    case ScalarType::Float: return launch<kPil, kChannels, float>(w);
    case ScalarType::BFloat16: return launch<kPil, kChannels, bf16>(w);
    case ScalarType::Half: return launch<kPil, kChannels, fp16>(w);
    default:
      SSLFAST_CHECK(false, "images must be uint8, float32, bfloat16 or float16, got ", torch::headeronly::toString(in));
  }
}

Image image_of(const Tensor& t) {
  const int64_t d = t.dim(), height = t.size(d - 2), width = t.size(d - 1);
  SSLFAST_CHECK(height > 0 && width > 0, "images must have at least one pixel");
  SSLFAST_CHECK(height < (1 << 24) && width < (1 << 24), "images must be below 2^24 pixels on a side");
  return {t.const_data_ptr(), t.stride(d - 3),          t.stride(d - 2),
          t.stride(d - 1),    static_cast<int>(height), static_cast<int>(width)};
}

void check_images(const std::vector<Tensor>& tensors, const Tensor& params) {
  SSLFAST_CHECK(!tensors.empty(), "images must hold at least one image");
  const Tensor& first = tensors[0];
  for (const Tensor& t : tensors) {
    SSLFAST_CHECK(t.dim() == 3 || (t.dim() == 4 && tensors.size() == 1), "images must have three or four dimensions");
    SSLFAST_CHECK(t.size(t.dim() - 3) == first.size(first.dim() - 3), "images must have the same number of channels");
    SSLFAST_CHECK(t.scalar_type() == first.scalar_type(), "images must have the same dtype");
    SSLFAST_CHECK(t.device() == params.device(), "images must be on the device of params");
  }
}

// The images' table in device memory, written by kernels whose arguments hold it: no host memory has to outlive the
// call.
Tensor listed(const std::vector<Image>& images, const Tensor& like, cudaStream_t stream) {
  const auto count = static_cast<int64_t>(images.size());
  Tensor list = torch::stable::new_empty(like, {count * static_cast<int64_t>(sizeof(Image))}, ScalarType::Byte);
  for (int64_t b = 0; b < count; b += kListed) {
    ListedImages some{};
    const auto size = static_cast<int>(std::min<int64_t>(kListed, count - b));
    std::copy_n(images.begin() + b, size, some.image);
    list_kernel<<<1, kListed, 0, stream>>>(some, size, static_cast<Image*>(list.mutable_data_ptr()) + b);
  }
  return list;
}

Tensor augment_views_cuda(std::vector<Tensor> tensors, const Tensor& params_any, std::vector<int64_t> size, bool cubic,
                          int64_t blur_kernel, double threshold, std::vector<double> mean, std::vector<double> std,
                          bool pil, ScalarType dtype, bool channels_last) {
  check_images(tensors, params_any);
  const Tensor& first = tensors[0];
  const int64_t channels = first.size(first.dim() - 3);
  SSLFAST_CHECK(channels == 1 || channels == 3, "images must have 1 or 3 channels, got ", channels);
  SSLFAST_CHECK(size.size() == 2 && std::min(size[0], size[1]) > 0 && std::max(size[0], size[1]) < (1 << 24),
                "size must be two positive numbers below 2^24");
  SSLFAST_CHECK(mean.size() == static_cast<size_t>(channels) && std.size() == mean.size(),
                "mean and std must have one number a channel");
  SSLFAST_CHECK(blur_kernel >= 1 && blur_kernel / 2 <= kMaxBlurRadius, "blur_kernel must be from 1 to ",
                2 * kMaxBlurRadius + 1, ", got ", blur_kernel);
  SSLFAST_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                "dtype must be float32, bfloat16 or float16, got ", torch::headeronly::toString(dtype));
  const int64_t count = first.dim() == 4 ? first.size(0) : static_cast<int64_t>(tensors.size());
  const int64_t views = params_any.dim() == 3 ? params_any.size(0) : 0;
  check_tensor(params_any, "params", {views, count, kColumns}, ScalarType::Float, params_any);
  const torch::stable::accelerator::DeviceGuard guard(params_any.get_device_index());
  const Tensor params = contiguous(params_any);
  const int64_t height = size[0], width = size[1];
  Tensor result = channels_last ? torch::stable::new_empty(first, {views, count, height, width, channels}, dtype)
                                : torch::stable::new_empty(first, {views, count, channels, height, width}, dtype);
  if (views * count == 0) return result;

  Work w{};
  w.stream = current_stream(params);
  Views& v = w.views;
  v.samples = views * count;
  v.count = count;
  v.height = static_cast<int>(height);
  v.width = static_cast<int>(width);
  v.tiles_across = static_cast<int>(blocks_of(width, kTile));
  SSLFAST_CHECK(v.tiles_across * static_cast<int64_t>(blocks_of(height, kTile)) < (int64_t{1} << 31),
                "size is too large: ", height, " by ", width);
  v.tiles = v.tiles_across * static_cast<int>(blocks_of(height, kTile));
  v.channels = static_cast<int>(channels);
  v.blur_limit = static_cast<int>(blur_kernel / 2);
  v.cubic = cubic;
  v.channels_last = channels_last;
  v.dtype = dtype;
  v.threshold = static_cast<float>(threshold);
  for (int64_t c = 0; c < channels; ++c) {
    v.scale[c] = static_cast<float>(1 / (std[c] * (pil ? 255 : 1)));
    v.shift[c] = static_cast<float>(-mean[c] / std[c]);
  }
  v.result = result.mutable_data_ptr();

  std::vector<Image> images;
  for (const Tensor& t : tensors) images.push_back(image_of(t));
  w.images.batch = images[0];
  w.images.step = first.dim() == 4 ? first.stride(0) : 0;
  Tensor list;
  if (images.size() > 1) {
    list = listed(images, params, w.stream);
    w.images.list = static_cast<const Image*>(list.const_data_ptr());
  }
  for (const Image& image : images) {
    const int down = most_taps(resampling(image.height, v.height, cubic));
    w.most_kept = std::max({w.most_kept, down, most_taps(resampling(image.width, v.width, cubic))});
  }
  w.most_kept = std::min(w.most_kept, kMostTaps);

  const int64_t floats = channels * v.pixels();  // of one sample's planes
  w.group = std::clamp<int64_t>(kPlanesBytes / (floats * static_cast<int64_t>(sizeof(float))), 1,
                                std::min(v.samples, kMostInGroup));
  Tensor samples =
      torch::stable::new_empty(params, {v.samples * static_cast<int64_t>(sizeof(Sample))}, ScalarType::Byte);
  Tensor half_filters = torch::stable::new_empty(params, {v.samples, kHalfFilter});
  Tensor planes = torch::stable::new_empty(params, {w.group, floats}), partial;
  partial = torch::stable::new_empty(params, {w.group, v.tiles});
  w.params = const_data<float>(params);
  w.samples = static_cast<Sample*>(samples.mutable_data_ptr());
  w.half_filters = mutable_data<float>(half_filters);
  w.planes = mutable_data<float>(planes);
  w.partial = mutable_data<float>(partial);
  const ScalarType in = first.scalar_type();
  if (pil) {
    channels == 3 ? launch<true, 3>(w, in) : launch<true, 1>(w, in);
  } else {
    channels == 3 ? launch<false, 3>(w, in) : launch<false, 1>(w, in);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) { m.impl("augment_views", TORCH_BOX(&sslfast::augment_views_cuda)); }
