// build: one level
// Which instruction set the kernels use, found once, and two operators that tell.
#include "levels.h"

#ifdef SSLFAST_CPU_DISPATCH
#include <cstdlib>
#include <string>

#include "torch_api.h"

namespace sslfast {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

// The widest level that the processor and the operating system support; each level contains the ones before it.
Level widest_level() {
#ifdef SSLFAST_X86_LEVELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return Level::avx512;
  if (avx2) return Level::avx2;
#endif
  return Level::baseline;
}

Level choose_level() {
  const Level widest = widest_level();
  const char* wanted = std::getenv("SSLFAST_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return widest;
  for (int i = 0; i < 3; ++i) {
    if (std::string(wanted) != kNames[i]) continue;
    SSLFAST_CHECK(i <= static_cast<int>(widest), "SSLFAST_CPU_CAPABILITY=", wanted,
                  " needs instructions that this processor lacks; the widest level here is ",
                  kNames[static_cast<int>(widest)]);
    return static_cast<Level>(i);
  }
  SSLFAST_CHECK(false, "SSLFAST_CPU_CAPABILITY=", wanted, " is not a level; allowed: baseline, avx2, avx512");
}

}  // namespace

Level active_level() {
  static const Level level = choose_level();  // where it throws, the next call tries, and throws, again
  return level;
}

namespace {

std::string cpu_level() { return kNames[static_cast<int>(active_level())]; }
std::string cpu_level_widest() { return kNames[static_cast<int>(widest_level())]; }

}  // namespace
}  // namespace sslfast

// Neither takes a tensor, so no device's dispatch key could pick them: they serve every key.
STABLE_TORCH_LIBRARY_IMPL(sslfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&sslfast::cpu_level));
  m.impl("cpu_level_widest", TORCH_BOX(&sslfast::cpu_level_widest));
}

#endif  // SSLFAST_CPU_DISPATCH
