// The blur of PIL's semantics, the last pass over a view that has one.
#pragma once
#include "view_sample.h"

namespace sslfast {
namespace {

constexpr int kBoxThreads = 128;
constexpr int kBoxWarps = kBoxThreads / kWarp;
constexpr int kBoxRun = 8;     // neighbours that a thread filters together
constexpr int kBoxRows = 32;   // a block makes a strip of a view's rows, one channel of it,
constexpr int kBoxWide = 256;  // of so many columns at most

// Where a strip lies, and what it is of.
struct Strip {
  const float* planes;  // of the sample
  Places places;
  int64_t sample;
  int channel, x0, y0, wide;
};

// The first `count` of these bytes, one below the other from row y on.
template <int kCount>
__device__ __forceinline__ void write_bytes(const Views& views, const Sample& s, const Strip& strip, int x, int y,
                                            int count, const uint32_t (&bytes)[kCount]) {
  const bool solarize = s.solarize;
  with_type(views, [&](auto element) {
    const int64_t pixel = static_cast<int64_t>(y) * views.width + x;
    const int64_t row = static_cast<int64_t>(views.width) * (views.channels_last ? views.channels : 1);
    auto* to = place_of<decltype(element)>(views, strip.sample, strip.channel, pixel);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if (j < count) narrow(finished<true>(views, solarize, strip.channel, static_cast<float>(bytes[j])), to + j * row);
    }
  });
}

// A whole number from 0 to 255 as a byte: the last bits of it and 2^23.
__device__ inline uint8_t byte_of_float(float x) { return static_cast<uint8_t>(float_to_bits(x + 8388608.0f)); }

// ------------------------------------------------------------------------------------------- boxes of a known radius

// One box along a line: kOut values from 2·kRadius + 2 more.
template <int kRadius, int kOut, int kIn>
__device__ __forceinline__ void box_line(const Box3& box, const uint32_t (&in)[kIn], uint32_t (&out)[kOut]) {
  static_assert(kIn >= kOut + 2 * kRadius + 2);
#pragma unroll
  for (int i = 0; i < kOut; ++i) {
    uint32_t sum = 0;
#pragma unroll
    for (int t = 1; t <= 2 * kRadius + 1; ++t) sum += in[i + t];
    out[i] = boxed<uint32_t>(box, sum, in[i] + in[i + 2 * kRadius + 2]);
  }
}

// Beyond the image each of the boxes sees the border pixel that the one before it has made: `line`, whose first value
// is `before` places left of the run, is filled so where the image begins with the run, or ends `last` places behind
// the run's first.
template <int kCount>
__device__ __forceinline__ void repeat_border(bool begins, int last, int before, uint32_t (&line)[kCount]) {
  if (begins) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < before) line[i] = line[before];
    }
  }
  if (last >= kCount - 1 - before) return;
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
    if (i - before > last) line[i] = line[i - 1];
  }
}

template <int kRadius>
struct NarrowBox {
  static constexpr int kLost = kRadius + 1, kReach = 3 * kLost, kIn = kBoxRun + 2 * kReach;
  static constexpr int kRows = kBoxRows + 2 * kReach;

  // Bytes from one row to the next, odd numbers of words: of what is read, and of what has been filtered across.
  __host__ __device__ static constexpr int rounded(int wide) { return (wide + kBoxRun - 1) / kBoxRun * kBoxRun; }
  __host__ __device__ static constexpr int pitch(int wide) { return ((rounded(wide) + 2 * kReach + 3) / 4 | 1) * 4; }
  __host__ __device__ static constexpr int pitch_across(int wide) { return (rounded(wide) / 4 | 1) * 4; }
  static constexpr size_t kBytes = kRows * (pitch(kBoxWide) + pitch_across(kBoxWide) + sizeof(int));

  // Three boxes along a line of which `in` begins kReach places left of the run.
  __device__ __forceinline__ static void filter(const Box3& box, const uint32_t (&in)[kIn], bool begins, int last,
                                                uint32_t (&out)[kBoxRun]) {
    uint32_t first[kBoxRun + 4 * kLost], second[kBoxRun + 2 * kLost];
    box_line<kRadius>(box, in, first);
    repeat_border(begins, last, 2 * kLost, first);
    box_line<kRadius>(box, first, second);
    repeat_border(begins, last, kLost, second);
    box_line<kRadius>(box, second, out);
  }

  __device__ static void run(const Views& views, const Sample& s, const Strip& strip, uint8_t* shared) {
    const Box3 box = s.box;
    const int from = pitch(strip.wide), to = pitch_across(strip.wide), columns = strip.wide + 2 * kReach;
    auto* row_of = reinterpret_cast<int*>(shared);
    uint8_t *rows = shared + kRows * sizeof(int), *across = rows + kRows * from;
    for (int row = threadIdx.x; row < kRows; row += kBoxThreads) {
      row_of[row] = strip.places.row(inside<true>(strip.y0 - kReach + row, views.height));
    }
    __syncthreads();
    for (int x = threadIdx.x; x < columns; x += kBoxThreads) {
      const int from_x = inside<true>(strip.x0 - kReach + x, views.width);
      const float* column = strip.planes + strip.places.column(from_x, strip.channel);
#pragma unroll 4
      for (int row = 0; row < kRows; ++row) {
        rows[row * from + x] = byte_of_float(column[static_cast<int64_t>(row_of[row]) * kTile]);
      }
    }
    __syncthreads();

    const int runs = rounded(strip.wide) / kBoxRun;
    for (int item = threadIdx.x; item < runs * kRows; item += kBoxThreads) {  // neighbours stand on rows
      const int run = item / kRows, row = item - run * kRows, x = run * kBoxRun;
      uint32_t in[kIn], out[kBoxRun];
#pragma unroll
      for (int w = 0; w < (kIn + 3) / 4; ++w) {
        const uint32_t word = reinterpret_cast<const uint32_t*>(rows + row * from + x)[w];
#pragma unroll
        for (int i = 0; i < 4 && 4 * w + i < kIn; ++i) in[4 * w + i] = word >> 8 * i & 255;
      }
      filter(box, in, strip.x0 + x == 0, views.width - 1 - strip.x0 - x, out);
#pragma unroll
      for (int w = 0; w < kBoxRun / 4; ++w) {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) word |= out[4 * w + i] << 8 * i;
        reinterpret_cast<uint32_t*>(across + row * to + x)[w] = word;
      }
    }
    __syncthreads();

    for (int item = threadIdx.x; item < strip.wide * (kBoxRows / kBoxRun); item += kBoxThreads) {  // and on columns
      const int run = item / strip.wide, x = item - run * strip.wide, y = strip.y0 + run * kBoxRun;
      const int last = views.height - 1 - y;
      if (last < 0) break;
      uint32_t in[kIn], out[kBoxRun];
#pragma unroll
      for (int i = 0; i < kIn; ++i) in[i] = across[(run * kBoxRun + i) * to + x];
      filter(box, in, y == 0, last, out);
      write_bytes(views, s, strip, strip.x0 + x, y, last + 1, out);
    }
  }
};

// ------------------------------------------------------------------------------------------------ boxes of any radius

// A box filter at `place` of a line of bytes, of which place 0 is pixel `origin` of an image of this size.
__device__ inline uint8_t box_at(const Box3& box, const uint8_t* line, int step, int place, int origin, int size) {
  const auto at = [&](int t) -> uint32_t { return line[(inside<true>(origin + place + t, size) - origin) * step]; };
  uint32_t sum = 0;
#pragma unroll 1
  for (int t = -box.radius; t <= box.radius; ++t) sum += at(t);
  return static_cast<uint8_t>(boxed<uint32_t>(box, sum, at(-box.radius - 1) + at(box.radius + 1)));
}

constexpr size_t kWideBoxBytes = 4 * kTile * (kTile + 2 * kMaxBlurRadius);

// Tile by tile of the strip: three boxes along each of the rows with their border, then three along the columns. Every
// box leaves the outermost radius + 1 of its line unknown; beyond the image the border pixel is repeated.
__device__ inline void wide_boxes(const Views& views, const Sample& s, const Strip& strip, uint8_t* rows) {
  static_assert(kBoxRows == kTile && kBoxWide % kTile == 0);
  const Box3 box = s.box;
  const int reach = s.radius, wide = kTile + 2 * reach, lost = box.radius + 1, size = kTile * wide, y0 = strip.y0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  uint8_t* columns = rows + 2 * size;  // [2, wide, kTile], after rows [2, kTile, wide]
  for (int x0 = strip.x0; x0 < strip.x0 + strip.wide; x0 += kTile) {
    for (int begin = 0; begin < wide; begin += kTile) {
      const int count = min(kTile, wide - begin);
      for (int row = warp; row < count; row += kBoxWarps) {
        const int y = strip.places.row(inside<true>(y0 - reach + begin + row, views.height));
        for (int x = lane; x < wide; x += kWarp) {
          const int64_t column = strip.places.column(inside<true>(x0 - reach + x, views.width), strip.channel);
          rows[row * wide + x] = byte_of_float(strip.planes[column + static_cast<int64_t>(y) * kTile]);
        }
      }
      __syncthreads();
      for (int pass = 0; pass < 3; ++pass) {
        const uint8_t* from = rows + pass % 2 * size;
        uint8_t* to = rows + (pass + 1) % 2 * size;
        for (int row = warp; row < count; row += kBoxWarps) {
          for (int x = (pass + 1) * lost + lane; x < wide - (pass + 1) * lost; x += kWarp) {
            to[row * wide + x] = box_at(box, from + row * wide, 1, x, x0 - reach, views.width);
          }
        }
        __syncthreads();
      }
      for (int row = warp; row < count; row += kBoxWarps) {
        columns[(begin + row) * kTile + lane] = rows[size + row * wide + reach + lane];
      }
    }
    __syncthreads();
    for (int pass = 0; pass < 3; ++pass) {
      const uint8_t* from = columns + pass % 2 * size;
      uint8_t* to = columns + (pass + 1) % 2 * size;
      for (int y = (pass + 1) * lost + warp; y < wide - (pass + 1) * lost; y += kBoxWarps) {
        to[y * kTile + lane] = box_at(box, from + lane, kTile, y, y0 - reach, views.height);
      }
      __syncthreads();
    }
    for (int row = warp; row < kTile && y0 + row < views.height; row += kBoxWarps) {
      if (x0 + lane >= views.width) break;
      const uint32_t byte[1] = {columns[size + (reach + row) * kTile + lane]};
      write_bytes(views, s, strip, x0 + lane, y0 + row, 1, byte);
    }
    __syncthreads();
  }
}

constexpr size_t kBoxBytes = kWideBoxBytes;
static_assert(NarrowBox<1>::kBytes <= kBoxBytes && kBoxBytes <= kSharedBytes);

// A strip of channel blockIdx.z of sample first + blockIdx.y, if that has a blur.
__global__ void __launch_bounds__(kBoxThreads, 6)
    box_kernel(const __grid_constant__ Views views, const Sample* __restrict__ samples, int64_t first,
               const float* __restrict__ planes) {
  extern __shared__ __align__(16) float shared_bytes[];
  const int64_t n = first + blockIdx.y;
  const Sample& s = samples[n];
  if (s.radius < 0) return;
  const int strips_across = (views.width + kBoxWide - 1) / kBoxWide, channel = blockIdx.z;
  const int x0 = blockIdx.x % strips_across * kBoxWide, y0 = blockIdx.x / strips_across * kBoxRows;
  const float* of_sample = planes + blockIdx.y * static_cast<int64_t>(views.tiles) * views.channels * kTilePixels;
  const Places places{views.tiles_across, views.channels};
  const Strip strip{of_sample, places, n, channel, x0, y0, min(kBoxWide, views.width - x0)};
  auto* shared = reinterpret_cast<uint8_t*>(shared_bytes);
  switch (s.box.radius) {
    case 0: return NarrowBox<0>::run(views, s, strip, shared);
    case 1: return NarrowBox<1>::run(views, s, strip, shared);
    default: wide_boxes(views, s, strip, shared);
  }
}

}  // namespace
}  // namespace sslfast
