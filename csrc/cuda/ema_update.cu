// Exponential moving averages of many tensors on the GPU, in one pass: an average and a student's number are read, the
// average is written, and its rounded copy where there is one. A launch serves the tensors whose table fits into a
// kernel's argument, so nothing is copied to the device first, and a CUDA graph holds the table itself. The chunks of a
// launch's tensors are numbered through; a block finds its own by bisection.
#include "common/ema_update.h"

#include <type_traits>
#include <utility>
#include <vector>

#include "checks/ema_update.h"

namespace sslfast {
namespace {

constexpr int kListed = 100;  // tensors a launch, in a kernel's argument of at most 4 KiB
constexpr int kThreads = 256;
constexpr int64_t kChunk = 16384;  // elements a block
constexpr int kPack = 4;           // elements a load: 16 bytes of floats

struct Listed {
  void* average[kListed];
  const void* student[kListed];
  void* rounded[kListed];
  int64_t size[kListed];
  int first[kListed];  // the number of the tensor's first chunk
  int count;
  double momentum;
  const double* moving;  // where it is not null, the momentum
};
static_assert(sizeof(Listed) <= 4096);

struct None {};

template <typename T>
struct alignas(sizeof(T) * kPack) Pack {
  T element[kPack];
};

template <typename T>
__device__ bool whole_packs(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0;
}

template <typename T, typename S, typename R>
__device__ void blend_one(T* average, const S* student, R* rounded, Momentum<Accumulator<T>> m) {
  using A = Accumulator<T>;
  const A value = moved(A(widen(*average)), A(widen(*student)), m);
  narrow(value, average);
  if constexpr (!std::is_same_v<R, None>) narrow(value, rounded);
}

template <typename T, typename S, typename R>
__device__ void blend_pack(T* average, const S* student, R* rounded, Momentum<Accumulator<T>> m) {
  Pack<T> a = *reinterpret_cast<const Pack<T>*>(average);
  const Pack<S> s = *reinterpret_cast<const Pack<S>*>(student);
  Pack<R> r;
#pragma unroll
  for (int e = 0; e < kPack; ++e) blend_one(&a.element[e], &s.element[e], &r.element[e], m);
  *reinterpret_cast<Pack<T>*>(average) = a;
  if constexpr (!std::is_same_v<R, None>) *reinterpret_cast<Pack<R>*>(rounded) = r;
}

template <typename T, typename S, typename R>
__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Listed listed) {
  const int chunk = static_cast<int>(blockIdx.x);
  int tensor = 0, behind = listed.count;  // the last tensor whose first chunk is not behind this one
  while (behind - tensor > 1) {
    const int middle = (tensor + behind) / 2;
    if (listed.first[middle] <= chunk) {
      tensor = middle;
    } else {
      behind = middle;
    }
  }
  const int64_t begin = (chunk - listed.first[tensor]) * kChunk;
  const int64_t left = listed.size[tensor] - begin;
  const int64_t count = left < kChunk ? left : kChunk;
  T* average = static_cast<T*>(listed.average[tensor]) + begin;
  const S* student = static_cast<const S*>(listed.student[tensor]) + begin;
  R* rounded = static_cast<R*>(listed.rounded[tensor]);
  if constexpr (!std::is_same_v<R, None>) rounded += begin;
  const auto m = momentum_of<Accumulator<T>>(listed.moving != nullptr ? *listed.moving : listed.momentum);

  int64_t packed = 0;
  if (whole_packs(average) && whole_packs(student) && (std::is_same_v<R, None> || whole_packs(rounded))) {
    packed = count - count % kPack;
#pragma unroll 4
    for (int64_t i = threadIdx.x * kPack; i < packed; i += kThreads * kPack) {
      blend_pack(average + i, student + i, rounded + (std::is_same_v<R, None> ? 0 : i), m);
    }
  }
  for (int64_t i = packed + threadIdx.x; i < count; i += kThreads) {
    blend_one(average + i, student + i, rounded + (std::is_same_v<R, None> ? 0 : i), m);
  }
}

template <typename T, typename S, typename R>
void launch(EmaArguments& given, cudaStream_t stream) {
  Listed listed{};
  listed.momentum = given.momentum;
  listed.moving = given.moving ? const_data<double>(*given.moving) : nullptr;
  int64_t chunks = 0;
  const auto flush = [&] {
    if (chunks > 0) update_kernel<T, S, R><<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(listed);
    listed.count = 0;
    chunks = 0;
  };
  for (size_t i = 0; i < given.averages.size(); ++i) {
    const int64_t size = given.averages[i].numel();
    if (size == 0) continue;
    const int64_t own = (size + kChunk - 1) / kChunk;
    SSLFAST_CHECK(own < (int64_t{1} << 31), "averages must have fewer than 2^45 elements, got ", size);
    if (listed.count == kListed || chunks + own >= (int64_t{1} << 31)) flush();
    const int k = listed.count++;
    listed.average[k] = given.averages[i].mutable_data_ptr();
    listed.student[k] = given.students[i].const_data_ptr();
    listed.rounded[k] = given.rounded.empty() ? nullptr : given.rounded[i].mutable_data_ptr();
    listed.size[k] = size;
    listed.first[k] = static_cast<int>(chunks);
    chunks += own;
  }
  flush();
}

template <typename T, typename S>
void with_copy(EmaArguments& given, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float> && !std::is_same_v<S, double>) {
    if (!given.rounded.empty()) {
      return dispatch_float(given.rounded[0], "rounded", [&](auto copy) {
        using R = decltype(copy);
        if constexpr (!std::is_same_v<R, double>) launch<T, S, R>(given, stream);
      });
    }
  }
  launch<T, S, None>(given, stream);
}

void ema_update_cuda(std::vector<Tensor> averages, std::vector<Tensor> students, std::vector<Tensor> rounded,
                     double momentum, std::optional<Tensor> moving) {
  EmaArguments given{std::move(averages), std::move(students), std::move(rounded), momentum, std::move(moving)};
  given.check();
  const torch::stable::accelerator::DeviceGuard guard(given.like().get_device_index());
  const cudaStream_t stream = current_stream(given.like());
  dispatch_float(given.averages[0], "averages", [&](auto average) {
    dispatch_float(given.students[0], "students",
                   [&](auto student) { with_copy<decltype(average), decltype(student)>(given, stream); });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CUDA, m) { m.impl("ema_update_", TORCH_BOX(&sslfast::ema_update_cuda)); }
