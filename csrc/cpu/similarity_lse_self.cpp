// Log-sum-exp of rows against themselves on the CPU; the mathematics is in self_similarity.h.
#include "cpu/engine/self_similarity.h"

#include <cmath>

namespace sslfast {

// Null where not wanted; natural logarithms; float, or double for double rows.
struct SelfOutput {
  void *row_lse, *positive, *hardest;
};

// Gradients of the outputs, null for none.
struct SelfGiven {
  const void *row, *positive;
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t similarity_lse_self_workspace(const SelfInput& input, int64_t tiles_size, bool backward,
                                                      int64_t threads))
SSLFAST_DECLARE(void similarity_lse_self_forward(const SelfInput& input, const SelfSaved& saved,
                                                 const SelfOutput& output, void* workspace, const Parallel& parallel))
// Fills dz [m, d] and returns dscale.
SSLFAST_DECLARE(double similarity_lse_self_backward(const SelfInput& input, const SelfSaved& saved,
                                                    const SelfGiven& given, void* dz, void* workspace,
                                                    const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
int64_t workspace(const SelfInput& input, int64_t tiles_size, bool backward, int64_t threads) {
  Arena arena{nullptr};
  const SelfSaved saved{nullptr, nullptr, nullptr, nullptr, tiles_size};
  const SelfSimilarity<T> task(input, saved, backward, threads, arena);
  return arena.bytes;
}

template <typename T>
void forward(const SelfInput& input, const SelfSaved& saved, const SelfOutput& output, void* memory,
             const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  SelfSimilarity<T> task(input, saved, false, parallel.threads, arena);
  T *positive = static_cast<T*>(output.positive), *hardest = static_cast<T*>(output.hardest);
  task.forward(parallel, positive, hardest);
  natural_lse(task.row_max, task.row_sum, input.m, static_cast<T*>(output.row_lse));
  natural_logits(positive, input.m, false);
  natural_logits(hardest, input.m, task.bounded);
}

template <typename T>
double backward(const SelfInput& input, const SelfSaved& saved, const SelfGiven& given, void* dz, void* memory,
                const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  SelfSimilarity<T> task(input, saved, true, parallel.threads, arena);
  const ElementType type = input.rows.first.type == ElementType::f64 ? ElementType::f64 : ElementType::f32;
  return task.backward(parallel, static_cast<const T*>(given.row), static_cast<const T*>(given.positive),
                       {dz, dz, input.m, type});
}

}  // namespace

int64_t similarity_lse_self_workspace(const SelfInput& input, int64_t tiles_size, bool backward, int64_t threads) {
  return with_accumulator(input.rows.first.type,
                          [&](auto t) { return workspace<decltype(t)>(input, tiles_size, backward, threads); });
}

void similarity_lse_self_forward(const SelfInput& input, const SelfSaved& saved, const SelfOutput& output, void* memory,
                                 const Parallel& parallel) {
  with_accumulator(input.rows.first.type,
                   [&](auto t) { forward<decltype(t)>(input, saved, output, memory, parallel); });
}

double similarity_lse_self_backward(const SelfInput& input, const SelfSaved& saved, const SelfGiven& given, void* dz,
                                    void* memory, const Parallel& parallel) {
  return with_accumulator(input.rows.first.type,
                          [&](auto t) { return backward<decltype(t)>(input, saved, given, dz, memory, parallel); });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

SelfInput input_of(const Tensor& z, const Tensor& scale, const MaybeTensor& ids, const MaybeTensor& positives) {
  SSLFAST_CHECK(z.dim() == 2 && z.size(0) > 0 && z.size(1) > 0, "z must be two-dimensional with rows and features");
  check_tensor(scale, "scale", {}, accumulator_type(z), z);
  check_optional(ids, "ids", z.size(0), ScalarType::Long, z);
  check_optional(positives, "positives", z.size(0), ScalarType::Long, z);
  const Rows rows{z.const_data_ptr(), element_type(z, "z")};
  return {{rows, rows, z.size(0)},
          z.size(0),
          z.size(1),
          scalar(scale),
          false,
          false,
          static_cast<const int64_t*>(data_or_null(ids)),
          static_cast<const int64_t*>(data_or_null(positives))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> similarity_lse_self_cpu(const Tensor& z_any,
                                                                                   const Tensor& scale,
                                                                                   const MaybeTensor& ids_any,
                                                                                   const MaybeTensor& positives_any,
                                                                                   bool hardest, int64_t tile_cache) {
  const Tensor z = as_contiguous(z_any);
  const MaybeTensor ids = contiguous_or_none(ids_any), positives = contiguous_or_none(positives_any);
  const SelfInput input = input_of(z, scale, ids, positives);
  const ScalarType kind = accumulator_type(z);
  auto vector = [&](int64_t length) { return allocate(z, {length}, kind); };
  Tensor row_lse = vector(input.m), positive = vector(positives.has_value() ? input.m : 0);
  Tensor negative = vector(hardest ? input.m : 0), row_max = vector(input.m), row_sum = vector(input.m);
  Tensor tiles = tile_cache_of(z, tile_cache, kind);
  const SelfSaved saved{nullptr, data_or_null(row_max), data_or_null(row_sum), data_or_null(tiles), tile_cache};
  const SelfOutput output{data_or_null(row_lse), data_or_null(positive), data_or_null(negative)};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(z, SSLFAST_CALL(similarity_lse_self_workspace, input, tile_cache, false, parallel.threads));
  SSLFAST_CALL(similarity_lse_self_forward, input, saved, output, aligned(memory), parallel);
  return {row_lse, positive, negative, row_max, row_sum, tiles};
}

std::tuple<Tensor, Tensor> similarity_lse_self_backward_cpu(const MaybeTensor& grad_row_any,
                                                            const MaybeTensor& grad_positive_any, const Tensor& z_any,
                                                            const Tensor& scale, const MaybeTensor& ids_any,
                                                            const MaybeTensor& positives_any, const Tensor& row_max,
                                                            const Tensor& row_sum, const Tensor& tiles) {
  const Tensor z = as_contiguous(z_any);
  const MaybeTensor ids = contiguous_or_none(ids_any), positives = contiguous_or_none(positives_any);
  const MaybeTensor grad_row = contiguous_or_none(grad_row_any);
  const MaybeTensor grad_positive = contiguous_or_none(grad_positive_any);
  const SelfInput input = input_of(z, scale, ids, positives);
  const ScalarType kind = accumulator_type(z);
  check_optional(grad_row, "grad_row", input.m, kind, z);
  check_optional(grad_positive, "grad_positive", input.m, kind, z);
  check_tensor(row_max, "row_max", {input.m}, kind, z);
  check_tensor(row_sum, "row_sum", {input.m}, kind, z);
  check_tensor(tiles, "tiles", {tiles.numel()}, kind, z);
  SSLFAST_CHECK(row_max.is_contiguous() && row_sum.is_contiguous() && tiles.is_contiguous(),
                "row_max, row_sum and tiles must be as similarity_lse_self returned them");
  Tensor dz = allocate(z, {input.m, input.d}, kind);
  Tensor dscale = allocate(z, {}, kind);
  const SelfSaved saved{nullptr, read_only(row_max), read_only(row_sum), read_only(tiles), tiles.numel()};
  const SelfGiven given{data_or_null(grad_row), data_or_null(grad_positive)};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(z, SSLFAST_CALL(similarity_lse_self_workspace, input, tiles.numel(), true, parallel.threads));
  set_scalar(dscale, SSLFAST_CALL(similarity_lse_self_backward, input, saved, given, dz.mutable_data_ptr(),
                                  aligned(memory), parallel));
  return {dz, dscale};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, similarity_lse_self, similarity_lse_self_backward)
#endif  // SSLFAST_CPU_DISPATCH
