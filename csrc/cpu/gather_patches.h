// What gather_patches and scatter_patches are asked for on the CPU.
#pragma once
#include "cpu/engine/patch_rows.h"

namespace sslfast {

// Rows [B, K, C·pt·ph·pw] of images.
struct GatherPatches {
  PatchSource source;
  int64_t batch, kept;
  const int64_t* ids;  // [B, K], or null for all in order
};

// Images [B, C, T, H, W] of rows.
struct ScatterPatches {
  PatchLayout layout;
  int64_t batch, kept;
  const int32_t* rows;  // [B, L]: which row is patch l, −1 for none; or null for all in order
};

}  // namespace sslfast

// `buffers`: one row of A for each thread, where A is not T.
#define SSLFAST_GATHER_PATCHES_SIGNATURE(A, T)                                                                      \
  void gather_patches(const ::sslfast::Parallel&, const ::sslfast::GatherPatches&, const ::sslfast::PixelScale<A>&, \
                      A* buffers, T* rows)
#define SSLFAST_SCATTER_PATCHES_SIGNATURE(T)                                         \
  void scatter_patches(const ::sslfast::Parallel&, const ::sslfast::ScatterPatches&, \
                       const ::sslfast::PixelScale<::sslfast::Accumulator<T>>&, const T* patches, T* images);
SSLFAST_DECLARE(SSLFAST_GATHER_PATCHES_SIGNATURE(float, float))
SSLFAST_DECLARE(SSLFAST_GATHER_PATCHES_SIGNATURE(float, ::sslfast::bf16))
SSLFAST_DECLARE(SSLFAST_GATHER_PATCHES_SIGNATURE(float, ::sslfast::fp16))
SSLFAST_DECLARE(SSLFAST_GATHER_PATCHES_SIGNATURE(double, double))
SSLFAST_DECLARE(SSLFAST_GATHER_PATCHES_SIGNATURE(double, float))
SSLFAST_DECLARE(SSLFAST_GATHER_PATCHES_SIGNATURE(double, ::sslfast::bf16))
SSLFAST_DECLARE(SSLFAST_GATHER_PATCHES_SIGNATURE(double, ::sslfast::fp16))
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_SCATTER_PATCHES_SIGNATURE, float, double, bf16, fp16))
