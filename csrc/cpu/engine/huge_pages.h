// Large buffers on huge pages: fewer page faults when they are first written, and fewer misses of the address cache
// when tiles are read across them (measured: 3 % of an NT-Xent step at 8192 rows).
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sslfast {

// Asks for huge pages in the part of [p, p + bytes) that covers whole ones, where that is worth a system call. Advice
// only: a refusal changes nothing.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  if (bytes >= 8 << 20) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p;
  (void)bytes;
#endif
}

}  // namespace sslfast
