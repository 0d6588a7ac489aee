// What embed_patches and its backward are asked for on the CPU. Rows are the B·K kept patches of all images.
#pragma once
#include "cpu/engine/arena.h"
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

namespace sslfast::SSLFAST_CPU_LEVEL {

// Runs Task(call, affine, threads, arena) in `memory`, and returns how many bytes it takes there.
template <typename Task, typename Call, typename Affine>
static int64_t run_in(void* memory, const Parallel& parallel, const Call& call, const Affine& affine) {
  Arena arena{static_cast<char*>(memory)};
  const Task task(call, affine, parallel.threads, arena);
  if (memory != nullptr) task.run(parallel);
  return arena.bytes;
}

}  // namespace sslfast::SSLFAST_CPU_LEVEL

// With no memory they only return how many bytes they need.
#define SSLFAST_EMBED_PATCHES_SIGNATURE(op, Call, T)                                                                   \
  int64_t op(const ::sslfast::Parallel& parallel, const ::sslfast::Call& call, const ::sslfast::PixelScale<T>& affine, \
             void* memory)
SSLFAST_DECLARE(SSLFAST_EMBED_PATCHES_SIGNATURE(embed_patches, EmbedPatches, float))
SSLFAST_DECLARE(SSLFAST_EMBED_PATCHES_SIGNATURE(embed_patches, EmbedPatches, double))
SSLFAST_DECLARE(SSLFAST_EMBED_PATCHES_SIGNATURE(embed_patches_backward, EmbedPatchesBackward, float))
SSLFAST_DECLARE(SSLFAST_EMBED_PATCHES_SIGNATURE(embed_patches_backward, EmbedPatchesBackward, double))

// The two of one name, by Task<T>.
#define SSLFAST_EMBED_PATCHES_DEFINE(op, Call, Task)                                                               \
  SSLFAST_EMBED_PATCHES_SIGNATURE(op, Call, float) { return run_in<Task<float>>(memory, parallel, call, affine); } \
  SSLFAST_EMBED_PATCHES_SIGNATURE(op, Call, double) { return run_in<Task<double>>(memory, parallel, call, affine); }
