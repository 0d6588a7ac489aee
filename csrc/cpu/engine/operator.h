// What the registrations of the tiled CPU operators share: element types, scalars and scratch memory.
// Include it behind #ifdef SSLFAST_CPU_DISPATCH.
#pragma once
#include <optional>

#include "huge_pages.h"
#include "packed_rows.h"
#include "torch_api.h"

namespace sslfast {

inline ElementType element_type(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::f32;
    case ScalarType::Double: return ElementType::f64;
    case ScalarType::BFloat16: return ElementType::bf16;
    case ScalarType::Half: return ElementType::f16;
    default: SSLFAST_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// One number in the accumulator's dtype.
inline double scalar(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? *const_data<double>(x) : *const_data<float>(x);
}

inline void set_scalar(Tensor& x, double value) {
  if (x.scalar_type() == ScalarType::Double)
    *mutable_data<double>(x) = value;
  else
    *mutable_data<float>(x) = static_cast<float>(value);
}

// Scratch memory with 64 bytes to spare for alignment.
inline Tensor scratch(const Tensor& like, int64_t bytes) {
  Tensor memory = allocate(like, {bytes + 64}, ScalarType::Byte);
  advise_huge_pages(memory.mutable_data_ptr(), bytes);
  return memory;
}
inline void* aligned(Tensor& memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) / 64 * 64);
}

// `size` numbers that the forward keeps for the backward.
inline Tensor tile_cache_of(const Tensor& like, int64_t size, ScalarType kind) {
  Tensor tiles = allocate(like, {size}, kind);
  advise_huge_pages(tiles.mutable_data_ptr(), size * static_cast<int64_t>(tiles.element_size()));
  return tiles;
}

// The data of a tensor that the forward saved, for a structure of pointers that the backward only reads; null if empty.
inline void* read_only(const Tensor& x) { return x.numel() == 0 ? nullptr : const_cast<void*>(x.const_data_ptr()); }

using MaybeTensor = std::optional<Tensor>;

// A contiguous copy-free view where there is one, and its data (null where there is no tensor).
inline MaybeTensor contiguous_or_none(const MaybeTensor& x) {
  return x.has_value() ? MaybeTensor(as_contiguous(*x)) : MaybeTensor();
}
inline const void* data_or_null(const MaybeTensor& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }
inline void* data_or_null(Tensor& x) { return x.numel() == 0 ? nullptr : x.mutable_data_ptr(); }

inline void check_optional(const MaybeTensor& x, const char* name, int64_t length, ScalarType dtype,
                           const Tensor& like) {
  if (x.has_value()) check_tensor(*x, name, {length}, dtype, like);
}

}  // namespace sslfast
