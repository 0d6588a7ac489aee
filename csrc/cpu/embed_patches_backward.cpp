// The gradients of embed_patches: dweight[o, f] = Σ_r g[r, o]·patch[r, f] over the kept rows r of all images, which are
// read from the pixels once more.
//
// Rows are taken a few hundred at a time: packed by all threads, then multiplied, a task adding to its own tile of
// dweight. So every sum has one order, whatever the number of threads, and no partial matrix is kept beside dweight's.
#include "embed_patches.h"

#include "cpu/engine/patch_panels.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

constexpr int64_t kPanelBytes = 5 << 20;  // of the rows packed at a time
constexpr int64_t kTileRows = kTile / 2;  // of dweight in one task
constexpr int64_t kPackedRows = 16;       // in one task
constexpr int64_t kSumImages = 64;        // summed in T before they join the total: errors grow as its root

template <typename T>
struct Backward {
  static constexpr int C = kColumns<T>;
  const EmbedPatchesBackward& call;
  const int64_t rows, features, padded, width, step, stride, tile_rows, tile_columns;
  const PatchPacker<T> packer;
  int64_t* next;
  T *grads, *patches, *tiles, *row, *sums;
  double* bias;

  Backward(const EmbedPatchesBackward& embed, const PixelScale<T>& scale, int64_t threads, Arena& arena)
      : call(embed),
        rows(call.batch * call.kept),
        features(patch_features(call.source.layout)),
        padded(round_up(features, C)),
        width(round_up(call.width, C)),
        step(rows_at_a_time()),
        stride(panel_stride<T>(step)),
        tile_rows((call.width + kTileRows - 1) / kTileRows),
        tile_columns((features + kTile - 1) / kTile),
        packer{call.source, scale, call.ids, call.kept, features, padded} {
    next = arena.take<int64_t>(1);
    const bool packs = call.weight != nullptr || call.bias != nullptr, multiplies = call.weight != nullptr;
    grads = arena.take<T>(packs ? width / C * stride : 0);
    patches = arena.take<T>(multiplies ? padded / C * stride : 0);
    tiles = arena.take<T>(multiplies ? tile_rows * tile_columns * kTileRows * kTile : 0);
    row = arena.take<T>(threads * (padded > width ? padded : width));
    sums = arena.take<T>(threads * 2 * call.width);
    bias = arena.take<double>(call.bias != nullptr ? width : 0);
  }

  int64_t rows_at_a_time() const {
    const int64_t fit = kPanelBytes / ((padded + width) * static_cast<int64_t>(sizeof(T))) / kDepth * kDepth;
    const int64_t least = fit < kDepth ? kDepth : fit;
    return rows < least ? (rows < 1 ? 1 : rows) : least;
  }

  // Number of the first entry of row r in the tokens.
  int64_t token(int64_t b, int64_t k) const {
    return (b * (call.prefix_rows + call.kept) + call.prefix_rows + k) * call.width;
  }

  void pack(int64_t worker, int64_t first, int64_t begin, int64_t end) const {
    T* buffer = row + worker * (padded > width ? padded : width);
    for (int64_t r = begin; call.weight != nullptr && r < begin + PatchPacker<T>::kAhead && r < end; ++r)
      packer.prefetch(first + r);
    for (int64_t r = begin; r < end; ++r) {
      const bool kept = call.ids[first + r] >= 0;
      for (int64_t k = kept ? call.width : 0; k < width; ++k) buffer[k] = 0;
      if (kept)
        read_part(call.grad, call.type, token((first + r) / call.kept, (first + r) % call.kept), call.width, buffer);
      into_panels(buffer, width, stride, grads + r * C);
      if (call.weight != nullptr) packer.row(first + r, first + end, stride, buffer, patches + r * C);
    }
  }

  // Adds `count` packed rows to one tile of dweight, and writes it after the last of them.
  void multiply(int64_t task, int64_t count, bool begins, bool ends) const {
    const int64_t o = task / tile_columns * kTileRows, f = task % tile_columns * kTile;
    const int64_t height = call.width - o < kTileRows ? call.width - o : kTileRows;
    const int64_t columns = features - f < kTile ? features - f : kTile;
    T* tile = tiles + task * kTileRows * kTile;
    for (int64_t k = 0; begins && k < kTileRows * kTile; ++k) tile[k] = 0;
    tile_gram(grads + o / C * stride, patches + f / C * stride, stride, height, columns, 0, count, false, tile);
    for (int64_t r = 0; ends && r < height; ++r)
      write_part(tile + r * kTile, call.weight, call.type, (o + r) * features + f, columns);
  }

  void add_bias(int64_t panel, int64_t count, bool begins) const {
    ColumnSums<T, 1> found;
    const T* from = grads + panel * stride;
    sum_columns<T, 1>(count, found, [&](int64_t r, int v, vec<T>* part) { part[0] += panel_vector(from, r, v); });
    for (int c = 0; c < C; ++c) bias[panel * C + c] = (begins ? 0 : bias[panel * C + c]) + found[0][c];
  }

  // Σ of one row of each image, `row_of(b)` or −1 for none, in the order of the images.
  template <typename Row>
  void sum_images(int64_t worker, Row&& row_of, void* out, int64_t index) const {
    T *part = sums + worker * 2 * call.width, *total = part + call.width;
    for (int64_t d = 0; d < 2 * call.width; ++d) part[d] = 0;
    for (int64_t b = 0; b < call.batch; ++b) {
      const int64_t k = row_of(b);
      if (k >= -call.prefix_rows) add_row(call.grad, call.type, token(b, k), call.width, part);
      if ((b + 1) % kSumImages != 0 && b + 1 < call.batch) continue;
      for (int64_t d = 0; d < call.width; ++d) {
        total[d] += part[d];
        part[d] = 0;
      }
    }
    write_part(total, out, call.type, index * call.width, call.width);
  }

  void run(const Parallel& parallel) const {
    const int64_t products = call.weight != nullptr ? tile_rows * tile_columns : 0;
    const int64_t panels = call.bias != nullptr ? width / C : 0;
    for (int64_t first = 0; products + panels > 0 && first < rows; first += step) {
      const int64_t count = rows - first < step ? rows - first : step;
      each_task(parallel, (count + kPackedRows - 1) / kPackedRows, next, [&](int64_t worker, int64_t task) {
        const int64_t begin = task * kPackedRows;
        pack(worker, first, begin, count - begin < kPackedRows ? count : begin + kPackedRows);
      });
      each_task(parallel, products + panels, next, [&](int64_t, int64_t task) {
        if (task < products)
          multiply(task, count, first == 0, first + count == rows);
        else
          add_bias(task - products, count, first == 0);
      });
    }
    if (panels > 0) {
      for (int64_t d = 0; d < call.width; ++d) sums[d] = rows > 0 ? static_cast<T>(bias[d]) : T(0);
      write_part(sums, call.bias, call.type, 0, call.width);
    }
    const int64_t none = -call.prefix_rows - 1, length = patch_count(call.source.layout);
    const int64_t positions = call.position != nullptr ? length : 0,
                  prefixes = call.prefix != nullptr ? call.prefix_rows : 0;
    each_task(parallel, positions + prefixes, next, [&](int64_t worker, int64_t task) {
      if (task < positions)
        sum_images(
            worker,
            [&](int64_t b) {
              const int64_t k = call.row_of_patch[b * length + task];
              return k < 0 ? none : k;
            },
            call.position, task);
      else
        sum_images(worker, [&](int64_t) { return task - positions - call.prefix_rows; }, call.prefix, task - positions);
    });
  }
};

}  // namespace

SSLFAST_EMBED_PATCHES_DEFINE(embed_patches_backward, EmbedPatchesBackward, Backward)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"
#include "cpu/engine/patch_ids.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> embed_patches_backward_cpu(
    const Tensor& grad_any, const Tensor& images, const Tensor& ids_any, const std::vector<int64_t>& patch,
    const std::vector<double>& mean, const std::vector<double>& std, const std::vector<int64_t>& needs) {
  SSLFAST_CHECK(needs.size() == 4, "needs must have four numbers: weight, bias, position and prefix");
  const PatchImages from = patch_images(images, patch, false);
  const PatchLayout& layout = from.layout;
  const int64_t kept = kept_patches(ids_any, from.batch, layout, images), length = patch_count(layout);
  SSLFAST_CHECK(grad_any.dim() == 3 && grad_any.size(1) >= kept, "grad must be [B, P + K, D]");
  const int64_t d = grad_any.size(2), prefix_rows = grad_any.size(1) - kept;
  const ScalarType dtype = grad_any.scalar_type();
  check_tensor(grad_any, "grad", {from.batch, prefix_rows + kept, d}, dtype, images);
  const Tensor grad = as_contiguous(grad_any), ids = as_contiguous(ids_any);
  const std::vector<int32_t> rows = rows_of_patches(const_data<int64_t>(ids), from.batch, kept, length);

  auto wanted = [&](int i, int64_t first, int64_t second) {
    if (needs[static_cast<size_t>(i)] == 0) return allocate(grad, {0});
    return second < 0 ? allocate(grad, {first}) : allocate(grad, {first, second});
  };
  Tensor weight = wanted(0, d, patch_features(layout)), bias = wanted(1, d, -1);
  Tensor position = wanted(2, length, d), prefix = wanted(3, prefix_rows, d);
  if (from.batch * kept == 0 && weight.numel() > 0) torch::stable::zero_(weight);
  const EmbedPatchesBackward call{patch_source(images, from),
                                  from.batch,
                                  kept,
                                  prefix_rows,
                                  d,
                                  const_data<int64_t>(ids),
                                  rows.data(),
                                  element_type(grad, "grad"),
                                  grad.const_data_ptr(),
                                  data_or_null(weight),
                                  data_or_null(bias),
                                  data_or_null(position),
                                  data_or_null(prefix)};
  const Parallel parallel = torch_parallel();
  with_pixel_scale(grad, call.type, mean, std, layout, images, [&](const auto& affine, void* memory) {
    return SSLFAST_CALL(embed_patches_backward, parallel, call, affine, memory);
  });
  return {weight, bias, position, prefix};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, embed_patches_backward)
#endif  // SSLFAST_CPU_DISPATCH
