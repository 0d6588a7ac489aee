// NT-Xent on the CPU, without the 2N × 2N matrix. The mathematics is in docs/nt_xent.md; in short, with ẑ the
// normalised rows of [z0; z1] and x_ij = ẑ_i·ẑ_j·log2(e)/τ:
//
//   forward   loss = (ln 2 / 2N) Σ_i ( max_i + log2 sum_i − x_ip ),   sum_i = Σ_{j≠i} 2^(x_ij − max_i)
//   backward  W_ij = (g/2N)( P_ij + P_ji − 2·[j = p(i)] ),  P_ij = 2^(x_ij − max_i)/sum_i,   dẑ = W ẑ / τ
//             dτ = −(1/2τ) Σ_i ẑ_i·dẑ_i   (the loss depends on ẑ ẑᵀ/τ alone: Euler's relation for degree 2)
//
// x is symmetric, so a tile x_IJ serves rows I and, transposed, rows J: half the products forward (½U of U =
// 2·(2N)²·D), half of them again backward, and W ẑ in full: 2U in all. Tiles that fit the cache from the forward are
// not recomputed.
#include "nt_xent.h"

#include <cmath>

#include "cpu/engine/self_similarity.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// NT-Xent as rows against themselves, each leaving itself out, with the other view as its positive.
template <typename T>
struct NtXent {
  int64_t rows;
  int64_t* positives;
  T *positive, *grad_row, *grad_positive;  // [rows]
  SelfInput input;
  SelfSaved saved;
  SelfSimilarity<T> similarity;

  NtXent(const NtXentInput& in, const NtXentSaved& kept, bool backward, int64_t threads, Arena& arena)
      : rows(2 * in.n),
        positives(arena.take<int64_t>(rows)),
        positive(arena.take<T>(rows)),
        grad_row(arena.take<T>(rows)),
        grad_positive(arena.take<T>(rows)),
        input{{in.z0, in.z1, in.n}, rows, in.d, 1 / in.temperature, in.normalize, true, nullptr, positives},
        saved{kept.inv_norm, kept.row_max, kept.row_sum, kept.tiles, kept.tiles_size},
        similarity(input, saved, backward, threads, arena) {}
  NtXent(const NtXent&) = delete;

  void set_positives() {
    for (int64_t row = 0; row < rows; ++row) positives[row] = row < rows / 2 ? row + rows / 2 : row - rows / 2;
  }
};

template <typename T>
double forward(const NtXentInput& input, const NtXentSaved& saved, void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  NtXent<T> task(input, saved, false, parallel.threads, arena);
  task.set_positives();
  task.similarity.forward(parallel, task.positive, nullptr);
  if (!input.normalize)
    for (int64_t row = 0; row < task.rows; ++row) task.similarity.inv_norm[row] = 1;
  double total = 0;
  for (int64_t row = 0; row < task.rows; ++row) {
    const T max = task.similarity.row_max[row];
    // With an infinite maximum the log-softmax is ∞ − ∞, NaN, and so are the gradients; the log-sum-exp alone is not.
    if (max - max != 0) task.similarity.row_sum[row] = max - max;
    total += (static_cast<double>(max) - static_cast<double>(task.positive[row])) +
             std::log2(static_cast<double>(task.similarity.row_sum[row]));
  }
  return kLn2 * total / static_cast<double>(task.rows);
}

template <typename T>
void backward(const NtXentInput& input, const NtXentSaved& saved, NtXentGradient& gradient, void* memory,
              const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  NtXent<T> task(input, saved, true, parallel.threads, arena);
  task.set_positives();
  const T weight = static_cast<T>(gradient.grad_loss / static_cast<double>(task.rows));
  for (int64_t row = 0; row < task.rows; ++row) {
    task.grad_row[row] = weight;
    task.grad_positive[row] = -weight;
  }
  const RowTarget dz{gradient.dz0, gradient.dz1, input.n, input.z0.type};
  const double dscale = task.similarity.backward(parallel, task.grad_row, task.grad_positive, dz);
  gradient.dtemperature = -dscale / (input.temperature * input.temperature);
}

template <typename T>
int64_t workspace(const NtXentInput& input, int64_t tiles_size, bool backward, int64_t threads) {
  Arena arena{nullptr};
  const NtXentSaved saved{nullptr, nullptr, nullptr, nullptr, tiles_size};
  const NtXent<T> task(input, saved, backward, threads, arena);
  return arena.bytes;
}

}  // namespace

int64_t nt_xent_workspace(const NtXentInput& input, int64_t tiles_size, bool backward, int64_t threads) {
  return with_accumulator(input.z0.type,
                          [&](auto t) { return workspace<decltype(t)>(input, tiles_size, backward, threads); });
}

double nt_xent_forward(const NtXentInput& input, const NtXentSaved& saved, void* memory, const Parallel& parallel) {
  return with_accumulator(input.z0.type, [&](auto t) { return forward<decltype(t)>(input, saved, memory, parallel); });
}

void nt_xent_backward(const NtXentInput& input, const NtXentSaved& saved, NtXentGradient& gradient, void* memory,
                      const Parallel& parallel) {
  with_accumulator(input.z0.type, [&](auto t) { backward<decltype(t)>(input, saved, gradient, memory, parallel); });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

NtXentInput input_of(const Tensor& z0, const Tensor& z1, const Tensor& temperature, bool normalize) {
  SSLFAST_CHECK(z0.dim() == 2 && z1.dim() == 2 && z0.size(0) == z1.size(0) && z0.size(1) == z1.size(1) &&
                    z0.scalar_type() == z1.scalar_type(),
                "z0 and z1 must be two-dimensional with the same shape and dtype");
  SSLFAST_CHECK(z0.size(0) > 0 && z0.size(1) > 0, "z0 must have at least one row and one feature");
  SSLFAST_CHECK(temperature.numel() == 1 && temperature.scalar_type() == accumulator_type(z0),
                "temperature must be one number in the accumulator's dtype");
  const ElementType type = element_type(z0, "z0");
  return {
      {z0.const_data_ptr(), type}, {z1.const_data_ptr(), type}, z0.size(0), z0.size(1), scalar(temperature), normalize};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nt_xent_cpu(const Tensor& z0_any, const Tensor& z1_any,
                                                               const Tensor& temperature, bool normalize,
                                                               int64_t tile_cache) {
  const Tensor z0 = as_contiguous(z0_any), z1 = as_contiguous(z1_any);
  const NtXentInput input = input_of(z0, z1, temperature, normalize);
  const ScalarType kind = accumulator_type(z0);
  Tensor loss = allocate(z0, {}, kind);
  Tensor inv_norm = allocate(z0, {2 * input.n}, kind);
  Tensor row_max = allocate(z0, {2 * input.n}, kind);
  Tensor row_sum = allocate(z0, {2 * input.n}, kind);
  Tensor tiles = tile_cache_of(z0, tile_cache, kind);
  const NtXentSaved saved{inv_norm.mutable_data_ptr(), row_max.mutable_data_ptr(), row_sum.mutable_data_ptr(),
                          tiles.mutable_data_ptr(), tile_cache};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(z0, SSLFAST_CALL(nt_xent_workspace, input, tile_cache, false, parallel.threads));
  set_scalar(loss, SSLFAST_CALL(nt_xent_forward, input, saved, aligned(memory), parallel));
  return {loss, inv_norm, row_max, row_sum, tiles};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward_cpu(const Tensor& grad_loss, const Tensor& z0_any,
                                                        const Tensor& z1_any, const Tensor& temperature,
                                                        const Tensor& inv_norm, const Tensor& row_max,
                                                        const Tensor& row_sum, const Tensor& tiles, bool normalize) {
  const Tensor z0 = as_contiguous(z0_any), z1 = as_contiguous(z1_any);
  const NtXentInput input = input_of(z0, z1, temperature, normalize);
  const ScalarType kind = accumulator_type(z0);
  check_tensor(grad_loss, "grad_loss", {}, kind, z0);
  check_tensor(inv_norm, "inv_norm", {2 * input.n}, kind, z0);
  check_tensor(row_max, "row_max", {2 * input.n}, kind, z0);
  check_tensor(row_sum, "row_sum", {2 * input.n}, kind, z0);
  check_tensor(tiles, "tiles", {tiles.numel()}, kind, z0);
  SSLFAST_CHECK(inv_norm.is_contiguous() && row_max.is_contiguous() && row_sum.is_contiguous() && tiles.is_contiguous(),
                "inv_norm, row_max, row_sum and tiles must be as nt_xent returned them");
  Tensor dz0 = allocate(z0, {input.n, input.d}), dz1 = allocate(z0, {input.n, input.d});
  Tensor dtemperature = torch::stable::empty_like(temperature);
  const NtXentSaved saved{read_only(inv_norm), read_only(row_max), read_only(row_sum), read_only(tiles), tiles.numel()};
  NtXentGradient gradient{scalar(grad_loss), dz0.mutable_data_ptr(), dz1.mutable_data_ptr(), 0};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(z0, SSLFAST_CALL(nt_xent_workspace, input, tiles.numel(), true, parallel.threads));
  SSLFAST_CALL(nt_xent_backward, input, saved, gradient, aligned(memory), parallel);
  set_scalar(dtemperature, gradient.dtemperature);
  return {dz0, dz1, dtemperature};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, nt_xent, nt_xent_backward)
#endif  // SSLFAST_CPU_DISPATCH
