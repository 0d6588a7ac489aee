// One allocation, handed out in pieces.
#pragma once
#include <cstdint>

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Each piece is aligned to 64 bytes; with no memory it only counts.
struct Arena {
  char* memory;
  int64_t bytes = 0;

  template <typename P>
  P* take(int64_t count) {
    P* pointer = reinterpret_cast<P*>(memory + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(P)), 64);
    return pointer;
  }
};

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
