// What embed_patches and its backward are asked for on the CPU. Rows are the B·K kept patches of all images.
#pragma once
#include "cpu/engine/packed_rows.h"
#include "cpu/engine/patch_rows.h"

namespace sslfast {

struct EmbedPatches {
  PatchSource source;
  int64_t batch, kept, prefix_rows, width;  // B, K, P, D
  const int64_t* ids;                       // [B, K]
  ElementType type;                         // of all that follows
  const void* weight;                       // [D, F]
  const void* bias;                         // [D], or null
  const void* position;                     // [L, D], or null
  const void* prefix;                       // [P, D]
  void* out;                                // [B, P + K, D]
};

// Where there is null, no gradient is wanted.
struct EmbedPatchesBackward {
  PatchSource source;
  int64_t batch, kept, prefix_rows, width;
  const int64_t* ids;
  const int32_t* row_of_patch;  // [B, L]: the k of patch l, −1 for none
  ElementType type;
  const void* grad;  // [B, P + K, D]
  void *weight, *bias, *position, *prefix;
};

}  // namespace sslfast

// With no memory they only return how many bytes they need.
#define SSLFAST_EMBED_PATCHES_SIGNATURES(T)                                                                          \
  int64_t embed_patches(const ::sslfast::Parallel&, const ::sslfast::EmbedPatches&, const ::sslfast::PixelScale<T>&, \
                        void* memory);                                                                               \
  int64_t embed_patches_backward(const ::sslfast::Parallel&, const ::sslfast::EmbedPatchesBackward&,                 \
                                 const ::sslfast::PixelScale<T>&, void* memory);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_EMBED_PATCHES_SIGNATURES, float, double))
