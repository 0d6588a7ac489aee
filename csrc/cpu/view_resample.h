// A crop resampled to the size of the view, in one walk over its rows. As many rows as a vector has lanes are turned,
// so that they stand beside each other in memory; columns are then sums of whole vectors. Turned back, each row is
// added to the rows of the view that it has a weight in.
#pragma once
#include "augment_views.h"
#include "common/pixel.h"
#include "common/resample.h"
#include "cpu/engine/arena.h"
#include "cpu/engine/transpose.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

// What is summed: floats, or in PIL's semantics bytes times weights in fixed point.
template <bool kPil>
using Sum = std::conditional_t<kPil, int32_t, float>;

// The filters of one axis: weight[i · most + t] belongs to pixel first[i] + t. `exact` is room for one filter.
struct Filters {
  int most;
  int *first, *count;
  double* exact;
  void* weight;
};

static Filters take_filters(Arena& arena, int64_t in, int out, bool cubic) {
  // A crop may be of any size up to `in`; the filters of the largest are the widest.
  const int most = most_taps(resampling(static_cast<int>(in), out, cubic));
  return {most, arena.take<int>(out), arena.take<int>(out), arena.take<double>(most),
          arena.take<float>(static_cast<int64_t>(out) * most)};
}

template <bool kPil>
static void fill(Filters& filters, const Resampling& r) {
  filters.most = most_taps(r);
  for (int i = 0; i < r.out; ++i) {
    const Taps taps = taps_of(r, i);
    filters.first[i] = taps.first;
    filters.count[i] = taps.count;
    double sum = 0;
    for (int t = 0; t < taps.count; ++t) sum += filters.exact[t] = tap_weight(r, i, taps.first + t);
    Sum<kPil>* weight = static_cast<Sum<kPil>*>(filters.weight) + static_cast<int64_t>(i) * filters.most;
    for (int t = 0; t < taps.count; ++t) {
      if constexpr (kPil) {
        weight[t] = fixed_weight(filters.exact[t] / sum);
      } else {
        weight[t] = static_cast<float>(filters.exact[t] / sum);
      }
    }
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
  return kPil ? byte_of_unit(widen(x)) : widen(x);
}

template <bool kPil, typename T>
static void convert(const T* __restrict__ in, int64_t stride, int64_t size, Sum<kPil>* __restrict__ out) {
  if (stride == 1) {
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<Sum<kPil>>(pixel_value<kPil>(in[i]));
  } else {
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<Sum<kPil>>(pixel_value<kPil>(in[i * stride]));
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
static void read_row(const Image& image, int channels, int64_t y, const Box& box, Sum<kPil>* row) {
  const T* in = static_cast<const T*>(image.data) + (box.top + y) * image.stride_h + box.left * image.stride_w;
  if (row_layout(image, channels, box.width).pixel != 1) {
    convert<kPil>(in, 1, channels * box.width, row);
  } else {
    for (int c = 0; c < channels; ++c)
      convert<kPil>(in + c * image.stride_c, image.stride_w, box.width, row + c * box.width);
  }
}

template <bool kPil>
static void read_row(PixelType type, const Image& image, int channels, int64_t y, const Box& box, Sum<kPil>* row) {
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
  float *block, *turned, *out;  // [lanes, C·w], [C·w, lanes] and [C, lanes, pitch]; w: the crop's width
};

static Resampler take_resampler(Arena& arena, const AugmentCall& call, int64_t pitch) {
  constexpr int L = kLanes<float>;
  const int64_t row = round_up(call.channels * call.crop_width, 16);
  return {take_filters(arena, call.crop_height, call.height, call.cubic),
          take_filters(arena, call.crop_width, call.width, call.cubic), arena.take<float>(L * row),
          arena.take<float>(L * row), arena.take<float>(call.channels * L * pitch)};
}

static inline vec<float> rounded(vec<float> sum) { return sum; }
static inline vec<int32_t> rounded(vec<int32_t> sum) { return fixed_to_byte(sum); }

// The columns of one block of rows, mirrored where the view is; positions from the view's width up to the pitch repeat
// the last one.
template <bool kPil, int kChannels>
static void resample_across(const AugmentCall& call, const RowLayout& layout, int64_t crop_width, bool flip,
                            Resampler& r, int64_t pitch) {
  using S = Sum<kPil>;
  constexpr int L = kLanes<float>;
  const int64_t size = kChannels * crop_width;
  transpose(reinterpret_cast<const S*>(r.block), size, L, size, reinterpret_cast<S*>(r.turned), L);
  const Filters& f = r.across;
  for (int64_t p0 = 0; p0 < pitch; p0 += L) {
    vec<S> column[kChannels][L];
    for (int l = 0; l < L; ++l) {
      int64_t x = p0 + l < call.width ? p0 + l : call.width - 1;
      x = flip ? call.width - 1 - x : x;
      const S* in = reinterpret_cast<const S*>(r.turned) + f.first[x] * layout.pixel * L;
      const S* weight = static_cast<const S*>(f.weight) + x * f.most;
      vec<S> sum[kChannels];
      for (int c = 0; c < kChannels; ++c) sum[c] = weight[0] * load(in + c * layout.channel * L);
      for (int t = 1; t < f.count[x]; ++t) {
        in += layout.pixel * L;
        for (int c = 0; c < kChannels; ++c) sum[c] += weight[t] * load(in + c * layout.channel * L);
      }
      for (int c = 0; c < kChannels; ++c) column[c][l] = rounded(sum[c]);
    }
    for (int c = 0; c < kChannels; ++c) {
      exchange_all<S, L / 2>(column[c]);
      S* out = reinterpret_cast<S*>(r.out) + c * L * pitch + p0;
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) store(out + l * pitch, column[c][l]);
    }
  }
}

// Adds `weight` times one row of a block to one row of the view, or begins that row with it.
template <typename S>
static void add_row(const S* in, int64_t in_plane, S* out, int64_t plane, int channels, int64_t pitch, S weight,
                    bool begin) {
  for (int c = 0; c < channels; ++c) {
    const S* from = in + c * in_plane;
    S* to = out + c * plane;
    if (begin) {
      for (int64_t x = 0; x < pitch; x += kLanes<S>) store<S>(to + x, weight * load(from + x));
    } else {
      for (int64_t x = 0; x < pitch; x += kLanes<S>) store<S>(to + x, load(to + x) + weight * load(from + x));
    }
  }
}

// Sums in fixed point become whole numbers, in place.
static void finish_sums(float* row, int64_t plane, int channels, int64_t pitch) {
  for (int c = 0; c < channels; ++c) {
    for (int64_t x = c * plane; x < c * plane + pitch; x += kLanes<float>) {
      const vec<int32_t> value = rounded(load(reinterpret_cast<const int32_t*>(row + x)));
      store(row + x, __builtin_convertvector(value, vec<float>));
    }
  }
}

// The view of the crop in planes; `row_done(y)` is called for every row of it, in order, as soon as it is complete.
template <bool kPil, typename F>
static void resample(const AugmentCall& call, const Image& image, const Box& box, bool flip, Resampler& r,
                     float* planes, int64_t plane, int64_t pitch, F row_done) {
  using S = Sum<kPil>;
  constexpr int L = kLanes<float>;
  const int channels = call.channels;
  const RowLayout layout = row_layout(image, channels, box.width);
  const Filters& f = r.down;
  fill<kPil>(r.down, resampling(static_cast<int>(box.height), call.height, call.cubic));
  fill<kPil>(r.across, resampling(static_cast<int>(box.width), call.width, call.cubic));
  int open = 0;  // rows before this one are complete
  for (int64_t s0 = 0; s0 < box.height; s0 += L) {
    const int64_t end = s0 + L < box.height ? s0 + L : box.height;
    for (int64_t s = s0; s < end; ++s) {
      S* row = reinterpret_cast<S*>(r.block) + (s - s0) * channels * box.width;
      read_row<kPil>(call.in, image, channels, s, box, row);
    }
    if (channels == 3) {
      resample_across<kPil, 3>(call, layout, box.width, flip, r, pitch);
    } else {
      resample_across<kPil, 1>(call, layout, box.width, flip, r, pitch);
    }
    for (int y = open; y < call.height && f.first[y] < end; ++y) {
      const int64_t last = f.first[y] + f.count[y];
      S* out = reinterpret_cast<S*>(planes + y * pitch);
      for (int64_t s = f.first[y] > s0 ? f.first[y] : s0; s < last && s < end; ++s) {
        const S weight = static_cast<const S*>(f.weight)[static_cast<int64_t>(y) * f.most + (s - f.first[y])];
        add_row<S>(reinterpret_cast<const S*>(r.out) + (s - s0) * pitch, L * pitch, out, plane, channels, pitch, weight,
                   s == f.first[y]);
      }
      if (last <= end) {
        if (kPil) finish_sums(planes + y * pitch, plane, channels, pitch);
        row_done(y);
        open = y + 1;
      }
    }
  }
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
