// What the registrations of patch operations on the CPU share. Include it behind #ifdef SSLFAST_CPU_DISPATCH.
#pragma once
#include <vector>

#include "checks/gather_patches.h"
#include "operator.h"
#include "patch_rows.h"

namespace sslfast {

inline PatchPixelType pixel_type(const Tensor& images) {
  switch (images.scalar_type()) {
    case ScalarType::Byte: return PatchPixelType::u8;
    case ScalarType::Float: return PatchPixelType::f32;
    case ScalarType::Double: return PatchPixelType::f64;
    case ScalarType::BFloat16: return PatchPixelType::bf16;
    case ScalarType::Half: return PatchPixelType::f16;
    default:
      SSLFAST_CHECK(false, "images must be uint8, float32, float64, bfloat16 or float16, got ",
                    torch::headeronly::toString(images.scalar_type()));
  }
}

inline PatchSource patch_source(const Tensor& images, const PatchImages& of) {
  PatchSource source{images.const_data_ptr(), pixel_type(images), {}, of.layout};
  for (int i = 0; i < 5; ++i) source.stride[i] = of.stride[i];
  return source;
}

// [B, L]: which row of ids [B, K] names patch l, −1 for none. An error where an id is out of range or repeats.
inline std::vector<int32_t> rows_of_patches(const int64_t* ids, int64_t batch, int64_t kept, int64_t length) {
  std::vector<int32_t> rows(static_cast<size_t>(batch * length), -1);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t k = 0; k < kept; ++k) {
      const int64_t id = ids[b * kept + k];
      SSLFAST_CHECK(id >= -1 && id < length, "ids must be from 0 to ", length - 1, ", or -1 for none, got ", id);
      if (id < 0) continue;
      int32_t& row = rows[static_cast<size_t>(b * length + id)];
      SSLFAST_CHECK(row < 0, "ids must not repeat within a row, got ", id, " twice");
      row = static_cast<int32_t>(k);
    }
  return rows;
}

// Runs a kernel of the level in use with the scratch memory it asks for.
template <typename Kernel>
inline void with_scratch(const Tensor& like, Kernel&& kernel) {
  Tensor memory = scratch(like, kernel(nullptr));
  kernel(aligned(memory));
}

// The same for kernel(affine, memory), affine being the scale of the pixels in the accumulator of `type`.
template <typename Kernel>
inline void with_pixel_scale(const Tensor& like, ElementType type, const std::vector<double>& mean,
                             const std::vector<double>& std, const PatchLayout& layout, const Tensor& images,
                             Kernel&& kernel) {
  auto run = [&](auto accumulator) {
    const auto affine = pixel_scale_of<decltype(accumulator)>(mean, std, layout, images.scalar_type());
    with_scratch(like, [&](void* memory) { return kernel(affine, memory); });
  };
  with_accumulator(type, run);
}

}  // namespace sslfast
