// Sinkhorn–Knopp in the log domain on the GPU. All that is kept is a bias f [K]; an iteration makes the log-sum-exp of
// every row, and then adds every row's softmax to the column sums: a block of threads has a tile of columns for a piece
// of the rows, and the pieces are added up in their order, so that the same bits come out every time.
#include "checks/sinkhorn.h"

#include <tuple>

#include "column_tiles.h"

namespace sslfast {
namespace {

// Logits x [B, S, K]: B rows, of which *counted count, of each of S positions. In units of log 2,
// z_bk = log2(e)·x_bk/τ + f_k.
struct SinkhornRows {
  int64_t batch, positions, prototypes;
  const int64_t* counted;
  double factor;
  int64_t pieces, tiles;

  __device__ int64_t rows() const { return rows_counted(counted, batch); }
};

// log2 Σ_k 2^z of one row, by its block.
template <typename T, typename A = Accumulator<T>>
__device__ A row_lse(const SinkhornRows& size, const T* row, const A* bias) {
  OnlineSum<A> sum = nothing_summed<A>();
  for (int64_t k = threadIdx.x; k < size.prototypes; k += kRowBlock) {
    sum = with_number(sum, A(widen(row[k])) * A(size.factor) + bias[k]);
  }
  sum = block_merged(sum);
  return sum.largest + binary_logarithm(sum.sum);
}

template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    lse_kernel(SinkhornRows size, const T* __restrict__ x, const Accumulator<T>* __restrict__ bias,
               Accumulator<T>* __restrict__ lse) {
  const int64_t r = blockIdx.x;
  if (r / size.positions >= size.rows()) return;
  const auto value = row_lse(size, x + r * size.prototypes, bias + r % size.positions * size.prototypes);
  if (threadIdx.x == 0) lse[r] = value;
}

// Column sums of a piece of the rows: kFirst: of 2^z relative to the column's largest; else of softmax_k(z).
template <typename T, bool kFirst>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    columns_kernel(SinkhornRows size, const T* __restrict__ x, const Accumulator<T>* __restrict__ bias,
                   const Accumulator<T>* __restrict__ lse, OnlineSum<Accumulator<T>>* __restrict__ partial) {
  using A = Accumulator<T>;
  const int64_t position = blockIdx.x / size.tiles, piece = blockIdx.y;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t k = blockIdx.x % size.tiles * kTileColumns + lane;
  const int64_t rows = size.rows(), end = (piece + 1) * rows / size.pieces;
  OnlineSum<A> sum = nothing_summed<A>();
  if (k < size.prototypes) {
    const A f = kFirst ? A(0) : bias[position * size.prototypes + k];
    for (int64_t b = piece * rows / size.pieces + warp; b < end; b += kTileWarps) {
      const int64_t r = b * size.positions + position;
      const A z = A(widen(x[r * size.prototypes + k])) * A(size.factor);
      if constexpr (kFirst) {
        sum = with_number(sum, z);
      } else {
        sum.sum += power_of_two(z + f - lse[r]);
      }
    }
  }
  sum = over_warps(sum, [](const OnlineSum<A>& a, const OnlineSum<A>& b) {
    return kFirst ? merged(a, b) : OnlineSum<A>{a.largest, a.sum + b.sum};
  });
  if (warp != 0 || k >= size.prototypes) return;
  partial[(piece * size.positions + position) * size.prototypes + k] = sum;
}

// Adds up the pieces of a column: into the bias, or into `largest` and `sums` where these are given.
template <typename A>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    update_kernel(SinkhornRows size, bool first, const OnlineSum<A>* __restrict__ partial, A* __restrict__ bias,
                  A* __restrict__ largest, A* __restrict__ sums) {
  const int64_t columns = size.positions * size.prototypes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowBlock + threadIdx.x;
  if (i >= columns) return;
  OnlineSum<A> total = partial[i];
  for (int64_t p = 1; p < size.pieces; ++p) {
    const OnlineSum<A> part = partial[p * columns + i];
    if (first) {
      total = merged(total, part);
    } else {
      total.sum += part.sum;
    }
  }
  if (!first) total.largest = 0;
  if (sums) {
    largest[i] = total.largest * A(kLn2);
    sums[i] = total.sum;
    return;
  }
  const A before = first ? A(0) : bias[i];  // a prototype that no row reaches keeps it
  bias[i] = total.sum == 0 ? before : before - (total.largest + binary_logarithm(total.sum));
}

template <typename A>
__global__ void scale_kernel(int64_t count, A factor, const A* in, A* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowBlock + threadIdx.x;
  if (i < count) out[i] = in ? in[i] * factor : A(0);
}

template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    assign_kernel(SinkhornRows size, const T* __restrict__ x, const Accumulator<T>* __restrict__ bias,
                  Accumulator<T>* __restrict__ out) {
  using A = Accumulator<T>;
  const int64_t r = blockIdx.x;
  A* to = out + r * size.prototypes;
  if (r / size.positions >= size.rows()) {
    for (int64_t k = threadIdx.x; k < size.prototypes; k += kRowBlock) to[k] = 0;
    return;
  }
  const T* row = x + r * size.prototypes;
  const A* f = bias + r % size.positions * size.prototypes;
  const A lse = row_lse(size, row, f);
  for (int64_t k = threadIdx.x; k < size.prototypes; k += kRowBlock) {
    to[k] = power_of_two(A(widen(row[k])) * A(size.factor) + f[k] - lse);
  }
}

unsigned blocks_for(int64_t count) { return static_cast<unsigned>((count + kRowBlock - 1) / kRowBlock); }

// Checked arguments, and memory for the visits of one call.
struct Visits {
  Tensor x, bias, lse, partial;
  SinkhornRows size;
  cudaStream_t stream;

  Visits(const Tensor& logits, double temperature, const std::optional<Tensor>& rows)
      : x(as_contiguous(logits)), bias(x), lse(x), partial(x) {
    check_sinkhorn(logits, temperature, rows);
    size = {x.size(0), x.size(1), x.size(2), rows ? const_data<int64_t>(*rows) : nullptr, kLog2E / temperature, 1, 1};
    SSLFAST_CHECK(size.batch * size.positions < (int64_t{1} << 31), "logits must have fewer than 2^31 rows");
    size.tiles = (size.prototypes + kTileColumns - 1) / kTileColumns;
    const int64_t blocks = std::max<int64_t>(1, size.tiles * size.positions);
    SSLFAST_CHECK(blocks < (int64_t{1} << 31), "logits must have fewer columns at all positions together");
    size.pieces = row_pieces(size.batch, blocks);
    const ScalarType type = accumulator_type(x);
    bias = allocate(x, {size.positions, size.prototypes}, type);
    lse = allocate(x, {size.batch, size.positions}, type);
    partial = allocate(x, {size.pieces, size.positions, size.prototypes, 2}, type);
    stream = current_stream(x);
  }

  int64_t columns() const { return size.positions * size.prototypes; }
  unsigned rows() const { return static_cast<unsigned>(size.batch * size.positions); }

  template <typename A>
  void scale(const Tensor* from, double factor, Tensor& to) {
    scale_kernel<A><<<blocks_for(columns()), kRowBlock, 0, stream>>>(
        columns(), A(factor), from ? const_data<A>(*from) : nullptr, mutable_data<A>(to));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // One visit, into the bias, or into the two tensors.
  template <typename T>
  void visit(bool first, Tensor* largest = nullptr, Tensor* sums = nullptr) {
    using A = Accumulator<T>;
    const dim3 grid(static_cast<unsigned>(size.tiles * size.positions), static_cast<unsigned>(size.pieces));
    auto* parts = reinterpret_cast<OnlineSum<A>*>(mutable_data<A>(partial));
    if (first) {
      columns_kernel<T, true><<<grid, kRowBlock, 0, stream>>>(size, const_data<T>(x), nullptr, nullptr, parts);
    } else {
      if (rows() > 0) {
        lse_kernel<T>
            <<<rows(), kRowBlock, 0, stream>>>(size, const_data<T>(x), const_data<A>(bias), mutable_data<A>(lse));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      columns_kernel<T, false>
          <<<grid, kRowBlock, 0, stream>>>(size, const_data<T>(x), const_data<A>(bias), const_data<A>(lse), parts);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    update_kernel<A><<<blocks_for(columns()), kRowBlock, 0, stream>>>(size, first, parts, mutable_data<A>(bias),
                                                                      largest ? mutable_data<A>(*largest) : nullptr,
                                                                      sums ? mutable_data<A>(*sums) : nullptr);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

Tensor sinkhorn_bias_cuda(const Tensor& logits, double temperature, int64_t iterations, bool row_start,
                          const std::optional<Tensor>& rows) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Visits visits(logits, temperature, rows);
  Tensor out = allocate(visits.bias, {visits.size.positions, visits.size.prototypes});
  if (visits.columns() == 0) return out;
  dispatch_float(visits.x, "logits", [&](auto element) {
    using T = decltype(element);
    visits.template scale<Accumulator<T>>(nullptr, 1, visits.bias);
    for (int64_t i = 0; i < iterations; ++i) visits.template visit<T>(i == 0 && !row_start);
    visits.template scale<Accumulator<T>>(&visits.bias, kLn2, out);
  });
  return out;
}

std::tuple<Tensor, Tensor> sinkhorn_sums_cuda(const Tensor& logits, const std::optional<Tensor>& bias,
                                              double temperature, const std::optional<Tensor>& rows) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Visits visits(logits, temperature, rows);
  if (bias) check_sinkhorn_bias(*bias, logits);
  Tensor largest = allocate(visits.bias, {visits.size.positions, visits.size.prototypes});
  Tensor sums = allocate(visits.bias, {visits.size.positions, visits.size.prototypes});
  if (visits.columns() == 0) return {largest, sums};
  dispatch_float(visits.x, "logits", [&](auto element) {
    using T = decltype(element);
    const Tensor given = bias ? as_contiguous(*bias) : visits.bias;
    if (bias) visits.template scale<Accumulator<T>>(&given, kLog2E, visits.bias);
    visits.template visit<T>(!bias, &largest, &sums);
  });
  return {largest, sums};
}

Tensor sinkhorn_assign_cuda(const Tensor& logits, const Tensor& bias, double temperature,
                            const std::optional<Tensor>& rows) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Visits visits(logits, temperature, rows);
  check_sinkhorn_bias(bias, logits);
  const SinkhornRows& size = visits.size;
  Tensor out = allocate(visits.bias, {size.batch, size.positions, size.prototypes});
  if (out.numel() == 0) return out;
  dispatch_float(visits.x, "logits", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Tensor given = as_contiguous(bias);
    visits.template scale<A>(&given, kLog2E, visits.bias);
    assign_kernel<T><<<visits.rows(), kRowBlock, 0, visits.stream>>>(size, const_data<T>(visits.x),
                                                                     const_data<A>(visits.bias), mutable_data<A>(out));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, sinkhorn_bias, sinkhorn_sums, sinkhorn_assign)
