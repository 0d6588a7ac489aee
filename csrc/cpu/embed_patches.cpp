// Patch projection of the kept patches alone, from the pixels to the tokens: rows of patches are packed into the panels
// of the micro-kernel as they are read, so they never stand in memory as a matrix.
//
// Forward: a task is a block of rows; its panels stay in the second-level cache while the weight's go by. A tile begins
// as bias + position, the products are added, and it is written where its tokens belong.
#include "embed_patches.h"

#include "cpu/engine/patch_panels.h"
#include "cpu/engine/transpose.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

// Positions are asked for this many rows before they are added.
constexpr int64_t kAhead = 4;

// Most rows of a block: with 768 numbers a row, its panels (288 KiB), a tile (72 KiB) and the weight's panels of the
// tile share 1 MiB of second-level cache.
constexpr int64_t kBlockRows = kTile / 2;

template <typename T>
struct Forward {
  static constexpr int C = kColumns<T>;
  const EmbedPatches& call;
  const int64_t rows, features, padded, width, height, blocks, images_per_task, stride;
  const PatchPacker<T> packer;
  int64_t* next;
  T *weight, *transposing, *panels, *tiles, *row;  // the last four: one for each worker

  Forward(const EmbedPatches& embed, const PixelScale<T>& scale, int64_t threads, Arena& arena)
      : call(embed),
        rows(call.batch * call.kept),
        features(patch_features(call.source.layout)),
        padded(round_up(features, C)),
        width(round_up(call.width, C)),
        height(block_height(rows)),
        blocks((rows + height - 1) / height),
        images_per_task((call.batch + 15) / 16),
        stride(panel_stride<T>(height)),
        packer{call.source, scale, call.ids, call.kept, features, padded} {
    next = arena.take<int64_t>(1);
    weight = arena.take<T>(width * features);
    transposing =
        arena.take<T>(call.type == ElementType::f32 || call.type == ElementType::f64 ? 0 : threads * C * features);
    panels = arena.take<T>(threads * padded / C * stride);
    tiles = arena.take<T>(threads * height * kTile);
    row = arena.take<T>(threads * padded);
  }

  // Sixteen blocks or more where there are rows for it; whole micro-tiles.
  static int64_t block_height(int64_t rows) {
    const int64_t share = round_up((rows + 15) / 16, kRows);
    return share < kBlockRows ? (share < kRows ? kRows : share) : kBlockRows;
  }

  // Panel j of the weight, the features outermost.
  void pack_weight(int64_t worker, int64_t j) const {
    const int64_t first = j * C, count = call.width - first < C ? call.width - first : C;
    const T* from = static_cast<const T*>(call.weight) + first * features;
    if (call.type != ElementType::f32 && call.type != ElementType::f64) {
      T* buffer = transposing + worker * C * features;
      for (int64_t r = 0; r < count; ++r)
        read_row(Rows{call.weight, call.type}, first + r, features, buffer + r * features);
      from = buffer;
    }
    T* to = weight + first * features;
    transpose(from, features, count, features, to, C);
    for (int64_t k = 0; count < C && k < features; ++k)
      for (int64_t c = count; c < C; ++c) to[k * C + c] = 0;
  }

  // What a tile begins as: bias + position.
  void fill(int64_t first, int64_t count, int64_t column, int64_t columns, T* tile) const {
    for (int64_t r = 0; r < count; ++r) {
      T* at = tile + r * kTile;
      if (call.bias != nullptr)
        read_part(call.bias, call.type, column, columns, at);
      else
        for (int64_t c = 0; c < columns; ++c) at[c] = 0;
      for (int64_t c = columns; c < round_up(columns, C); ++c) at[c] = 0;
      const int64_t id = call.ids[first + r], soon = r + kAhead < count ? call.ids[first + r + kAhead] : -1;
      if (call.position != nullptr && soon >= 0)
        prefetch_numbers(call.position, call.type, soon * call.width + column, columns);
      if (call.position != nullptr && id >= 0) add_row(call.position, call.type, id * call.width + column, columns, at);
    }
  }

  void multiply(const T* a, int64_t count, int64_t column, int64_t columns, T* tile) const {
    for (int64_t k = 0; k < features; k += kDepth) {
      const int64_t depth = features - k < kDepth ? features - k : kDepth, chunks = (depth + C - 1) / C;
      for (int64_t j = 0; j < columns; j += C) {
        const T* b = weight + (column + j) * features + k * C;
        for (int64_t i = 0; i < count; i += kRows)
          micro_rows<T, kVectors, C, 1, kTile, Store::add>(count - i, a + k / C * stride + i * C, b, chunks, C,
                                                           depth - (chunks - 1) * C, stride, tile + i * kTile + j, 0,
                                                           0);
      }
    }
  }

  void write(int64_t first, int64_t count, int64_t column, int64_t columns, T* tile) const {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = first + r,
                    token = i / call.kept * (call.prefix_rows + call.kept) + call.prefix_rows + i % call.kept;
      T* at = tile + r * kTile;
      for (int64_t c = 0; call.ids[i] < 0 && c < columns; ++c) at[c] = 0;
      write_part(at, call.out, call.type, token * call.width + column, columns);
    }
  }

  void block(int64_t worker, int64_t task) const {
    const int64_t first = task * height, count = rows - first < height ? rows - first : height;
    T *a = panels + worker * (padded / C) * stride, *tile = tiles + worker * height * kTile;
    for (int64_t r = 0; r < PatchPacker<T>::kAhead && r < count; ++r) packer.prefetch(first + r);
    for (int64_t r = 0; r < count; ++r) packer.row(first + r, first + count, stride, row + worker * padded, a + r * C);
    for (int64_t column = 0; column < call.width; column += kTile) {
      const int64_t columns = call.width - column < kTile ? call.width - column : kTile;
      fill(first, count, column, columns, tile);
      multiply(a, count, column, columns, tile);
      write(first, count, column, columns, tile);
    }
  }

  void prefixes(int64_t task) const {
    const int64_t bytes = call.prefix_rows * call.width * bytes_of(call.type);
    const int64_t step = (call.prefix_rows + call.kept) * call.width * bytes_of(call.type);
    for (int64_t b = task * images_per_task; b < (task + 1) * images_per_task && b < call.batch; ++b)
      __builtin_memcpy(static_cast<char*>(call.out) + b * step, call.prefix, static_cast<size_t>(bytes));
  }

  void run(const Parallel& parallel) const {
    each_task(parallel, blocks > 0 ? width / C : 0, next, [&](int64_t worker, int64_t j) { pack_weight(worker, j); });
    const int64_t copies = call.prefix_rows > 0 ? (call.batch + images_per_task - 1) / images_per_task : 0;
    each_task(parallel, blocks + copies, next, [&](int64_t worker, int64_t task) {
      if (task < blocks)
        block(worker, task);
      else
        prefixes(task - blocks);
    });
  }
};

}  // namespace

SSLFAST_EMBED_PATCHES_DEFINE(embed_patches, EmbedPatches, Forward)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include "cpu/engine/operator.h"
#include "cpu/engine/patch_ids.h"

namespace sslfast {
namespace {

Tensor embed_patches_cpu(const Tensor& images, const Tensor& ids_any, const Tensor& weight_any,
                         const MaybeTensor& bias_any, const MaybeTensor& position_any, const MaybeTensor& prefix_any,
                         const std::vector<int64_t>& patch, const std::vector<double>& mean,
                         const std::vector<double>& std) {
  const PatchImages from = patch_images(images, patch, false);
  const PatchLayout& layout = from.layout;
  const int64_t kept = kept_patches(ids_any, from.batch, layout, images), length = patch_count(layout);
  SSLFAST_CHECK(weight_any.dim() == 2, "weight must be two-dimensional, got ", weight_any.dim(), " dimensions");
  const ScalarType dtype = weight_any.scalar_type();
  const int64_t d = weight_any.size(0);
  check_tensor(weight_any, "weight", {d, patch_features(layout)}, dtype, images);
  check_optional(bias_any, "bias", d, dtype, images);
  if (position_any.has_value()) check_tensor(*position_any, "position", {length, d}, dtype, images);
  SSLFAST_CHECK(!prefix_any.has_value() || prefix_any->dim() == 2, "prefix must be two-dimensional [P, D]");
  const int64_t prefix_rows = prefix_any.has_value() ? prefix_any->size(0) : 0;
  if (prefix_any.has_value()) check_tensor(*prefix_any, "prefix", {prefix_rows, d}, dtype, images);

  const Tensor ids = as_contiguous(ids_any), weight = as_contiguous(weight_any);
  const MaybeTensor bias = contiguous_or_none(bias_any), position = contiguous_or_none(position_any);
  const MaybeTensor prefix = contiguous_or_none(prefix_any);
  rows_of_patches(const_data<int64_t>(ids), from.batch, kept, length);
  Tensor out = allocate(weight, {from.batch, prefix_rows + kept, d});
  if (out.numel() == 0) return out;
  advise_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  const EmbedPatches call{patch_source(images, from),
                          from.batch,
                          kept,
                          prefix_rows,
                          d,
                          const_data<int64_t>(ids),
                          element_type(weight, "weight"),
                          weight.const_data_ptr(),
                          data_or_null(bias),
                          data_or_null(position),
                          data_or_null(prefix),
                          out.mutable_data_ptr()};
  const Parallel parallel = torch_parallel();
  with_pixel_scale(weight, call.type, mean, std, layout, images, [&](const auto& affine, void* memory) {
    return SSLFAST_CALL(embed_patches, parallel, call, affine, memory);
  });
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, embed_patches)
#endif  // SSLFAST_CPU_DISPATCH
