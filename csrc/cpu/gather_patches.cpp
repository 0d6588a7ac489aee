// Patches of images as rows, and back, on the CPU. Memory traffic is the bound: the pixels of the wanted patches read
// once, the rows written once; the images written once.
#include "gather_patches.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

// About this many numbers a task: enough to pay for waking a thread.
constexpr int64_t kNumbers = 32768;

// Calls f(worker, i) for every i < count, `numbers` of work each; worker < threads.
template <typename F>
void each_item(const Parallel& parallel, int64_t count, int64_t numbers, F&& f) {
  const int64_t share = numbers < kNumbers ? kNumbers / (numbers < 1 ? 1 : numbers) : 1;
  const int64_t tasks = (count + share - 1) / share, workers = tasks < parallel.threads ? tasks : parallel.threads;
  auto work = [&](int64_t worker) {
    for (int64_t task = worker; task < tasks; task += workers)
      for (int64_t i = task * share; i < (task + 1) * share && i < count; ++i) f(worker, i);
  };
  parallel_each(parallel, workers, work);
}

template <typename A, typename T>
void gather(const Parallel& parallel, const GatherPatches& of, const PixelScale<A>& affine, A* buffers, T* rows) {
  const int64_t features = patch_features(of.source.layout);
  each_item(parallel, of.batch * of.kept, features, [&](int64_t worker, int64_t i) {
    const int64_t id = of.ids == nullptr ? i % of.kept : of.ids[i];
    T* row = rows + i * features;
    if (id < 0) {
      __builtin_memset(row, 0, static_cast<size_t>(features) * sizeof(T));
    } else if constexpr (sizeof(T) == sizeof(A)) {
      read_patch(of.source, affine, i / of.kept, static_cast<int>(id), row);
    } else {
      A* buffer = buffers + worker * features;
      read_patch(of.source, affine, i / of.kept, static_cast<int>(id), buffer);
      for (int64_t k = 0; k < features; ++k) narrow(static_cast<float>(buffer[k]), row + k);
    }
  });
}

template <typename T>
void scatter(const Parallel& parallel, const ScatterPatches& of, const PixelScale<Accumulator<T>>& affine,
             const T* patches, T* images) {
  const PatchLayout& layout = of.layout;
  const int64_t length = patch_count(layout), features = patch_features(layout), columns = patch_columns(layout);
  const int64_t lines = length / columns;  // rows of patches, one after the other in memory
  each_item(parallel, of.batch * lines, columns * features, [&](int64_t, int64_t i) {
    const int64_t b = i / lines;
    for (int64_t l = i % lines * columns; l < (i % lines + 1) * columns; ++l) {
      const int64_t k = of.rows == nullptr ? l : of.rows[b * length + l];
      const T* row = k < 0 ? nullptr : patches + (b * of.kept + k) * features;
      write_patch(row, layout, affine, static_cast<int>(l), images + b * length * features);
    }
  });
}

}  // namespace

#define SSLFAST_GATHER_PATCHES_DEFINE(A, T)                                                                       \
  void gather_patches(const Parallel& parallel, const GatherPatches& of, const PixelScale<A>& affine, A* buffers, \
                      T* rows) {                                                                                  \
    gather(parallel, of, affine, buffers, rows);                                                                  \
  }
SSLFAST_GATHER_PATCHES_DEFINE(float, float)
SSLFAST_GATHER_PATCHES_DEFINE(float, bf16)
SSLFAST_GATHER_PATCHES_DEFINE(float, fp16)
SSLFAST_GATHER_PATCHES_DEFINE(double, double)
SSLFAST_GATHER_PATCHES_DEFINE(double, float)
SSLFAST_GATHER_PATCHES_DEFINE(double, bf16)
SSLFAST_GATHER_PATCHES_DEFINE(double, fp16)

#define SSLFAST_SCATTER_PATCHES_DEFINE(T)                                                                            \
  void scatter_patches(const Parallel& parallel, const ScatterPatches& of, const PixelScale<Accumulator<T>>& affine, \
                       const T* patches, T* images) {                                                                \
    scatter(parallel, of, affine, patches, images);                                                                  \
  }
SSLFAST_EACH(SSLFAST_SCATTER_PATCHES_DEFINE, float, double, bf16, fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include "cpu/engine/patch_ids.h"

namespace sslfast {
namespace {

// Calls f(A{}, T{}): arithmetic in A, results in T.
template <typename F>
void dispatch_rows(const Tensor& images, const Tensor& rows, F&& f) {
  const bool wide = images.scalar_type() == ScalarType::Double;
  dispatch_float(rows, "dtype", [&](auto element) {
    using T = decltype(element);
    if (wide)
      f(double{}, T{});
    else
      f(Accumulator<T>{}, T{});
  });
}

Tensor gather_patches_cpu(const Tensor& images, const MaybeTensor& ids_any, const std::vector<int64_t>& patch,
                          const std::vector<double>& mean, const std::vector<double>& std, bool channels_inner,
                          ScalarType dtype) {
  const PatchImages from = patch_images(images, patch, channels_inner);
  const int64_t kept = kept_patches(ids_any, from.batch, from.layout, images), features = patch_features(from.layout);
  GatherPatches of{patch_source(images, from), from.batch, kept, nullptr};
  Tensor ids;
  if (ids_any.has_value()) {
    ids = as_contiguous(*ids_any);
    of.ids = const_data<int64_t>(ids);
    rows_of_patches(of.ids, from.batch, kept, patch_count(from.layout));
  }
  Tensor rows = allocate(images, {from.batch, kept, features}, dtype);
  if (rows.numel() == 0) return rows;
  advise_huge_pages(rows.mutable_data_ptr(), rows.numel() * static_cast<int64_t>(rows.element_size()));
  const Parallel parallel = torch_parallel();
  dispatch_rows(images, rows, [&](auto accumulator, auto element) {
    using A = decltype(accumulator);
    using T = decltype(element);
    std::vector<A> buffers(sizeof(A) == sizeof(T) ? 0 : static_cast<size_t>(parallel.threads * features));
    SSLFAST_CALL(gather_patches, parallel, of, pixel_scale_of<A>(mean, std, from.layout, images.scalar_type()),
                 buffers.data(), mutable_data<T>(rows));
  });
  return rows;
}

Tensor scatter_patches_cpu(const Tensor& patches_any, const MaybeTensor& ids_any, const std::vector<int64_t>& size,
                           const std::vector<int64_t>& patch, const std::vector<double>& scale, bool channels_inner) {
  SSLFAST_CHECK(size.size() == 4, "size must be (C, T, H, W), got ", size.size(), " sides");
  SSLFAST_CHECK(patches_any.dim() == 3, "patches must be three-dimensional, got ", patches_any.dim(), " dimensions");
  const int64_t sides[4] = {size[0], size[1], size[2], size[3]};
  const PatchLayout layout = patch_layout(sides, patch, channels_inner);
  const int64_t batch = patches_any.size(0), kept = kept_patches(ids_any, batch, layout, patches_any);
  check_tensor(patches_any, "patches", {batch, kept, patch_features(layout)}, patches_any.scalar_type(), patches_any);
  const Tensor patches = as_contiguous(patches_any);
  ScatterPatches of{layout, batch, kept, nullptr};
  std::vector<int32_t> rows;
  if (ids_any.has_value()) {
    const Tensor ids = as_contiguous(*ids_any);
    rows = rows_of_patches(const_data<int64_t>(ids), batch, kept, patch_count(layout));
    of.rows = rows.data();
  }
  Tensor images = allocate(patches, {batch, size[0], size[1], size[2], size[3]});
  if (images.numel() == 0) return images;
  advise_huge_pages(images.mutable_data_ptr(), images.numel() * static_cast<int64_t>(images.element_size()));
  const Parallel parallel = torch_parallel();
  dispatch_float(patches, "patches", [&](auto element) {
    using T = decltype(element);
    SSLFAST_CALL(scatter_patches, parallel, of, patch_factors<Accumulator<T>>(scale, layout), const_data<T>(patches),
                 mutable_data<T>(images));
  });
  return images;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, gather_patches, scatter_patches)
#endif  // SSLFAST_CPU_DISPATCH
