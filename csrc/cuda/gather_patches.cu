// Patches of images as rows of numbers on the GPU, and back. Gather: a group of lanes a row, straight from the pixels
// of the kept patches, four numbers a thread. Scatter: a group of lanes a line of the image, every pixel written once,
// zeros where no patch lies, NaN where more than one does. Memory traffic is the bound; so that index arithmetic stays
// below it, divisions are by multiplication, and from one number to the next a place is counted on.
#include <type_traits>

#include "checks/gather_patches.h"
#include "inverse_ids.h"
#include "token_rows.h"

namespace sslfast {
namespace {

constexpr int kRun = 4;  // numbers of a thread at once

// n / by for n < 2^31 as (⌊n·magic / 2^32⌋ + n) >> shift (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  uint32_t by, magic, shift;

  explicit Divisor(int64_t divisor) : by(static_cast<uint32_t>(divisor)), magic(0), shift(0) {
    while (shift < 31 && (uint32_t{1} << shift) < by) ++shift;
    magic = static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, magic) + n) >> shift; }
};

// A patch's row of numbers as digits, innermost first: (x, y, t, c), or (c, x, y, t) with the channels innermost.
struct Digits {
  int size[4];
  int64_t stride[4];  // in the image
  Divisor by[3];
  int channel;  // which of them is c

  explicit Digits(const PatchLayout& layout, const int64_t (&strides)[5])
      : size{layout.patch[2], layout.patch[1], layout.patch[0], layout.channels},
        stride{strides[4], strides[3], strides[2], strides[1]},
        by{Divisor(1), Divisor(1), Divisor(1)},
        channel(3) {
    if (layout.channels_inner) {
      std::rotate(size, size + 3, size + 4);
      std::rotate(stride, stride + 3, stride + 4);
      channel = 0;
    }
    for (int i = 0; i < 3; ++i) by[i] = Divisor(size[i]);
  }
};

struct PatchRows {
  int64_t rows, kept;  // B·K, K
  int length;          // L
  PatchLayout layout;
  int64_t stride[5];  // of b, c, t, y, x
  Digits digits;
  Lanes lanes;  // over packs of kRun numbers, or of one
  ScalarType kind;
};

template <typename In, typename A, int kPack>
__device__ void load_as(const void* images, int64_t at, A* value) {
  const auto pack = *reinterpret_cast<const Pack<In, kPack>*>(static_cast<const In*>(images) + at);
#pragma unroll
  for (int e = 0; e < kPack; ++e) value[e] = A(widen(pack.element[e]));
}

// kPack pixels that lie side by side. The dtype is the same for all threads, so the choice costs next to nothing.
template <typename A, int kPack>
__device__ void load_pixels(ScalarType kind, const void* images, int64_t at, A* value) {
  switch (kind) {
    case ScalarType::Byte: return load_as<uint8_t, A, kPack>(images, at, value);
    case ScalarType::BFloat16: return load_as<bf16, A, kPack>(images, at, value);
    case ScalarType::Half: return load_as<fp16, A, kPack>(images, at, value);
    case ScalarType::Float: return load_as<float, A, kPack>(images, at, value);
    default:
      if constexpr (std::is_same_v<A, double>) load_as<double, A, kPack>(images, at, value);
  }
}

template <typename A>
__device__ void to_shared(const PixelScale<A>& given, PixelScale<A>& shared) {
  if (threadIdx.x == 0) shared.count = given.count;
  for (int c = threadIdx.x; c < given.count; c += kBlock) {
    shared.scale[c] = given.scale[c];
    shared.offset[c] = given.offset[c];
  }
  __syncthreads();
}

// kSide: the numbers of a pack are pixels that lie side by side.
template <typename T, typename A, int kPack, bool kSide>
__global__ void __launch_bounds__(kBlock, 5)
    gather_patches_kernel(const __grid_constant__ PatchRows g, const __grid_constant__ PixelScale<A> given,
                          const void* __restrict__ images, const int64_t* __restrict__ ids, T* __restrict__ out) {
  __shared__ PixelScale<A> affine;
  to_shared(given, affine);
  const int64_t row = g.lanes.group();
  if (row >= g.rows) return;
  const uint32_t b = static_cast<uint32_t>(row) / static_cast<uint32_t>(g.kept);
  const int64_t l = ids != nullptr ? ids[row] : row - b * g.kept;
  auto* to = reinterpret_cast<Pack<T, kPack>*>(out + row * g.lanes.packs * kPack);
  const int step = 1 << g.lanes.log;
  // The id −1 is a row of zeros; one that is not allowed gives NaN, never another patch.
  if (l < 0 || l >= g.length) {
    const float fill = l == -1 ? 0.0f : bits_to_float(0x7fc00000u);
    return write_row<T, kPack>(g.lanes, nullptr, nullptr, fill, reinterpret_cast<T*>(to));
  }
  const PatchPixel corner = patch_corner(g.layout, static_cast<int>(l));
  const int64_t base = b * g.stride[0] + corner.t * g.stride[2] + corner.y * g.stride[3] + corner.x * g.stride[4];
  const Digits& digits = g.digits;
  for (int64_t p = g.lanes.lane(); p < g.lanes.packs; p += step) {
    int digit[4];
    uint32_t rest = static_cast<uint32_t>(p) * kPack;
    int64_t at = base;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const uint32_t quotient = digits.by[i].quotient(rest);
      digit[i] = static_cast<int>(rest - quotient * digits.by[i].by);
      at += digit[i] * digits.stride[i];
      rest = quotient;
    }
    digit[3] = static_cast<int>(rest);
    at += digit[3] * digits.stride[3];

    A value[kPack];
    if constexpr (kSide) load_pixels<A, kPack>(g.kind, images, at, value);
    Pack<T, kPack> pack;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if constexpr (!kSide) load_pixels<A, 1>(g.kind, images, at, value + e);
      narrow(pixel_value(affine, g.layout.channels_inner ? digit[0] : digit[3], value[e]), &pack.element[e]);
      at += digits.stride[0];
      ++digit[0];
#pragma unroll
      for (int i = 0; i < 3; ++i) {  // carry
        if (digit[i] < digits.size[i]) break;
        digit[i] = 0;
        ++digit[i + 1];
        at += digits.stride[i + 1] - digits.size[i] * digits.stride[i];
      }
    }
    to[p] = pack;
  }
}

// kRun pixels side by side at once: the innermost numbers of a row are neighbours in memory, whole packs of them, and
// every pack lies on a multiple of its size.
bool side_by_side(const PatchRows& g, const void* images, int64_t bytes) {
  const Digits& d = g.digits;
  bool lie = d.stride[0] == 1 && d.size[0] % kRun == 0;
  int first = 1;  // of the digits whose steps must be whole packs
  if (g.layout.channels_inner && d.stride[0] == 1 && d.stride[1] == d.size[0]) {
    lie = d.size[0] * d.size[1] % kRun == 0;
    first = 2;
  }
  for (int i = first; i < 4; ++i) lie = lie && (d.size[i] == 1 || d.stride[i] % kRun == 0);
  for (int i : {0, 2, 3}) lie = lie && g.stride[i] % kRun == 0;
  lie = lie && g.stride[4] * g.layout.patch[2] % kRun == 0;
  return lie && reinterpret_cast<uintptr_t>(images) % (kRun * bytes) == 0;
}

int64_t bytes_of(ScalarType kind) {
  switch (kind) {
    case ScalarType::Byte: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Float: return 4;
    case ScalarType::Double: return 8;
    default:
      SSLFAST_CHECK(false, "images must be uint8, float32, float64, bfloat16 or float16, got ",
                    torch::headeronly::toString(kind));
  }
}

template <typename T, typename A>
void gather(PatchRows& g, const PixelScale<A>& affine, const Tensor& images, const int64_t* ids, Tensor& out,
            cudaStream_t stream) {
  const int features = patch_features(g.layout);
  const void* from = images.const_data_ptr();
  T* to = mutable_data<T>(out);
  auto launch = [&](auto pack, auto side) {
    constexpr int kPack = decltype(pack)::value;
    g.lanes = lanes_for(features, kPack);
    gather_patches_kernel<T, A, kPack, decltype(side)::value>
        <<<grid_size(g.lanes.blocks(g.rows)), kBlock, 0, stream>>>(g, affine, from, ids, to);
  };
  using Four = std::integral_constant<int, kRun>;
  if (features % kRun != 0) return launch(std::integral_constant<int, 1>{}, std::false_type{});
  if (side_by_side(g, from, bytes_of(g.kind))) return launch(Four{}, std::true_type{});
  launch(Four{}, std::false_type{});
}

Tensor gather_patches_cuda(const Tensor& images, std::optional<Tensor> ids_any, std::vector<int64_t> patch,
                           std::vector<double> mean, std::vector<double> std, bool channels_inner, ScalarType dtype) {
  const PatchImages shape = patch_images(images, patch, channels_inner);
  const PatchLayout& layout = shape.layout;
  const int64_t kept = kept_patches(ids_any, shape.batch, layout, images);
  bytes_of(images.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(images.get_device_index());
  Tensor out = allocate(images, {shape.batch, kept, patch_features(layout)}, dtype);
  if (out.numel() == 0) return out;
  SSLFAST_CHECK(shape.batch * kept < (int64_t{1} << 31), "the result must have fewer than 2^31 rows, got ",
                shape.batch * kept);
  std::optional<Tensor> ids;
  if (ids_any.has_value()) ids = as_contiguous(*ids_any);
  PatchRows g{shape.batch * kept,           kept, patch_count(layout), layout, {},
              Digits(layout, shape.stride), {},   images.scalar_type()};
  std::copy(shape.stride, shape.stride + 5, g.stride);
  const cudaStream_t stream = current_stream(images);
  dispatch_float(out, "dtype", [&](auto element) {
    using T = decltype(element);
    auto with = [&](auto wide) {
      using A = decltype(wide);
      const PixelScale<A> affine = pixel_scale_of<A>(mean, std, layout, images.scalar_type());
      gather<T, A>(g, affine, images, data_or_null<int64_t>(ids), out, stream);
    };
    if constexpr (std::is_same_v<T, double>) return with(double{});
    if (images.scalar_type() == ScalarType::Double) return with(double{});
    with(Accumulator<T>{});
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// -------------------------------------------------------------------------------------------------- and back again

struct PatchLines {
  int64_t lines, kept;  // B·T·H·C, K
  int length;           // L
  PatchLayout layout;
  Divisor channels, height, frames, columns;  // by C, H, T and pw
  Lanes lanes;                                // over packs of a line
};

template <typename T, int kPack>
__global__ void __launch_bounds__(kBlock, 5)
    scatter_patches_kernel(const __grid_constant__ PatchLines g,
                           const __grid_constant__ PixelScale<Accumulator<T>> given, const T* __restrict__ patches,
                           const int32_t* __restrict__ inverse, T* __restrict__ out) {
  using A = Accumulator<T>;
  __shared__ PixelScale<A> affine;
  to_shared(given, affine);
  const int64_t line = g.lanes.group();
  if (line >= g.lines) return;
  // The channels of a line of pixels are neighbours here, for with channels innermost they read the same memory.
  const PatchLayout& layout = g.layout;
  const uint32_t pixels = g.channels.quotient(static_cast<uint32_t>(line));
  const uint32_t frame = g.height.quotient(pixels), b = g.frames.quotient(frame);
  PatchPixel at{static_cast<int>(line - static_cast<int64_t>(pixels) * layout.channels),
                static_cast<int>(frame - b * g.frames.by), static_cast<int>(pixels - frame * g.height.by), 0};
  const A scale = affine.scale[affine.count == 1 ? 0 : at.c];
  const int first_patch = patch_of(layout, at), first_number = feature_of(layout, at);
  const int apart = layout.channels_inner ? layout.channels : 1;  // of a pixel's number and its right neighbour's
  const int64_t features = patch_features(layout);
  const int64_t plane = static_cast<int64_t>(b) * layout.channels + at.c;
  T* to = out + ((plane * layout.frames + at.t) * layout.height + at.y) * layout.width;
  for (int64_t p = g.lanes.lane(); p < g.lanes.packs; p += int64_t{1} << g.lanes.log) {
    const auto x = static_cast<uint32_t>(p) * kPack;
    const uint32_t column = g.columns.quotient(x);
    const int64_t l = first_patch + column;
    const int64_t k = inverse != nullptr ? inverse[b * static_cast<int64_t>(g.length) + l] : l;
    Pack<T, kPack> pack{};
    if (k >= 0) {
      const int64_t number = first_number + static_cast<int64_t>(x - column * g.columns.by) * apart;
      const T* from = patches + (b * g.kept + k) * features + number;
      Pack<T, kPack> in;
      if (apart == 1) {
        in = *reinterpret_cast<const Pack<T, kPack>*>(from);
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e) in.element[e] = from[e * apart];
      }
#pragma unroll
      for (int e = 0; e < kPack; ++e) narrow(A(widen(in.element[e])) * scale, &pack.element[e]);
    } else if (k == kRepeated) {
      pack = filled<T, kPack>(A(bits_to_float(0x7fc00000u)));
    }
    reinterpret_cast<Pack<T, kPack>*>(to)[p] = pack;
  }
}

Tensor scatter_patches_cuda(const Tensor& patches_any, std::optional<Tensor> ids_any, std::vector<int64_t> size,
                            std::vector<int64_t> patch, std::vector<double> scale, bool channels_inner) {
  SSLFAST_CHECK(size.size() == 4, "size must have four numbers, C, T, H and W, got ", size.size());
  SSLFAST_CHECK(patches_any.dim() == 3, "patches must be [B, K, numbers], got ", patches_any.dim(), " dimensions");
  const PatchLayout layout = patch_layout({size[0], size[1], size[2], size[3]}, patch, channels_inner);
  const int64_t batch = patches_any.size(0), kept = kept_patches(ids_any, batch, layout, patches_any);
  check_tensor(patches_any, "patches", {batch, kept, patch_features(layout)}, patches_any.scalar_type(), patches_any);
  const torch::stable::accelerator::DeviceGuard guard(patches_any.get_device_index());
  const Tensor patches = as_contiguous(patches_any);
  Tensor out = allocate(patches, {batch, size[0], size[1], size[2], size[3]});
  if (out.numel() == 0) return out;
  SSLFAST_CHECK(out.numel() / size[3] < (int64_t{1} << 31), "images must have fewer than 2^31 lines in all, got ",
                out.numel() / size[3]);
  const cudaStream_t stream = current_stream(patches);
  std::optional<Tensor> inverse;
  if (ids_any.has_value()) inverse = inverse_ids(as_contiguous(*ids_any), batch, kept, patch_count(layout), stream);
  PatchLines g{
      out.numel() / size[3], kept, patch_count(layout), layout, Divisor(size[0]), Divisor(size[2]), Divisor(size[1]),
      Divisor(patch[2]),     {}};
  dispatch_float(patches, "patches", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const PixelScale<A> affine = patch_factors<A>(scale, layout);
    const T* from = const_data<T>(patches);
    const int32_t* places = data_or_null<int32_t>(inverse);
    T* to = mutable_data<T>(out);
    const bool whole = layout.patch[2] % kRun == 0 && reinterpret_cast<uintptr_t>(from) % (kRun * sizeof(T)) == 0;
    auto launch = [&](auto pack) {
      constexpr int kPack = decltype(pack)::value;
      g.lanes = lanes_for(layout.width, kPack);
      scatter_patches_kernel<T, kPack>
          <<<grid_size(g.lanes.blocks(g.lines)), kBlock, 0, stream>>>(g, affine, from, places, to);
    };
    if (whole) return launch(std::integral_constant<int, kRun>{});
    launch(std::integral_constant<int, 1>{});
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, gather_patches, scatter_patches)
