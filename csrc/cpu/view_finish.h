// The last pass over a view: blur, solarize, normalise, cast and layout, one row at a time.
#pragma once
#include "common/blur.h"
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

// Row y of a plane under the Gaussian, by columns and then by rows, to `out`; the planes stay as they are.
static void blurred_row(const AugmentCall& call, const float* plane, int64_t pitch, int y, int radius, Finisher& f,
                        float* out) {
  using V = vec<float>;
  constexpr int L = kLanes<float>;
  const float *above[kMaxBlurRadius + 1] = {plane + y * pitch}, *below[kMaxBlurRadius + 1];
  for (int t = 1; t <= radius; ++t) {
    above[t] = plane + inside<false>(y - t, call.height) * pitch;
    below[t] = plane + inside<false>(y + t, call.height) * pitch;
  }
  float* middle = f.across + kBorder;
  int64_t x = 0;
  for (; x + 4 * L <= pitch; x += 4 * L) blur_down<4>(f, above, below, radius, x, middle);
  for (; x < pitch; x += L) blur_down<1>(f, above, below, radius, x, middle);
  for (int t = 1; t <= radius; ++t) {
    middle[-t] = middle[inside<false>(-t, call.width)];
    middle[call.width - 1 + t] = middle[inside<false>(call.width - 1 + t, call.width)];
  }
  for (x = 0; x < pitch; x += L) {
    V sum = f.weight[0] * load(middle + x);
    for (int t = 1; t <= radius; ++t) sum += f.weight[t] * (load(middle + x - t) + load(middle + x + t));
    store(out + x, sum);
  }
}

// One box filter: `at(t)` is where the pixels at distance t stand.
template <typename At>
static inline __attribute__((always_inline)) void box_row(const Box3& box, int64_t pitch, uint32_t* out, At at) {
  for (int64_t x = 0; x < pitch; x += kLanes<float>) {
    vec<uint32_t> sum = load(at(0) + x);
    for (int t = 1; t <= box.radius; ++t) sum += load(at(-t) + x) + load(at(t) + x);
    store(out + x, boxed(box, sum, load(at(-box.radius - 1) + x) + load(at(box.radius + 1) + x)));
  }
}

// A plane under PIL's blur, in place; `other` is a second plane. Whole numbers, held as such in between.
static void box_blur(const AugmentCall& call, const Box3& box, float* plane, float* other, int64_t pitch, Finisher& f) {
  using Row = Vec<uint32_t>::loose;
  const int reach = box.radius + 1, width = call.width, height = call.height;
  auto* rows = reinterpret_cast<uint32_t*>(other);
  uint32_t* line = reinterpret_cast<uint32_t*>(f.across) + kBorder;
  for (int y = 0; y < height; ++y) {
    for (int64_t x = 0; x < pitch; x += kLanes<float>)
      *reinterpret_cast<Row*>(line + x) = __builtin_convertvector(load(plane + y * pitch + x), vec<uint32_t>);
    for (int pass = 0; pass < 3; ++pass) {
      for (int t = 1; t <= reach; ++t) line[-t] = line[0], line[width - 1 + t] = line[width - 1];
      uint32_t* out = rows + y * pitch;
      box_row(box, pitch, out, [&](int t) { return line + t; });
      if (pass < 2) __builtin_memcpy(line, out, pitch * sizeof(uint32_t));
    }
  }
  auto* columns = reinterpret_cast<uint32_t*>(plane);
  for (int pass = 0; pass < 3; ++pass) {
    const uint32_t* in = pass == 1 ? columns : rows;
    uint32_t* out = pass == 1 ? rows : columns;
    for (int y = 0; y < height; ++y)
      box_row(box, pitch, out + y * pitch, [&](int t) { return in + inside<true>(y + t, height) * pitch; });
  }
  for (int64_t i = 0; i < height * pitch; i += kLanes<float>)
    store(plane + i, __builtin_convertvector(load(columns + i), vec<float>));
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
