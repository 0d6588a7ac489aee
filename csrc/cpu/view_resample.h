// A crop resampled to the size of the view: by rows first, then, with as many rows as a vector has lanes standing beside
// each other in memory, by columns. Both passes are then products of whole vectors with one weight.
#pragma once
#include "../common/pixel.h"
#include "../common/resample.h"
#include "augment_views.h"
#include "transpose.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

// The filters of one axis: weight[i · most + t] belongs to pixel first[i] + t.
struct Filters {
  int most;
  int *first, *count;
  float* weight;
};

// The memory that one worker lays its buffers out in. Without a base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t size) {
    T* begin = reinterpret_cast<T*>(base + used);
    used += (size * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return begin;
  }
};

static inline int64_t rounded_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

static Filters take_filters(Arena& arena, int64_t in, int out, bool cubic) {
  // A crop may be of any size up to `in`: enlarged, a filter covers few pixels; shrunk, 2·support + 2 of them.
  const int most = most_taps(resampling(static_cast<int>(in), out, cubic)) + 2;
  return {most, arena.take<int>(out), arena.take<int>(out), arena.take<float>(static_cast<int64_t>(out) * most)};
}

static void fill(Filters& filters, const Resampling& r) {
  filters.most = most_taps(r);
  for (int i = 0; i < r.out; ++i) {
    const Taps taps = taps_of(r, i);
    filters.first[i] = taps.first;
    filters.count[i] = taps.count;
    float* weight = filters.weight + static_cast<int64_t>(i) * filters.most;
    float sum = 0;
    for (int t = 0; t < taps.count; ++t) sum += weight[t] = tap_weight(r, i, taps.first + t);
    const float inverse = 1 / sum;
    for (int t = 0; t < taps.count; ++t) weight[t] *= inverse;
  }
}

// ------------------------------------------------------------------------------------------------- rows of the source

// On the scale of the semantics: 0 … 1, or whole numbers 0 … 255.
template <bool kPil>
SSLFAST_INLINE float pixel_value(uint8_t x) {
  return kPil ? static_cast<float>(x) : static_cast<float>(x) * (1.0f / 255.0f);
}
template <bool kPil, typename T>
SSLFAST_INLINE float pixel_value(T x) {
  const float value = widen(x);
  return kPil ? floor_of(clamp(value, 0.0f, 1.0f) * 255.0f + 0.5f) : value;
}

template <bool kPil, typename T>
static void convert(const T* __restrict__ in, int64_t stride, int64_t size, float* __restrict__ out) {
  if (stride == 1) {
    for (int64_t i = 0; i < size; ++i) out[i] = pixel_value<kPil>(in[i]);
  } else {
    for (int64_t i = 0; i < size; ++i) out[i] = pixel_value<kPil>(in[i * stride]);
  }
}

// How the channels of a converted row lie: channel c of pixel x at c · channel + x · pixel.
struct RowLayout {
  int64_t channel, pixel;
};

static RowLayout row_layout(const Image& image, int channels, int64_t width) {
  const bool interleaved = channels > 1 && image.stride_c == 1 && image.stride_w == channels;
  return interleaved ? RowLayout{1, channels} : RowLayout{width, 1};
}

template <bool kPil, typename T>
static void read_row(const Image& image, int channels, int64_t y, const Box& box, float* row) {
  const T* in = static_cast<const T*>(image.data) + (box.top + y) * image.stride_h + box.left * image.stride_w;
  if (row_layout(image, channels, box.width).pixel != 1) {
    convert<kPil>(in, 1, channels * box.width, row);
  } else {
    for (int c = 0; c < channels; ++c)
      convert<kPil>(in + c * image.stride_c, image.stride_w, box.width, row + c * box.width);
  }
}

template <bool kPil>
static void read_row(PixelType type, const Image& image, int channels, int64_t y, const Box& box, float* row) {
  switch (type) {
    case PixelType::u8: return read_row<kPil, uint8_t>(image, channels, y, box, row);
    case PixelType::f32: return read_row<kPil, float>(image, channels, y, box, row);
    case PixelType::b16: return read_row<kPil, bf16>(image, channels, y, box, row);
    case PixelType::f16: return read_row<kPil, fp16>(image, channels, y, box, row);
  }
}

// ------------------------------------------------------------------------------------------------------------- passes

struct Resampler {
  Filters down, across;         // of rows and of columns
  float *row, *block, *turned;  // [C·w], [lanes, C·w] and [C·w, lanes]; w: the crop's width
};

static Resampler take_resampler(Arena& arena, const AugmentCall& call) {
  const int64_t row = rounded_up(call.channels * call.crop_width, 16);
  return {take_filters(arena, call.crop_height, call.height, call.cubic),
          take_filters(arena, call.crop_width, call.width, call.cubic), arena.take<float>(row),
          arena.take<float>(kLanes<float> * row), arena.take<float>(kLanes<float> * row)};
}

// Rows y0 … y0 + rows − 1 of the view at the crop's width: every row of the source is read and converted once a block.
template <bool kPil>
static void resample_down(const AugmentCall& call, const Image& image, const Box& box, Resampler& r, int y0, int rows) {
  const int64_t size = call.channels * box.width;
  const Filters& f = r.down;
  const int last = y0 + rows - 1;
  for (int s = f.first[y0]; s < f.first[last] + f.count[last]; ++s) {
    read_row<kPil>(call.in, image, call.channels, s, box, r.row);
    for (int y = y0; y <= last; ++y) {
      const int t = s - f.first[y];
      if (t < 0 || t >= f.count[y]) continue;
      const float weight = f.weight[static_cast<int64_t>(y) * f.most + t];
      const float* __restrict__ in = r.row;
      float* __restrict__ out = r.block + (y - y0) * size;
      if (t == 0) {
        for (int64_t i = 0; i < size; ++i) out[i] = weight * in[i];
      } else {
        for (int64_t i = 0; i < size; ++i) out[i] += weight * in[i];
      }
    }
  }
}

// The block's columns, mirrored where the view is, into the planes; positions from the view's width up to the pitch repeat
// the last one.
template <bool kPil, int kChannels>
static void resample_across(const AugmentCall& call, const RowLayout& layout, const Box& box, bool flip, Resampler& r,
                            int64_t plane, int64_t pitch, float* rows) {
  constexpr int L = kLanes<float>;
  const int64_t size = call.channels * box.width;
  transpose(r.block, size, L, size, r.turned, L);
  const Filters& f = r.across;
  for (int64_t p0 = 0; p0 < pitch; p0 += L) {
    vec<float> column[kChannels][L];
    for (int l = 0; l < L; ++l) {
      int64_t x = p0 + l < call.width ? p0 + l : call.width - 1;
      x = flip ? call.width - 1 - x : x;
      const float* in = r.turned + f.first[x] * layout.pixel * L;
      const float* weight = f.weight + x * f.most;
      vec<float> sum[kChannels];
      for (int c = 0; c < kChannels; ++c) sum[c] = weight[0] * load(in + c * layout.channel * L);
      for (int t = 1; t < f.count[x]; ++t) {
        in += layout.pixel * L;
        for (int c = 0; c < kChannels; ++c) sum[c] += weight[t] * load(in + c * layout.channel * L);
      }
      for (int c = 0; c < kChannels; ++c)
        column[c][l] = kPil ? floor_of(clamp(sum[c], 0.0f, 255.0f) + splat<vec<float>>(0.5f)) : sum[c];
    }
    for (int c = 0; c < kChannels; ++c) {
      exchange_all<float, L / 2>(column[c]);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) store(rows + c * plane + l * pitch + p0, column[c][l]);
    }
  }
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
