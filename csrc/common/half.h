// bfloat16 and float16 as raw bits, with conversions to and from float that run on the host and on the device.
//
// Kernels use these types instead of torch's: a CPU kernel is compiled for several instruction sets, and an inline
// function with external linkage would survive in one copy only, perhaps the one for a processor that is not there.
// Hence `static` below, and no branch, so that a loop over a row still becomes vector code.
#pragma once
#include <cstdint>
#include <type_traits>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SSLFAST_INLINE static __host__ __device__ __forceinline__
#else
#define SSLFAST_INLINE static inline __attribute__((always_inline))
#endif
// An expression for the device's code, and one for the host's.
#ifdef __CUDA_ARCH__
#define SSLFAST_DEVICE_OR_HOST(device, host) (device)
#else
#define SSLFAST_DEVICE_OR_HOST(device, host) (host)
#endif

namespace sslfast {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The type in which sums over elements of T are kept.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename To, typename From>
SSLFAST_INLINE To same_bits(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
SSLFAST_INLINE float bits_to_float(uint32_t bits) {
  return SSLFAST_DEVICE_OR_HOST(__uint_as_float(bits), same_bits<float>(bits));
}
SSLFAST_INLINE uint32_t float_to_bits(float value) {
  return SSLFAST_DEVICE_OR_HOST(__float_as_uint(value), same_bits<uint32_t>(value));
}

// ------------------------------------------------------------------------------------------------ to the accumulator

SSLFAST_INLINE float widen(float x) { return x; }
SSLFAST_INLINE double widen(double x) { return x; }
SSLFAST_INLINE float widen(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

SSLFAST_INLINE float widen(fp16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Comparisons are of signed numbers: SSE2 has no others.
  const int32_t magnitude = x.bits & 0x7fff;
  // Normal numbers: move the exponent from bias 15 to bias 127; infinity and NaN: all exponent bits set.
  const int32_t normal = (magnitude << 13) + (112 << 23);
  const int32_t regular = magnitude >= 0x7c00 ? normal | 0x7f800000 : normal;
  // Subnormal m·2^-24: (0.5 + m·2^-24) − 0.5 is exact, and never touches a float subnormal (which may be flushed).
  const int32_t subnormal = static_cast<int32_t>(float_to_bits(bits_to_float(magnitude | (126u << 23)) - 0.5f));
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return bits_to_float(sign | static_cast<uint32_t>(magnitude < 0x0400 ? subnormal : regular));
#endif
}

// ---------------------------------------------------------- from the accumulator: to the nearest, ties to the even one

SSLFAST_INLINE void narrow(float x, float* out) { *out = x; }
SSLFAST_INLINE void narrow(double x, double* out) { *out = x; }

SSLFAST_INLINE void narrow(float x, bf16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
#endif
}

SSLFAST_INLINE void narrow(float x, fp16* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = float_to_bits(x);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  // Adding `bias` lets the processor's own addition round: its last place lies where the result's last place is,
  // 2^(e-10) for a normal result of exponent e, and 2^-24 (as for e = -14) for a subnormal one.
  const int32_t smallest = 113 << 23;
  // Above 65504 the result is chosen below, and the exponent bounded here, so that no sum overflows.
  const int32_t bounded = magnitude < 0x47800000 ? magnitude : 0x47800000;
  const int32_t exponent = bounded & 0x7f800000;
  const int32_t place = exponent > smallest ? exponent : smallest;
  const float bias = bits_to_float(static_cast<uint32_t>(place + (13 << 23)));
  const uint32_t sum = float_to_bits(bits_to_float(static_cast<uint32_t>(bounded)) + bias) - float_to_bits(bias);
  // `sum` counts last places above 0: the mantissa with its leading one, which carries into the exponent field.
  const int32_t finite = static_cast<int32_t>(sum) + (((place - smallest) >> 23) << 10);
  // 65520 is half way between the largest finite number and 2^16, and ties go to the even one: infinity.
  const int32_t ranged = magnitude >= 0x477ff000 ? 0x7c00 : finite;
  const int32_t result = magnitude > 0x7f800000 ? 0x7e00 : ranged;
  out->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | static_cast<uint32_t>(result));
#endif
}

}  // namespace sslfast
