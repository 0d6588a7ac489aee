// √x, rounded as IEEE says, on the host and on the device.
#pragma once
#include "half.h"

namespace sslfast {

SSLFAST_INLINE float square_root(float x) {
#ifdef __CUDA_ARCH__
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}
SSLFAST_INLINE double square_root(double x) {
#ifdef __CUDA_ARCH__
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace sslfast
