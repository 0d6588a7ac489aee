// √x, rounded as IEEE says, on the host and on the device.
#pragma once
#include "half.h"

namespace sslfast {

SSLFAST_INLINE float square_root(float x) { return SSLFAST_DEVICE_OR_HOST(sqrtf(x), __builtin_sqrtf(x)); }
SSLFAST_INLINE double square_root(double x) { return SSLFAST_DEVICE_OR_HOST(sqrt(x), __builtin_sqrt(x)); }

}  // namespace sslfast
