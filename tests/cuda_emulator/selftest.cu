// Small kernels that are right or wrong in one way each, for the tests of the emulator. A block is of kBlock threads.
#include <cuda_runtime.h>

#include "../torch_api.h"

namespace sslfast {
namespace {

constexpr int kBlock = 64, kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ int place() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void reversed(const float* x, float* out, int) {
  __shared__ float given[kBlock];
  given[threadIdx.x] = x[place()];
  __syncthreads();
  out[place()] = given[kBlock - 1 - threadIdx.x];
}

__global__ void reversed_in_dynamic(const float* x, float* out, int) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* given = reinterpret_cast<float*>(memory);
  given[threadIdx.x] = x[place()];
  __syncthreads();
  out[place()] = given[kBlock - 1 - threadIdx.x];
}

// All that lanes can exchange, in one number.
__global__ void exchanged(const float* x, float* out, int) {
  const int lane = threadIdx.x % kWarp;
  const float value = x[place()];
  float sum = __shfl_xor_sync(kAllLanes, value, 5) + 2 * __shfl_sync(kAllLanes, value, 7);
  sum += 4 * __shfl_up_sync(kAllLanes, value, 1) + 8 * __shfl_down_sync(kAllLanes, value, 2);
  sum += 16 * __popc(__ballot_sync(kAllLanes, value > 0));
  sum += __any_sync(kAllLanes, lane == 3) && !__all_sync(kAllLanes, lane == 3) ? 512 : 0;
  sum += 1024 * __syncthreads_count(value > 0);
  sum += __syncthreads_or(threadIdx.x == 9) && !__syncthreads_and(threadIdx.x == 9) ? 65536 : 0;
  out[place()] = sum;
}

// --------------------------------------------------------------------------------------- wrong, and seen without tools

__global__ void no_barrier(const float* x, float* out, int) {
  __shared__ float given[kBlock];
  given[threadIdx.x] = x[place()];
  out[place()] = given[kBlock - 1 - threadIdx.x];
}

// Only where one warp is at its second exchange before the other has read.
__global__ void written_again_too_soon(const float* x, float* out, int) {
  __shared__ float of_warp[kBlock / kWarp];
  const int warp = threadIdx.x / kWarp;
  float sum = 0;
  for (int i = 1; i <= 2; ++i) {
    const float first = __shfl_sync(kAllLanes, i * x[place()], 0);
    if (threadIdx.x % kWarp == 0) of_warp[warp] = first;
    __syncthreads();
    sum += of_warp[1 - warp];
  }
  out[place()] = sum;
}

__global__ void blocks_share_a_place(const float* x, float* out, int) {
  out[place()] = x[place()];
  out[0] = x[place()];
}

__global__ void unwritten_shared(const float*, float* out, int) {
  __shared__ float given[kBlock], unused;
  out[place()] = given[threadIdx.x] + unused;
}

__global__ void unwritten_dynamic(const float*, float* out, int) {
  extern __shared__ float given[];
  out[place()] = given[threadIdx.x];
}

__global__ void unwritten_result(const float* x, float* out, int n) {
  if (place() != n - 1) out[place()] = x[place()];
}

__global__ void barriers_apart(const float* x, float* out, int) {
  if (threadIdx.x < kWarp) {
    __syncthreads();
    out[place()] = x[place()];
  } else {
    __syncthreads();
    out[place()] = -x[place()];
  }
}

__global__ void thread_leaves(const float* x, float* out, int) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[place()] = x[place()];
}

__global__ void lane_leaves(const float* x, float* out, int) {
  if (threadIdx.x == 5) return;
  out[place()] = __shfl_xor_sync(kAllLanes, x[place()], 1);
}

__global__ void warp_waits_for_block(const float* x, float* out, int) {
  if (threadIdx.x % kWarp < 7) __syncwarp();
  __syncthreads();
  out[place()] = x[place()];
}

__global__ void part_of_a_warp(const float* x, float* out, int) {
  out[place()] = __shfl_xor_sync(0xffu, x[place()], 1);
}

__global__ void too_much_shared(const float* x, float* out, int) {
  __shared__ float many[(48 << 10) / sizeof(float)];
  many[threadIdx.x] = x[place()];
  out[place()] = many[threadIdx.x];
}

__global__ void no_blocks(const float*, float*, int) {}

// -------------------------------------------------------------------------------------- wrong, and seen by a sanitizer

__global__ void past_the_end(const float* x, float* out, int) { out[place()] = x[place() + 1]; }

__global__ void past_shared(const float* x, float* out, int) {
  __shared__ float given[kBlock];
  given[threadIdx.x] = x[place()];
  __syncthreads();
  out[place()] = given[threadIdx.x + 1];
}

__global__ void past_dynamic(const float* x, float* out, int) {
  extern __shared__ float given[];
  given[threadIdx.x + 1] = x[place()];
  __syncthreads();
  out[place()] = given[threadIdx.x];
}

struct alignas(8) Two {
  float first, second;
};

__global__ void off_its_multiple(const float* x, float* out, int n) {
  if (place() + 2 < n) out[place()] = reinterpret_cast<const Two*>(x + 1)[place() / 2].first;
}

// An exchange orders no memory.
__global__ void exchange_for_a_barrier(const float* x, float* out, int) {
  __shared__ float given[kBlock];
  given[threadIdx.x] = x[place()];
  __shfl_xor_sync(kAllLanes, 0, 1);
  out[place()] = given[threadIdx.x ^ 1];
}

using Kernel = void (*)(const float*, float*, int);

// `x` [n], n a multiple of kBlock.
template <Kernel kernel, int kDynamic = kBlock, bool kLaunched = true>
Tensor run(const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {x.numel()});
  const auto n = static_cast<int>(x.numel());
  kernel<<<kLaunched ? n / kBlock : 0, kBlock, kDynamic * sizeof(float)>>>(const_data<float>(x),
                                                                           mutable_data<float>(out), n);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace sslfast

using sslfast::run;

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) {
  m.impl("selftest_reversed", TORCH_BOX(&run<sslfast::reversed>));
  m.impl("selftest_reversed_in_dynamic", TORCH_BOX(&run<sslfast::reversed_in_dynamic>));
  m.impl("selftest_exchanged", TORCH_BOX(&run<sslfast::exchanged>));
  m.impl("selftest_no_barrier", TORCH_BOX(&run<sslfast::no_barrier>));
  m.impl("selftest_written_again_too_soon", TORCH_BOX(&run<sslfast::written_again_too_soon>));
  m.impl("selftest_blocks_share_a_place", TORCH_BOX(&run<sslfast::blocks_share_a_place>));
  m.impl("selftest_unwritten_shared", TORCH_BOX(&run<sslfast::unwritten_shared>));
  m.impl("selftest_unwritten_dynamic", TORCH_BOX(&run<sslfast::unwritten_dynamic>));
  m.impl("selftest_unwritten_result", TORCH_BOX(&run<sslfast::unwritten_result>));
  m.impl("selftest_barriers_apart", TORCH_BOX(&run<sslfast::barriers_apart>));
  m.impl("selftest_thread_leaves", TORCH_BOX(&run<sslfast::thread_leaves>));
  m.impl("selftest_lane_leaves", TORCH_BOX(&run<sslfast::lane_leaves>));
  m.impl("selftest_warp_waits_for_block", TORCH_BOX(&run<sslfast::warp_waits_for_block>));
  m.impl("selftest_part_of_a_warp", TORCH_BOX(&run<sslfast::part_of_a_warp>));
  m.impl("selftest_too_much_shared", TORCH_BOX(&run<sslfast::too_much_shared>));
  m.impl("selftest_no_blocks", TORCH_BOX((&run<sslfast::no_blocks, 0, false>)));
  m.impl("selftest_past_the_end", TORCH_BOX(&run<sslfast::past_the_end>));
  m.impl("selftest_past_shared", TORCH_BOX(&run<sslfast::past_shared>));
  m.impl("selftest_past_dynamic", TORCH_BOX(&run<sslfast::past_dynamic>));
  m.impl("selftest_off_its_multiple", TORCH_BOX(&run<sslfast::off_its_multiple>));
  m.impl("selftest_exchange_for_a_barrier", TORCH_BOX(&run<sslfast::exchange_for_a_barrier>));
}
