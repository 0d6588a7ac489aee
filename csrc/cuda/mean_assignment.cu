// The weighted sum of rows' softmaxes over prototypes on the GPU, and each row's cross entropy against a target and
// entropy. Memory traffic is the bound. Forward, a block of threads has a row, which it reads for its log-sum-exp and
// again, from the cache, for the two numbers; then blocks have tiles of columns for a piece of the rows, and the pieces
// are added up in their order. Backward, a block has a row: it reads it for <p, v> and again to write the gradient.
#include "checks/mean_assignment.h"

#include <tuple>

#include "column_tiles.h"

namespace sslfast {
namespace {

// As on the CPU (csrc/cpu/mean_assignment.h).
template <typename T>
struct AssignedRows {
  using A = Accumulator<T>;
  int64_t batch, prototypes, target_rows;
  const int64_t* counted;
  A factor;
  const T* logits;
  const A *targets, *weights;

  __device__ int64_t rows() const { return rows_counted(counted, batch); }
  __device__ A y(int64_t b, int64_t k, A base) const { return A(widen(logits[b * prototypes + k])) * factor - base; }
  __device__ A weight(int64_t b) const { return weights ? weights[b] : A(1); }
  __device__ const A* target(int64_t b) const { return targets + b % target_rows * prototypes; }
};

template <typename A>
__device__ A logarithm_of(A y, A log_sum) {
  const A log_p = y - log_sum;
  return log_p < A(kLeastLogarithm) ? A(kLeastLogarithm) : log_p;
}

template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    row_kernel(AssignedRows<T> x, Accumulator<T>* __restrict__ cross_entropy, Accumulator<T>* __restrict__ entropy,
               AssignmentStats<Accumulator<T>>* __restrict__ stats) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x;
  AssignmentStats<A> of = {};
  A cross = 0;
  if (b < x.rows()) {
    of.base = base_of(threadIdx.x < x.prototypes ? x.y(b, threadIdx.x, A(0)) : A(-3.0e38));
    OnlineSum<A> sum = nothing_summed<A>();
    for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) sum = with_number(sum, x.y(b, k, of.base));
    sum = block_merged(sum);
    of.log_sum = sum.largest + binary_logarithm(sum.sum);
    A own = 0, mass = 0;
    for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) {
      const A y = x.y(b, k, of.base), log_p = logarithm_of(y, of.log_sum);
      own -= power_of_two(log_p) * log_p;
      if (!x.targets) continue;
      const A t = x.target(b)[k];
      mass += t;
      cross += t * y;
    }
    of.entropy = block_sum(own) * A(kLn2);
    if (x.targets) {
      of.mass = block_sum(mass);
      cross = (of.mass * of.log_sum - block_sum(cross)) * A(kLn2);
    }
  }
  if (threadIdx.x != 0) return;
  stats[b] = of;
  entropy[b] = of.entropy;
  cross_entropy[b] = cross;
}

// Blocks (tile of columns, piece of the rows).
template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    columns_kernel(AssignedRows<T> x, const AssignmentStats<Accumulator<T>>* __restrict__ stats,
                   Accumulator<T>* __restrict__ partial) {
  using A = Accumulator<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kTileColumns + lane, piece = blockIdx.y, rows = x.rows();
  const int64_t end = (piece + 1) * rows / gridDim.y;
  A sum = 0;
  for (int64_t b = piece * rows / gridDim.y + warp; k < x.prototypes && b < end; b += kTileWarps) {
    sum += x.weight(b) * power_of_two(x.y(b, k, stats[b].base) - stats[b].log_sum);
  }
  sum = over_warps(sum, [](A a, A b) { return a + b; });
  if (warp == 0 && k < x.prototypes) partial[piece * x.prototypes + k] = sum;
}

template <typename A>
__global__ void pieces_kernel(int64_t prototypes, int64_t pieces, const A* __restrict__ partial, A* __restrict__ sums) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kRowBlock + threadIdx.x;
  if (k >= prototypes) return;
  A sum = partial[k];
  for (int64_t p = 1; p < pieces; ++p) sum += partial[p * prototypes + k];
  sums[k] = sum;
}

// Gradients that are there.
template <typename A>
struct AssignmentGrads {
  const A *sums, *cross_entropy, *entropy;
};

template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    gradient_kernel(AssignedRows<T> x, AssignmentGrads<Accumulator<T>> grads,
                    const AssignmentStats<Accumulator<T>>* __restrict__ stats, T* __restrict__ dlogits) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x;
  T* out = dlogits + b * x.prototypes;
  if (b >= x.rows()) {
    for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) narrow(A(0), &out[k]);
    return;
  }
  const AssignmentStats<A> of = stats[b];
  A dot = 0;
  if (grads.sums) {
    for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) {
      dot += power_of_two(x.y(b, k, of.base) - of.log_sum) * grads.sums[k];
    }
    dot = block_sum(dot);
  }
  const bool targets = x.targets && grads.cross_entropy;
  const A g = targets ? grads.cross_entropy[b] : A(0), h = grads.entropy ? grads.entropy[b] : A(0);
  const auto gradient = AssignmentGradient<A>::of(of, g, h, grads.sums ? x.weight(b) : A(0), dot, x.factor * A(kLn2));
  for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) {
    const A log_p = logarithm_of(x.y(b, k, of.base), of.log_sum);
    const A v = grads.sums ? grads.sums[k] : A(0), t = targets ? x.target(b)[k] : A(0);
    narrow(AssignmentGradient<A>::at(gradient, power_of_two(log_p), log_p, v, t), &out[k]);
  }
}

// Checked arguments, and memory that they point into.
struct Arguments {
  Tensor logits;
  std::optional<Tensor> targets, weights;
  const std::optional<Tensor>& rows;
  double temperature;

  Arguments(const Tensor& given, const std::optional<Tensor>& targets_any, const std::optional<Tensor>& weights_any,
            double temperature_any, const std::optional<Tensor>& rows_any)
      : logits(
            (check_mean_assignment(given, targets_any, weights_any, temperature_any, rows_any), as_contiguous(given))),
        rows(rows_any),
        temperature(temperature_any) {
    if (targets_any) targets = as_contiguous(*targets_any);
    if (weights_any) weights = as_contiguous(*weights_any);
    SSLFAST_CHECK(logits.size(0) < (int64_t{1} << 31), "logits must have fewer than 2^31 rows");
    SSLFAST_CHECK(tiles() < (int64_t{1} << 31), "logits must have fewer than 2^36 prototypes");
  }

  int64_t tiles() const { return (logits.size(1) + kTileColumns - 1) / kTileColumns; }
  unsigned batch() const { return static_cast<unsigned>(logits.size(0)); }

  template <typename T>
  AssignedRows<T> as() const {
    using A = Accumulator<T>;
    return {logits.size(0),
            logits.size(1),
            targets ? targets->size(0) : 1,
            rows ? const_data<int64_t>(*rows) : nullptr,
            A(kLog2E / temperature),
            const_data<T>(logits),
            targets ? const_data<A>(*targets) : nullptr,
            weights ? const_data<A>(*weights) : nullptr};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> mean_assignment_cuda(const Tensor& logits,
                                                                const std::optional<Tensor>& targets,
                                                                const std::optional<Tensor>& weights,
                                                                double temperature, const std::optional<Tensor>& rows) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Arguments arguments(logits, targets, weights, temperature, rows);
  const ScalarType type = accumulator_type(logits);
  const int64_t batch = logits.size(0), prototypes = logits.size(1), pieces = row_pieces(batch, arguments.tiles());
  Tensor sums = allocate(logits, {prototypes}, type), partial = allocate(logits, {pieces, prototypes}, type);
  Tensor cross_entropy = allocate(logits, {batch}, type), entropy = allocate(logits, {batch}, type);
  Tensor stats = allocate(logits, {batch, kAssignmentStats}, type);
  if (prototypes == 0) return {sums, cross_entropy, entropy, stats};
  const cudaStream_t stream = current_stream(logits);
  dispatch_float(logits, "logits", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const AssignedRows<T> x = arguments.as<T>();
    auto* of_row = static_cast<AssignmentStats<A>*>(stats.mutable_data_ptr());
    if (batch > 0) {
      row_kernel<T><<<arguments.batch(), kRowBlock, 0, stream>>>(x, mutable_data<A>(cross_entropy),
                                                                 mutable_data<A>(entropy), of_row);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const dim3 grid(static_cast<unsigned>(arguments.tiles()), static_cast<unsigned>(pieces));
    columns_kernel<T><<<grid, kRowBlock, 0, stream>>>(x, of_row, mutable_data<A>(partial));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    pieces_kernel<A><<<static_cast<unsigned>((prototypes + kRowBlock - 1) / kRowBlock), kRowBlock, 0, stream>>>(
        prototypes, pieces, const_data<A>(partial), mutable_data<A>(sums));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {sums, cross_entropy, entropy, stats};
}

Tensor mean_assignment_backward_cuda(const std::optional<Tensor>& grad_sums,
                                     const std::optional<Tensor>& grad_cross_entropy,
                                     const std::optional<Tensor>& grad_entropy, const Tensor& logits,
                                     const std::optional<Tensor>& targets, const std::optional<Tensor>& weights,
                                     const Tensor& stats_any, double temperature, const std::optional<Tensor>& rows) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Arguments arguments(logits, targets, weights, temperature, rows);
  check_assignment_gradients(grad_sums, grad_cross_entropy, grad_entropy, stats_any, logits);
  const Tensor stats = as_contiguous(stats_any);
  const auto contiguous = [](const std::optional<Tensor>& x) {
    return x ? std::optional<Tensor>(as_contiguous(*x)) : std::nullopt;
  };
  const std::optional<Tensor> of_sums = contiguous(grad_sums), of_cross = contiguous(grad_cross_entropy);
  const std::optional<Tensor> of_entropy = contiguous(grad_entropy);
  Tensor out = allocate(logits, {logits.size(0), logits.size(1)});
  if (out.numel() == 0) return out;
  const cudaStream_t stream = current_stream(logits);
  dispatch_float(logits, "logits", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const AssignmentGrads<A> grads = {of_sums ? const_data<A>(*of_sums) : nullptr,
                                      of_cross ? const_data<A>(*of_cross) : nullptr,
                                      of_entropy ? const_data<A>(*of_entropy) : nullptr};
    gradient_kernel<T><<<arguments.batch(), kRowBlock, 0, stream>>>(
        arguments.as<T>(), grads, static_cast<const AssignmentStats<A>*>(stats.const_data_ptr()), mutable_data<T>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, mean_assignment, mean_assignment_backward)
