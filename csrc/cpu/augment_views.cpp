// Views of images on the CPU. One worker makes one view at a time in its own memory: the view as planes of floats
// (which stay in the cache for the usual sizes) and a few rows. Pass 1 resamples and does the colours up to contrast;
// pass 2 the rest of them; pass 3 blurs, solarises, normalises and writes. What the parameters leave out is left out.
#include "augment_views.h"

#include "view_finish.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

struct Workplace {
  Resampler resampler;
  Finisher finisher;
  float* planes;  // [C, h rounded up to a block, pitch]
  float* other;   // [h rounded up to a block, pitch], for PIL's blur
  int64_t pitch, plane;
};

Workplace lay_out(Arena& arena, const AugmentCall& call) {
  constexpr int L = kLanes<float>;
  Workplace w{};
  w.pitch = round_up(call.width, L);
  w.plane = w.pitch * round_up(call.height, L);
  w.resampler = take_resampler(arena, call, w.pitch);
  w.finisher = take_finisher(arena, call.channels, w.pitch);
  w.planes = arena.take<float>(call.channels * w.plane);
  w.other = arena.take<float>(call.pil ? w.plane : 0);
  return w;
}

template <bool kPil>
void make_view(const AugmentCall& call, Workplace& w, int64_t v, int64_t b) {
  constexpr int L = kLanes<float>;
  const int64_t view = v * call.count + b;
  const float* row = call.params + view * kColumns;
  const Image& image = call.images[b];
  const Box box = box_of(row, image);
  const Colours colours = colours_of(row, call.channels);
  const bool flip = row[kFlip] != 0, solarize = row[kSolarize] != 0;
  const float sigma = row[kSigma];
  const int channels = call.channels;

  const bool blur = sigma > 0;
  // Where the view lies as the planes do, and no blur still needs what is overwritten, it is made in its place.
  const bool in_place = !blur && call.out == PixelType::f32 && (!call.channels_last || channels == 1) &&
                        call.width % L == 0 && call.height % L == 0;
  const int64_t pixels = static_cast<int64_t>(call.height) * call.width;
  float* planes = in_place ? static_cast<float*>(call.result) + view * channels * pixels : w.planes;
  double grey = 0;
  resample<kPil>(call, image, box, flip, w.resampler, planes, w.plane, w.pitch, [&](int y) {
    jitter_row<kPil>(colours, 0, colours.before, planes + y * w.pitch, channels, w.plane, w.pitch, 0.0f);
    if (colours.needs_mean) grey += grey_sum<kPil>(planes + y * w.pitch, channels, w.plane, call.width);
  });
  const double exact = grey / static_cast<double>(pixels);
  const auto mean = kPil ? static_cast<float>(static_cast<int>(exact + 0.5)) : static_cast<float>(exact);
  for (int y = 0; y < call.height; ++y) {
    float* row_of_planes = planes + y * w.pitch;
    jitter_row<kPil>(colours, colours.before, colours.after, row_of_planes, channels, w.plane, w.pitch, mean);
    if (colours.grey) grey_row<kPil>(row_of_planes, w.plane, w.pitch);
    if (!blur) finish_row<kPil>(call, row_of_planes, w.plane, w.finisher, solarize, view, y);
  }
  if (!blur) return;
  if constexpr (kPil) {
    const Box3 filter = box_of_sigma(sigma);
    for (int c = 0; c < channels; ++c) box_blur(call, filter, planes + c * w.plane, w.other, w.pitch, w.finisher);
    for (int y = 0; y < call.height; ++y)
      finish_row<kPil>(call, planes + y * w.pitch, w.plane, w.finisher, solarize, view, y);
  } else {
    const int radius = gaussian_weights(sigma, call.blur_limit, w.finisher.weight);
    float* blurred = w.finisher.blurred;
    for (int y = 0; y < call.height; ++y) {
      for (int c = 0; c < channels; ++c)
        blurred_row(call, planes + c * w.plane, w.pitch, y, radius, w.finisher, blurred + c * w.pitch);
      finish_row<kPil>(call, blurred, w.pitch, w.finisher, solarize, view, y);
    }
  }
}

}  // namespace

int64_t augment_scratch_bytes(const AugmentCall& call) {
  Arena arena{nullptr};
  lay_out(arena, call);
  return arena.bytes;
}

// The views of one image are neighbours, so that its pixels are read from memory once.
void augment_views(const Parallel& parallel, const AugmentCall& call) {
  const int64_t total = call.views * call.count, bytes = augment_scratch_bytes(call);
  int64_t next = 0;
  auto work = [&](int64_t worker) {
    Arena arena{call.scratch + worker * bytes};
    Workplace w = lay_out(arena, call);
    // The last block of a crop may have fewer rows than lanes; what stands in the others must be numbers.
    __builtin_memset(w.resampler.block, 0,
                     reinterpret_cast<char*>(w.resampler.turned) - reinterpret_cast<char*>(w.resampler.block));
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < total;) {
      if (call.pil) {
        make_view<true>(call, w, i % call.views, i / call.views);
      } else {
        make_view<false>(call, w, i % call.views, i / call.views);
      }
    }
  };
  parallel_each(parallel, call.workers, work);
}

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <vector>

#include "checks/augment_views.h"
#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

PixelType pixel_type(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return PixelType::u8;
    case ScalarType::BFloat16: return PixelType::b16;
    case ScalarType::Half: return PixelType::f16;
    default: return PixelType::f32;
  }
}

std::vector<Image> images_of(const std::vector<Tensor>& tensors) {
  std::vector<Image> images;
  for (const Tensor& t : tensors) {
    const int64_t d = t.dim(), count = d == 4 ? t.size(0) : 1;
    const auto step = d == 4 ? t.stride(0) * static_cast<int64_t>(t.element_size()) : 0;
    for (int64_t b = 0; b < count; ++b) {
      images.push_back({static_cast<const char*>(t.const_data_ptr()) + b * step, t.size(d - 2), t.size(d - 1),
                        t.stride(d - 3), t.stride(d - 2), t.stride(d - 1)});
    }
  }
  return images;
}

Tensor augment_views_cpu(std::vector<Tensor> tensors, const Tensor& params_any, std::vector<int64_t> size, bool cubic,
                         int64_t blur_kernel, double threshold, std::vector<double> mean, std::vector<double> std,
                         bool pil, ScalarType dtype, bool channels_last) {
  ViewArguments arguments(tensors, params_any, size, blur_kernel, mean, std, pil, dtype, channels_last);
  const std::vector<Image> images = images_of(tensors);
  const int64_t views = arguments.views, count = arguments.count;
  if (views == 0) return arguments.result;

  AugmentCall call{};
  call.images = images.data();
  call.params = const_data<float>(arguments.params);
  call.views = views;
  call.count = count;
  call.channels = static_cast<int>(arguments.channels);
  call.in = pixel_type(tensors[0].scalar_type());
  call.out = pixel_type(dtype);
  call.height = static_cast<int>(arguments.height);
  call.width = static_cast<int>(arguments.width);
  call.cubic = cubic;
  call.pil = pil;
  call.channels_last = channels_last;
  call.blur_limit = arguments.blur_limit;
  call.threshold = static_cast<float>(threshold);
  for (int64_t c = 0; c < arguments.channels; ++c) {
    call.scale[c] = arguments.scale[c];
    call.shift[c] = arguments.shift[c];
  }
  int64_t pixels = views * count * size[0] * size[1];
  for (int64_t i = 0; i < views * count; ++i) {
    const Box box = box_of(call.params + i * kColumns, images[i % count]);
    call.crop_height = std::max(call.crop_height, box.height);
    call.crop_width = std::max(call.crop_width, box.width);
    pixels += box.height * box.width;
  }
  call.result = arguments.result.mutable_data_ptr();
  const Parallel parallel = torch_parallel();
  // Below some thousand pixels, read and made, a second thread costs more than it brings.
  call.workers = pixels < 16384 ? 1 : std::min(parallel.threads, views * count);
  const int64_t bytes = SSLFAST_CALL(augment_scratch_bytes, call);
  Tensor memory = scratch(arguments.params, call.workers * bytes);
  call.scratch = static_cast<char*>(aligned(memory));
  SSLFAST_CALL(augment_views, parallel, call);
  return arguments.result;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, augment_views)
#endif  // SSLFAST_CPU_DISPATCH
