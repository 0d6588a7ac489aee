// Parts of rows of any dtype, and rows in panels: what embed_patches and its backward share.
#pragma once
#include "gram_tiles.h"
#include "patch_rows.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// out += `count` numbers of a matrix, from number `at` on.
template <typename T, typename S>
inline void add_part(const S* from, int64_t count, T* __restrict__ out) {
  for (int64_t k = 0; k < count; ++k) out[k] += static_cast<T>(widen(from[k]));
}
template <typename T>
void add_row(const void* matrix, ElementType type, int64_t at, int64_t count, T* out) {
  switch (type) {
    case ElementType::f32: return add_part(static_cast<const float*>(matrix) + at, count, out);
    case ElementType::f64: return add_part(static_cast<const double*>(matrix) + at, count, out);
    case ElementType::bf16: return add_part(static_cast<const bf16*>(matrix) + at, count, out);
    case ElementType::f16: return add_part(static_cast<const fp16*>(matrix) + at, count, out);
  }
}

inline int64_t bytes_of(ElementType type) { return type == ElementType::f64 ? 8 : type == ElementType::f32 ? 4 : 2; }

inline void prefetch_numbers(const void* matrix, ElementType type, int64_t at, int64_t count) {
  const char* from = static_cast<const char*>(matrix) + at * bytes_of(type);
  for (int64_t byte = 0; byte < count * bytes_of(type); byte += 64) __builtin_prefetch(from + byte);
}

// `count` numbers of a matrix, from number `at` on.
template <typename T>
void read_part(const void* matrix, ElementType type, int64_t at, int64_t count, T* out) {
  read_row(Rows{static_cast<const char*>(matrix) + at * bytes_of(type), type}, 0, count, out);
}

// `count` numbers into a matrix, from number `at` on.
template <typename T>
void write_part(const T* x, void* matrix, ElementType type, int64_t at, int64_t count) {
  write_row(x, static_cast<char*>(matrix) + at * bytes_of(type), type, 0, count);
}

// A row of numbers, zero up to whole panels, into row r of panels `stride` numbers apart.
template <typename T>
inline void into_panels(const T* row, int64_t padded, int64_t stride, T* panels) {
  for (int64_t k = 0; k < padded; k += kColumns<T>, panels += stride)
    for (int c = 0; c < kColumns<T>; c += kLanes<T>) store(panels + c, load(row + k + c));
}

// The kept patches of all images, row after row, into panels.
template <typename T>
struct PatchPacker {
  static constexpr int64_t kAhead = 2;
  const PatchSource& source;
  const PixelScale<T>& affine;
  const int64_t* ids;  // [B, K]
  int64_t kept, features, padded;

  void prefetch(int64_t r) const {
    if (ids[r] >= 0) prefetch_patch(source, r / kept, static_cast<int>(ids[r]));
  }

  // Row r of those up to `end`, the next ones of which are asked for; zeros for the id −1. `buffer`: padded numbers.
  void row(int64_t r, int64_t end, int64_t stride, T* buffer, T* panels) const {
    if (r + kAhead < end) prefetch(r + kAhead);
    for (int64_t k = ids[r] < 0 ? 0 : features; k < padded; ++k) buffer[k] = 0;
    if (ids[r] >= 0) read_patch(source, affine, r / kept, static_cast<int>(ids[r]), buffer);
    into_panels(buffer, padded, stride, panels);
  }
};

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
