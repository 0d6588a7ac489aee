// CPU instruction-set levels: every csrc/cpu/<op>.cpp that does not say `// build: one level` is compiled once per
// level, and the widest level that the processor has is chosen when a kernel is called.
//
// The build defines SSLFAST_CPU_LEVEL as `baseline`, `avx2` or `avx512` (with the compiler flags to match), and
// SSLFAST_CPU_DISPATCH in the baseline pass alone. A source file puts its kernel into
//     namespace sslfast::SSLFAST_CPU_LEVEL { ... }
// and its registration, compiled once, behind #ifdef SSLFAST_CPU_DISPATCH.
// The kernel part must not use the C++ library's or torch's inline functions: the linker keeps one copy of those, and
// it could be the one compiled for a processor that is not there.
#pragma once
#include "common/each.h"
#include "common/parallel.h"

#if defined(__x86_64__)
#define SSLFAST_X86_LEVELS 1
#endif

namespace sslfast {

enum class Level { baseline, avx2, avx512 };

// The level in use: the widest available one, or what SSLFAST_CPU_CAPABILITY names (baseline, avx2, avx512; an error if
// the processor lacks it). Defined in csrc/cpu/engine/levels.cpp.
Level active_level();

}  // namespace sslfast

// Declares functions in the namespace of every level: SSLFAST_DECLARE(void scale(const float* x, float* y)), or with a
// macro of signatures that end in semicolons SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_SCALE_SIGNATURES, float, double)).
#ifdef SSLFAST_X86_LEVELS
#define SSLFAST_DECLARE(...) \
  namespace sslfast {        \
  namespace baseline {       \
  __VA_ARGS__;               \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__;               \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__;               \
  }                          \
  }
// Calls `name` of the active level: SSLFAST_CALL(scale, x, y).
#define SSLFAST_CALL(name, ...)                                                                 \
  (::sslfast::active_level() == ::sslfast::Level::avx512 ? ::sslfast::avx512::name(__VA_ARGS__) \
   : ::sslfast::active_level() == ::sslfast::Level::avx2 ? ::sslfast::avx2::name(__VA_ARGS__)   \
                                                         : ::sslfast::baseline::name(__VA_ARGS__))
#else
#define SSLFAST_DECLARE(...) \
  namespace sslfast {        \
  namespace baseline {       \
  __VA_ARGS__;               \
  }                          \
  }
#define SSLFAST_CALL(name, ...) ::sslfast::baseline::name(__VA_ARGS__)
#endif
