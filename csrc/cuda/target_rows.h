// A block of threads a row of predictions: its target is made in shared memory, normalised there and compared. Sums go
// to a number a row. These are added up by stretches of rows, and the stretches by one block, in an order that follows
// from the number of rows alone, so that the same bits come out every time.
#pragma once
#include <algorithm>

#include "common/patch_target.h"

namespace sslfast {
namespace {

constexpr int kWarp = 32;
// Threads of a row, and of a stretch of rows that are added up; its rows at least, and stretches at most.
constexpr int kRowBlock = 128, kMeanBlock = 256;
constexpr int64_t kStretch = kMeanBlock, kMostStretches = 4 * kMeanBlock;

// Predictions: row r is the image r / per_image; its elements lie side by side.
struct PredictedRows {
  const void* data;
  int64_t rows, per_image;
  int width;
  int64_t image_stride, row_stride;
};

template <typename T>
__device__ const T* row_of(const PredictedRows& pred, int64_t r) {
  return static_cast<const T*>(pred.data) + r / pred.per_image * pred.image_stride +
         r % pred.per_image * pred.row_stride;
}

// Σ over the threads of a block; every thread gets the same bits.
template <int kThreads, typename A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A of_warp[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (int w = 1; w < kThreads / kWarp; ++w) value += of_warp[w];
  return value;
}

// Numbers of a row that are normalised together: member c of place i is x[i · step + c · apart]. A thread has the
// places i = its number, + kRowBlock, ..., which it wrote itself, so nobody waits.
template <typename A>
struct Group {
  A* x;
  int places, step, members, apart;
  __device__ A count() const { return A(places) * A(members); }
  template <typename F>
  __device__ void each(F f) const {
    for (int i = threadIdx.x; i < places; i += kRowBlock) {
      for (int c = 0; c < members; ++c) f(x[i * step + c * apart]);
    }
  }
};

// x ← (x − mean) · factor, in the steps of the CPU's.
template <typename A>
__device__ __forceinline__ void standardise(const Group<A>& group, A eps, int kind) {
  A sum = 0, differences = 0, squares = 0;
  group.each([&](A x) { sum += x; });
  const A mean = block_sum<kRowBlock>(sum) / group.count();
  group.each([&](A x) { differences += x - mean; });
  const A rest = block_sum<kRowBlock>(differences) / group.count();
  group.each([&](A x) {
    const A d = (x - mean) - rest;
    squares += d * d;
  });
  const A factor = target_factor(block_sum<kRowBlock>(squares), group.count(), eps, kind);
  group.each([&](A& x) { x = ((x - mean) - rest) * factor; });
}

template <typename A>
__device__ A loss_of(int kind, A d, A beta) {
  return kind == kSquared ? point_loss<kSquared>(d, beta)
                          : (kind == kAbsolute ? point_loss<kAbsolute>(d, beta) : point_loss<kSmooth>(d, beta));
}
template <typename A>
__device__ A slope_of(int kind, A d, A beta) {
  return kind == kSquared ? point_slope<kSquared>(d, beta)
                          : (kind == kAbsolute ? point_slope<kAbsolute>(d, beta) : point_slope<kSmooth>(d, beta));
}

// `Source` has counts(r), whether row r takes part; bad(r), whether its id is none; and fill(r, target).
template <typename T, typename Source>
__global__ void __launch_bounds__(kRowBlock)
    loss_kernel(Source source, PredictedRows pred, PointLoss loss, Accumulator<T>* __restrict__ of_row,
                unsigned* __restrict__ done) {
  using A = Accumulator<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* target = reinterpret_cast<A*>(shared);
  const int64_t r = blockIdx.x;
  A sum = 0;
  if (source.bad(r)) {
    sum = A(0) / A(0);
  } else if (source.counts(r)) {  // the whole block or none of it
    source.fill(r, target);
    __syncthreads();
    const T* row = row_of<T>(pred, r);
    for (int d = threadIdx.x; d < pred.width; d += kRowBlock) {
      sum += loss_of(loss.kind, A(widen(row[d])) - target[d], A(loss.beta));
    }
    sum = block_sum<kRowBlock>(sum);
  }
  if (threadIdx.x != 0) return;
  of_row[r] = sum;
  if (r == 0) *done = 0;  // for mean_kernel, which runs after this one
}

template <typename T, typename Source>
__global__ void __launch_bounds__(kRowBlock)
    gradient_kernel(Source source, PredictedRows pred, PointLoss loss, const Accumulator<T>* __restrict__ grad_loss,
                    const Accumulator<T>* __restrict__ count, T* __restrict__ dpred) {
  using A = Accumulator<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  A* target = reinterpret_cast<A*>(shared);
  const int64_t r = blockIdx.x;
  T* out = dpred + r * pred.width;
  if (source.bad(r) || !source.counts(r)) {
    const A value = source.bad(r) ? A(0) / A(0) : A(0);
    for (int d = threadIdx.x; d < pred.width; d += kRowBlock) narrow(value, &out[d]);
    return;
  }
  source.fill(r, target);
  __syncthreads();
  const A rows = count ? *count : A(pred.rows);
  const A scale = *grad_loss / (rows * A(pred.width));
  const T* row = row_of<T>(pred, r);
  for (int d = threadIdx.x; d < pred.width; d += kRowBlock) {
    narrow(scale * slope_of(loss.kind, A(widen(row[d])) - target[d], A(loss.beta)), &out[d]);
  }
}

struct RowSums {
  double loss, rows;
};

__device__ inline RowSums mean_block_sum(const RowSums& x) {
  return {block_sum<kMeanBlock>(x.loss), block_sum<kMeanBlock>(x.rows)};
}

// The mean of all rows that count (`mask`, or all), and their number; of none it is 0/0, NaN. A block sums a stretch of
// rows; the last one to be done, as `done` (0 before) tells it, adds up what all of them found.
template <typename A>
__global__ void __launch_bounds__(kMeanBlock)
    mean_kernel(const A* __restrict__ of_row, const uint8_t* __restrict__ mask, const PredictedRows pred,
                int64_t stretch, RowSums* sums, unsigned* done, A* __restrict__ loss, A* __restrict__ count) {
  const int64_t begin = blockIdx.x * stretch, end = begin + stretch < pred.rows ? begin + stretch : pred.rows;
  RowSums all{0, 0};
#pragma unroll 4
  for (int64_t r = begin + threadIdx.x; r < end; r += kMeanBlock) {
    all.loss += of_row[r];
    all.rows += mask && !mask[r] ? 0.0 : 1.0;
  }
  all = mean_block_sum(all);
  if (gridDim.x > 1) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
      sums[blockIdx.x] = all;
      __threadfence();
      last = atomicAdd(done, 1u) + 1 == gridDim.x;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    const volatile RowSums* found = sums;  // written by other blocks of this launch: not from a cache
    all = {0, 0};
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kMeanBlock) {
      all.loss += found[i].loss;
      all.rows += found[i].rows;
    }
    all = mean_block_sum(all);
  }
  if (threadIdx.x != 0) return;
  *loss = static_cast<A>(all.loss / (all.rows * pred.width));
  *count = static_cast<A>(all.rows);
}

// `x` [images, rows, width] with the elements of a row side by side: itself, or a copy.
inline Tensor with_rows(const Tensor& x, const char* name) {
  SSLFAST_CHECK(x.dim() == 3, name, " must have three dimensions, got ", x.dim());
  return x.stride(2) == 1 || x.size(2) == 1 ? x : as_contiguous(x);
}

constexpr int64_t kLargestRow = 46 << 10;  // bytes: with the sums, within what a block has without asking for more

inline PredictedRows rows_of(const Tensor& x) {
  const int64_t rows = x.size(0) * x.size(1), size = accumulator_type(x) == ScalarType::Double ? 8 : 4;
  SSLFAST_CHECK(rows < (int64_t{1} << 31), "pred must have fewer than 2^31 rows, got ", rows);
  SSLFAST_CHECK(x.size(2) * size <= kLargestRow, "pred's rows must have at most ", kLargestRow / size, " values, got ",
                x.size(2));
  return {x.const_data_ptr(), rows, x.size(1), static_cast<int>(x.size(2)), x.stride(0), x.stride(1)};
}

template <typename T, typename Source>
void launch_loss(const Source& source, const PredictedRows& pred, const PointLoss& point, const uint8_t* mask,
                 Tensor& loss, Tensor& count, cudaStream_t stream) {
  using A = Accumulator<T>;
  const int64_t stretch = std::max(kStretch, (pred.rows + kMostStretches - 1) / kMostStretches);
  const int64_t stretches = std::max<int64_t>((pred.rows + stretch - 1) / stretch, 1);
  Tensor of_row = allocate(loss, {pred.rows}), done = allocate(loss, {1}, ScalarType::Int);
  Tensor sums = allocate(loss, {stretches, 2}, ScalarType::Double);
  auto* finished = static_cast<unsigned*>(done.mutable_data_ptr());
  if (pred.rows > 0) {
    loss_kernel<T, Source><<<static_cast<unsigned>(pred.rows), kRowBlock, sizeof(A) * pred.width, stream>>>(
        source, pred, point, mutable_data<A>(of_row), finished);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  mean_kernel<A><<<static_cast<unsigned>(stretches), kMeanBlock, 0, stream>>>(
      const_data<A>(of_row), mask, pred, stretch, static_cast<RowSums*>(sums.mutable_data_ptr()), finished,
      mutable_data<A>(loss), mutable_data<A>(count));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T, typename Source>
void launch_gradient(const Source& source, const PredictedRows& pred, const PointLoss& point, const Tensor& grad_loss,
                     const Tensor* count, Tensor& dpred, cudaStream_t stream) {
  using A = Accumulator<T>;
  if (pred.rows == 0) return;
  gradient_kernel<T, Source><<<static_cast<unsigned>(pred.rows), kRowBlock, sizeof(A) * pred.width, stream>>>(
      source, pred, point, const_data<A>(grad_loss), count ? const_data<A>(*count) : nullptr, mutable_data<T>(dpred));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace sslfast
