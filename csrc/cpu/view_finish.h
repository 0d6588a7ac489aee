// The last pass over a view: blur, solarize, normalise, cast and layout, one row at a time.
#pragma once
#include "../common/blur.h"
#include "view_colour.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

// Room on either side of a row for what the blur's filter reaches beyond the border.
inline constexpr int64_t kBorder = (kMaxBlurRadius + 16) / 16 * 16;

struct Finisher {
  float weight[kMaxBlurRadius + 1];  // half of the blur's filter
  int64_t pitch;
  float* across;   // [kBorder + pitch + kBorder]: a row blurred by columns, with its border
  float* blurred;  // [C, pitch]
  float* rows;     // [C, pitch]: a finished row
};

static Finisher take_finisher(Arena& arena, int channels, int64_t pitch) {
  Finisher f{};
  f.pitch = pitch;
  f.across = arena.take<float>(pitch + 2 * kBorder);
  f.blurred = arena.take<float>(channels * pitch);
  f.rows = arena.take<float>(channels * pitch);
  return f;
}

// `kVectors` vectors of Σ_t weight[t] · (row[y − t] + row[y + t]) at column x.
template <int kVectors>
static inline __attribute__((always_inline)) void blur_down(const Finisher& f, const float* const* above,
                                                            const float* const* below, int radius, int64_t x,
                                                            float* out) {
  using V = vec<float>;
  constexpr int L = kLanes<float>;
  V sum[kVectors];
  for (int i = 0; i < kVectors; ++i) sum[i] = f.weight[0] * load(above[0] + x + i * L);
  for (int t = 1; t <= radius; ++t) {
    const V weight = splat<V>(f.weight[t]);
    for (int i = 0; i < kVectors; ++i) sum[i] += weight * (load(above[t] + x + i * L) + load(below[t] + x + i * L));
  }
  for (int i = 0; i < kVectors; ++i) store(out + x + i * L, sum[i]);
}

// Row y of a plane under the separable filter, to `out`; the planes stay as they are.
template <bool kPil>
static void blurred_row(const AugmentCall& call, const float* plane, int64_t pitch, int y, int radius, Finisher& f,
                        float* out) {
  using V = vec<float>;
  constexpr int L = kLanes<float>;
  const float *above[kMaxBlurRadius + 1], *below[kMaxBlurRadius + 1];
  for (int t = 0; t <= radius; ++t) {
    above[t] = plane + inside<kPil>(y - t, call.height) * pitch;
    below[t] = plane + inside<kPil>(y + t, call.height) * pitch;
  }
  float* middle = f.across + kBorder;
  int64_t x = 0;
  for (; x + 4 * L <= pitch; x += 4 * L) blur_down<4>(f, above, below, radius, x, middle);
  for (; x < pitch; x += L) blur_down<1>(f, above, below, radius, x, middle);
  for (int t = 1; t <= radius; ++t) {
    middle[-t] = middle[inside<kPil>(-t, call.width)];
    middle[call.width - 1 + t] = middle[inside<kPil>(call.width - 1 + t, call.width)];
  }
  for (x = 0; x < pitch; x += L) {
    V sum = f.weight[0] * load(middle + x);
    for (int t = 1; t <= radius; ++t) sum += f.weight[t] * (load(middle + x - t) + load(middle + x + t));
    store(out + x, kPil ? floor_of(sum + splat<V>(0.5f)) : sum);
  }
}

// One row of all channels (a channel is `plane` numbers further): solarize, normalise, and out.
template <bool kPil, typename T>
static void finish_row(const AugmentCall& call, const float* row, int64_t plane, Finisher& f, bool solarize,
                       int64_t view, int y) {
  using V = vec<float>;
  constexpr int L = kLanes<float>;
  const int64_t width = call.width, channels = call.channels;
  T* image = static_cast<T*>(call.result) + view * channels * call.height * width;
  for (int64_t c = 0; c < channels; ++c) {
    const V scale = splat<V>(call.scale[c]), shift = splat<V>(call.shift[c]);
    const auto finished = [&](int64_t x) {
      const V value = load(row + c * plane + x);
      return (solarize ? solarized<kPil>(value, call.threshold) : value) * scale + shift;
    };
    int64_t x = 0;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (!call.channels_last || channels == 1) {
        float* out = image + (c * call.height + y) * width;
        for (; x + L <= width; x += L) store(out + x, finished(x));
        if (x < width) {
          const V rest = finished(x);
          for (int64_t l = 0; x + l < width; ++l) out[x + l] = rest[l];
        }
        continue;
      }
    }
    float* to = f.rows + c * f.pitch;
    for (; x < width; x += L) store(to + x, finished(x));
  }
  if (call.channels_last && channels == 3) {
    const float* __restrict__ r = f.rows, * __restrict__ g = r + f.pitch, * __restrict__ b = g + f.pitch;
    T* __restrict__ out = image + y * width * 3;
    for (int64_t x = 0; x < width; ++x) {
      narrow(r[x], out + 3 * x);
      narrow(g[x], out + 3 * x + 1);
      narrow(b[x], out + 3 * x + 2);
    }
  } else if constexpr (sizeof(T) != sizeof(float)) {
    for (int64_t c = 0; c < channels; ++c) {
      const float* __restrict__ from = f.rows + c * f.pitch;
      T* __restrict__ out = image + (c * call.height + y) * width;
      for (int64_t x = 0; x < width; ++x) narrow(from[x], out + x);
    }
  }
}

template <bool kPil>
static void finish_row(const AugmentCall& call, const float* row, int64_t plane, Finisher& f, bool solarize,
                       int64_t view, int y) {
  switch (call.out) {
    case PixelType::b16: return finish_row<kPil, bf16>(call, row, plane, f, solarize, view, y);
    case PixelType::f16: return finish_row<kPil, fp16>(call, row, plane, f, solarize, view, y);
    default: return finish_row<kPil, float>(call, row, plane, f, solarize, view, y);
  }
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
