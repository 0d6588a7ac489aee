// The one header that touches torch, and only its stable ABI: a library built here loads into every torch from 2.10 on.
// Include it in registration code alone (CPU: behind #ifdef SSLFAST_CPU_DISPATCH); kernels see pointers and sizes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>

#include "common/each.h"
#include "common/half.h"
#ifdef USE_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#else
#include "common/parallel.h"
#endif

namespace sslfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An error for the caller unless `condition`; the rest are the parts of its message.
#define SSLFAST_CHECK(condition, ...) STD_TORCH_CHECK(condition, "sslfast: ", __VA_ARGS__)

// The stable ABI says that an allocation failed, but neither why nor how large it was. This says both in PyTorch's
// words, by which tools that search for a batch size know them; sslfast/_library.py makes them a torch.OutOfMemoryError
// where PyTorch does.
[[noreturn]] inline void out_of_memory(torch::headeronly::IntHeaderOnlyArrayRef shape, size_t element_size) {
  uint64_t bytes = element_size;
  bool overflow = false;
  for (const int64_t size : shape) overflow |= __builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes);
  SSLFAST_CHECK(!overflow, "out of memory: you tried to allocate more than 2^64 bytes");
#ifdef USE_CUDA
  SSLFAST_CHECK(false, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
#else
  SSLFAST_CHECK(false, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
#endif
}

// An uninitialised tensor on the device of `like`, of its dtype unless another is given.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                       std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, shape, dtype);
  } catch (const std::runtime_error&) {
    out_of_memory(shape, torch::stable::new_empty(like, {0}, dtype).element_size());
  }
}

// The tensor itself where its elements lie row by row without gaps, else a copy.
inline Tensor as_contiguous(const Tensor& x) {
  if (x.is_contiguous()) return x;  // without a call of the dispatcher by name, which is 3 µs
  try {
    return torch::stable::contiguous(x);
  } catch (const std::runtime_error&) {
    out_of_memory(x.sizes(), x.element_size());
  }
}

// `t` has this shape and dtype and lies on the device of `like`: for tensors that Python code made, such as gradients.
inline void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, ScalarType dtype,
                         const Tensor& like) {
  bool same_shape = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same_shape = same_shape && t.size(d++) == size;
  SSLFAST_CHECK(same_shape, name, " has an unexpected shape");
  SSLFAST_CHECK(t.scalar_type() == dtype, name, " must be ", torch::headeronly::toString(dtype), ", got ",
                torch::headeronly::toString(t.scalar_type()));
  SSLFAST_CHECK(t.device() == like.device(), name, " must be on the device of the inputs");
}

// The dtype of sums over `x`: float64 for float64, else float32.
inline ScalarType accumulator_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Data pointers under the kernels' own element types; the dtype is what dispatch_float() found.
template <typename T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Calls f(T{}) with T = float, double, bf16 or fp16 after the dtype of `x`; any other dtype is an error naming `name`.
template <typename F>
auto dispatch_float(const Tensor& x, const char* name, F&& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default:
      SSLFAST_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                    torch::headeronly::toString(x.scalar_type()));
  }
}

#ifdef USE_CUDA

// PyTorch's current stream on the device of `x`, which becomes the current device of our runtime too. To be called
// under a torch::stable::accelerator::DeviceGuard and before any launch: the guard sets the device of the runtime that
// torch is linked against, and puts the caller's back; ours is another copy (linked statically, so that one library
// serves torch built with CUDA 12 and 13), with a current device of its own that the guard does not know of.
inline cudaStream_t current_stream(const Tensor& x) {
  STD_CUDA_CHECK(cudaSetDevice(x.get_device_index()));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

#else

// PyTorch's thread pool, of as many threads as torch.get_num_threads(). Inside a parallel region it runs serially, as
// at::parallel_for does.
inline Parallel torch_parallel() {
  const auto run = [](int64_t count, void (*body)(void*, int64_t), void* data) {
    torch::stable::parallel_for(0, count, 1, [body, data](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(data, i);
    });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

#endif

}  // namespace sslfast

// SSLFAST_REGISTER(CPU, scale, scale_backward) registers sslfast::scale_cpu and sslfast::scale_backward_cpu as what the
// operators `scale` and `scale_backward` run on tensors of the CPU; with CUDA they are scale_cuda and
// scale_backward_cuda.
#define SSLFAST_REGISTER(device, ...) \
  STABLE_TORCH_LIBRARY_IMPL(sslfast, device, m) { SSLFAST_EACH(SSLFAST_IMPL_##device, __VA_ARGS__) }
#define SSLFAST_IMPL_CPU(op) m.impl(#op, TORCH_BOX(&sslfast::op##_cpu));
#define SSLFAST_IMPL_CUDA(op) m.impl(#op, TORCH_BOX(&sslfast::op##_cuda));
