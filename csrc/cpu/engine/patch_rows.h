// Rows of pixels: one patch of an image read as numbers, or numbers written back as a patch.
#pragma once
#include "common/patches.h"
#include "levels.h"
#include "packed_rows.h"

namespace sslfast {

enum class PatchPixelType { u8, f32, f64, bf16, f16 };

struct PatchSource {
  const void* data;
  PatchPixelType type;
  int64_t stride[5];  // of b, c, t, y, x, in pixels
  PatchLayout layout;
};

namespace SSLFAST_CPU_LEVEL {
namespace {

constexpr int kPixels = 16;

// Calls line(c, t, y, f) for every line of pw pixels of a patch; f is the number of its first pixel in the row.
template <typename F>
inline __attribute__((always_inline)) void each_patch_line(const PatchLayout& layout, F&& line) {
  const int pw = layout.patch[2], lines = layout.patch[0] * layout.patch[1];
  for (int c = 0; c < layout.channels; ++c)
    for (int t = 0, i = 0; t < layout.patch[0]; ++t)
      for (int y = 0; y < layout.patch[1]; ++y, ++i)
        line(c, t, y, layout.channels_inner ? i * pw * layout.channels + c : (c * lines + i) * pw);
}

template <typename S, typename A>
inline void read_pixels(const PatchSource& source, const PixelScale<A>& affine, int64_t b, int l, A* __restrict__ row) {
  const PatchLayout& layout = source.layout;
  const PatchPixel corner = patch_corner(layout, l);
  const int pw = layout.patch[2], step = layout.channels_inner ? layout.channels : 1;
  const int64_t* stride = source.stride;
  const S* from = static_cast<const S*>(source.data) + b * stride[0] + corner.t * stride[2] + corner.y * stride[3] +
                  corner.x * stride[4];
  each_patch_line(layout, [&](int c, int t, int y, int f) {
    const S* __restrict__ x = from + c * stride[1] + t * stride[2] + y * stride[3];
    A* __restrict__ out = row + f;
    const int at = affine.count == 1 ? 0 : c;
    const A scale = affine.scale[at], offset = affine.offset[at];
    if (stride[4] == 1 && step == 1) {
      int i = 0;
      for (; i + kPixels <= pw; i += kPixels)  // a length that the compiler knows: no loop is left
        for (int j = i; j < i + kPixels; ++j) out[j] = static_cast<A>(widen(x[j])) * scale + offset;
      for (; i < pw; ++i) out[i] = static_cast<A>(widen(x[i])) * scale + offset;
    } else {
      for (int i = 0; i < pw; ++i) out[i * step] = static_cast<A>(widen(x[i * stride[4]])) * scale + offset;
    }
  });
}

// Asks for a patch that is read soon: its lines lie too far apart for the processor to see what comes next.
inline void prefetch_patch(const PatchSource& source, int64_t b, int l) {
  constexpr int kBytes[] = {1, 4, 8, 2, 2};  // of a pixel of each PatchPixelType
  const int64_t bytes = kBytes[static_cast<int>(source.type)];
  const PatchPixel corner = patch_corner(source.layout, l);
  const int64_t* stride = source.stride;
  const char* from = static_cast<const char*>(source.data) +
                     bytes * (b * stride[0] + corner.t * stride[2] + corner.y * stride[3] + corner.x * stride[4]);
  const int64_t last = bytes * (source.layout.patch[2] - 1) * stride[4];
  each_patch_line(source.layout, [&](int c, int t, int y, int) {
    const char* line = from + bytes * (c * stride[1] + t * stride[2] + y * stride[3]);
    __builtin_prefetch(line);
    if ((reinterpret_cast<uintptr_t>(line) ^ reinterpret_cast<uintptr_t>(line + last)) >= 64)
      __builtin_prefetch(line + last);
  });
}

// Patch `l` of image b as a row of numbers.
template <typename A>
void read_patch(const PatchSource& source, const PixelScale<A>& affine, int64_t b, int l, A* row) {
  switch (source.type) {
    case PatchPixelType::u8: return read_pixels<uint8_t>(source, affine, b, l, row);
    case PatchPixelType::f32: return read_pixels<float>(source, affine, b, l, row);
    case PatchPixelType::bf16: return read_pixels<bf16>(source, affine, b, l, row);
    case PatchPixelType::f16: return read_pixels<fp16>(source, affine, b, l, row);
    case PatchPixelType::f64: return read_pixels<double>(source, affine, b, l, row);
  }
}

// The row into patch `l` of a contiguous image [C, T, H, W], or zeros there without a row.
template <typename T>
void write_patch(const T* row, const PatchLayout& layout, const PixelScale<Accumulator<T>>& affine, int l, T* image) {
  using A = Accumulator<T>;
  const PatchPixel corner = patch_corner(layout, l);
  const int pw = layout.patch[2], step = layout.channels_inner ? layout.channels : 1;
  each_patch_line(layout, [&](int c, int t, int y, int f) {
    const int64_t line = (int64_t{c} * layout.frames + corner.t + t) * layout.height + corner.y + y;
    T* __restrict__ out = image + line * layout.width + corner.x;
    if (row == nullptr) {
      __builtin_memset(out, 0, static_cast<size_t>(pw) * sizeof(T));
      return;
    }
    const T* __restrict__ x = row + f;
    const A scale = affine.scale[affine.count == 1 ? 0 : c];
    if (step == 1) {
      for (int i = 0; i < pw; ++i) narrow(static_cast<A>(widen(x[i])) * scale, out + i);
    } else {
      for (int i = 0; i < pw; ++i) narrow(static_cast<A>(widen(x[i * step])) * scale, out + i);
    }
  });
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
