// Views of images on the GPU. The bound is memory traffic: the crop read once, the view written once. What lies
// between (a view whose contrast waits for the mean of its grey image, or whose blur waits for its neighbours) goes
// through planes of floats for so few samples at a time that they stay in the L2 cache. After prepare_kernel
// (view_prepare.h), once a call, a group of samples is three launches:
//   resample_kernel (view_resample.h): crop, antialiased resize, flip, colours up to contrast;
//   colour_kernel (view_colour.h): contrast and the colours after it, where there is contrast;
//   gaussian_kernel (view_blur.h) or box_kernel (view_box.h): where there is blur.
// The last of them that a view needs solarises, normalises and writes it. Nothing is read back, and nothing waits: the
// operator can be captured in a CUDA graph, of a ragged list too, whose table travels as a kernel's
// argument.
#include <algorithm>
#include <vector>

#include "checks/augment_views.h"
#include "view_blur.h"
#include "view_box.h"
#include "view_colour.h"
#include "view_prepare.h"
#include "view_resample.h"

namespace sslfast {
namespace {

constexpr int64_t kPlanesBytes = 32 << 20;  // of one group; the L2 caches of an A100 and an H100 have 40 and 50 MiB
constexpr int64_t kMostBlocks = 65535;      // along a grid's second and third axis
constexpr int kListed = 72;                 // images a launch, in a kernel's argument of at most 4 KiB

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
  const float* params;
  Prepared prepared;
  float* planes;   // [group, tiles, C, kTile, kTile]
  float* partial;  // [group, tiles]
  cudaStream_t stream;
};

unsigned blocks_of(int64_t size, int64_t block) { return static_cast<unsigned>((size + block - 1) / block); }

template <bool kPil, int kChannels, typename T, int kLayout>
void launch(const Work& w) {
  const Views& views = w.views;
  const Prepared& p = w.prepared;
  prepare_kernel<kPil>
      <<<static_cast<unsigned>(views.samples), kPrepareThreads, 0, w.stream>>>(views, w.images, w.params, p);
  for (int64_t first = 0; first < views.samples; first += w.group) {
    const auto some = static_cast<unsigned>(std::min(w.group, views.samples - first));
    const dim3 tiles(views.tiles_across, views.tiles / views.tiles_across, some);
    resample_kernel<kPil, kChannels, T, kLayout>
        <<<tiles, kResampleThreads, 0, w.stream>>>(views, p.samples, first, w.planes, w.partial, p.progress);
    colour_kernel<kPil, kChannels>
        <<<tiles, kColourThreads, 0, w.stream>>>(views, p.samples, p.progress, first, w.planes);
    if constexpr (kPil) {
      const unsigned strips = blocks_of(views.height, kBoxRows) * blocks_of(views.width, kBoxWide);
      box_kernel<<<dim3(strips, some, kChannels), kBoxThreads, kBoxBytes, w.stream>>>(views, p.samples, first,
                                                                                      w.planes);
    } else {
      const unsigned strips = blocks_of(views.height, kStripRows) * blocks_of(views.width, kStripWide);
      const size_t bytes = blur_shared_bytes(std::min(views.width, kStripWide), views.blur_limit);
      gaussian_kernel<<<dim3(strips, some, kChannels), kBlurThreads, bytes, w.stream>>>(views, p.samples, first,
                                                                                        p.half_filters, w.planes);
    }
  }
}

// Bytes, which most images are, have kernels of their own for the two usual layouts.
template <bool kPil, int kChannels, typename T>
void launch(const Work& w, Layout layout) {
  if constexpr (sizeof(T) == 1) {
    if (layout == kPlanar) return launch<kPil, kChannels, T, kPlanar>(w);
    if (kChannels > 1 && layout == kInterleaved) return launch<kPil, kChannels, T, kInterleaved>(w);
  }
  launch<kPil, kChannels, T, kStrided>(w);
}

template <bool kPil, int kChannels>
void launch(const Work& w, ScalarType in, Layout layout) {
  switch (in) {
    case ScalarType::Byte: return launch<kPil, kChannels, uint8_t>(w, layout);
    case ScalarType::Float: return launch<kPil, kChannels, float>(w, layout);
    case ScalarType::BFloat16: return launch<kPil, kChannels, bf16>(w, layout);
    case ScalarType::Half: return launch<kPil, kChannels, fp16>(w, layout);
    default:
      SSLFAST_CHECK(false, "images must be uint8, float32, bfloat16 or float16, got ", torch::headeronly::toString(in));
  }
}

// How all of the images lie.
Layout layout_of(const std::vector<Image>& images, int64_t channels) {
  const auto all = [&](auto lies) { return std::all_of(images.begin(), images.end(), lies); };
  if (all([&](const Image& i) { return i.column == 1; })) return kPlanar;
  return all([&](const Image& i) { return i.column == channels && i.channel == 1; }) ? kInterleaved : kStrided;
}

Image image_of(const Tensor& t) {
  const int64_t d = t.dim(), height = t.size(d - 2), width = t.size(d - 1);
  Image image{};
  image.data = t.const_data_ptr();
  image.channel = t.stride(d - 3);
  image.row = t.stride(d - 2);
  image.column = t.stride(d - 1);
  image.height = static_cast<int>(height);
  image.width = static_cast<int>(width);
  return image;
}

// The images, and how many weights of filters a view of all of them has. A crop may be of any size up to its image's,
// whose filters are the widest.
std::vector<Image> images_of(const std::vector<Tensor>& tensors, const Views& v, int64_t* weights) {
  const auto fours = [](int64_t count) { return (count + 3) / 4 * 4; };
  std::vector<Image> images;
  for (const Tensor& t : tensors) {
    Image image = image_of(t);
    image.taps_down = static_cast<int>(fours(most_taps(resampling(image.height, v.height, v.cubic))));
    image.taps_across = most_taps(resampling(image.width, v.width, v.cubic));
    image.weights = *weights;
    *weights +=
        static_cast<int64_t>(v.height) * image.taps_down + fours(static_cast<int64_t>(v.width) * image.taps_across);
    images.push_back(image);
  }
  return images;
}

void set_size(Views& v, int64_t height, int64_t width) {
  const int64_t across = blocks_of(width, kTile), down = blocks_of(height, kTile);
  SSLFAST_CHECK(down <= kMostBlocks && across * down < (int64_t{1} << 31), "size is too large: ", height, " by ",
                width);
  SSLFAST_CHECK(v.samples < (int64_t{1} << 31), "views must be fewer than 2^31 in all, got ", v.samples);
  v.height = static_cast<int>(height);
  v.width = static_cast<int>(width);
  v.tiles_across = static_cast<int>(across);
  v.tiles = static_cast<int>(across * down);
}

// The images' table in device memory, written by kernels whose arguments hold it: no host memory has to outlive the
// call.
Tensor listed(const std::vector<Image>& images, const Tensor& like, cudaStream_t stream) {
  const auto count = static_cast<int64_t>(images.size());
  Tensor list = allocate(like, {count * static_cast<int64_t>(sizeof(Image))}, ScalarType::Byte);
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
  const torch::stable::accelerator::DeviceGuard guard(params_any.get_device_index());
  ViewArguments arguments(tensors, params_any, size, blur_kernel, mean, std, pil, dtype, channels_last);
  const Tensor &first = tensors[0], &params = arguments.params;
  const int64_t channels = arguments.channels, count = arguments.count, views = arguments.views;
  const int64_t height = arguments.height, width = arguments.width;
  if (views * count == 0) return arguments.result;

  Work w{};
  w.stream = current_stream(params);
  Views& v = w.views;
  v.samples = views * count;
  v.count = count;
  set_size(v, height, width);
  v.channels = static_cast<int>(channels);
  v.blur_limit = arguments.blur_limit;
  v.cubic = cubic;
  v.channels_last = channels_last;
  v.dtype = dtype;
  v.threshold = static_cast<float>(threshold);
  std::copy_n(arguments.scale, channels, v.scale);
  std::copy_n(arguments.shift, channels, v.shift);
  v.result = arguments.result.mutable_data_ptr();

  int64_t weights = 0;
  const std::vector<Image> images = images_of(tensors, v, &weights);
  const bool batch = first.dim() == 4;
  w.images.batch = images[0];
  w.images.batch.weights = weights;
  w.images.step = batch ? first.stride(0) : 0;
  w.images.weights = batch ? count * weights : weights;
  Tensor list;
  if (images.size() > 1) {
    list = listed(images, params, w.stream);
    w.images.list = static_cast<const Image*>(list.const_data_ptr());
  }

  const int64_t floats = channels * v.tiles * kTilePixels;  // of one sample's planes
  w.group = std::clamp<int64_t>(kPlanesBytes / (floats * static_cast<int64_t>(sizeof(float))), 1,
                                std::min(v.samples, kMostBlocks));
  const auto bytes = [&](int64_t size) { return allocate(params, {size}, ScalarType::Byte); };
  Tensor samples = bytes(v.samples * static_cast<int64_t>(sizeof(Sample)));
  Tensor progress = bytes(v.samples * static_cast<int64_t>(sizeof(Progress)));
  Tensor places = bytes(v.samples * (height + width) * static_cast<int64_t>(sizeof(Place)));
  Tensor filters = allocate(params, {views * w.images.weights});
  Tensor half_filters = allocate(params, {v.samples, kHalfFilter});
  Tensor planes = allocate(params, {w.group, floats});
  Tensor partial = allocate(params, {w.group, v.tiles});
  w.params = const_data<float>(params);
  w.prepared = {static_cast<int>(first.element_size()),
                !pil && first.scalar_type() == ScalarType::Byte ? 1.0 / 255.0 : 1.0,
                static_cast<Sample*>(samples.mutable_data_ptr()),
                static_cast<Progress*>(progress.mutable_data_ptr()),
                static_cast<Place*>(places.mutable_data_ptr()),
                mutable_data<float>(filters),
                mutable_data<float>(half_filters)};
  w.planes = mutable_data<float>(planes);
  w.partial = mutable_data<float>(partial);
  const ScalarType in = first.scalar_type();
  const Layout layout = layout_of(images, channels);
  if (pil) {
    channels == 3 ? launch<true, 3>(w, in, layout) : launch<true, 1>(w, in, layout);
  } else {
    channels == 3 ? launch<false, 3>(w, in, layout) : launch<false, 1>(w, in, layout);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return arguments.result;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, augment_views)
