// What AddressSanitizer and ThreadSanitizer must be told: which stack is in use, whose memory is nobody's, and what a
// barrier orders. Nothing without them (ADDRESS_SANITIZER, THREAD_SANITIZER: the compiler's macros are set only for
// what is instrumented itself).
#pragma once
#include <cstddef>

#ifdef ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef THREAD_SANITIZER
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace emulator {

// What a sanitizer knows of one stack.
struct Stack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fiber = nullptr;

#ifdef THREAD_SANITIZER
  void create() { fiber = __tsan_create_fiber(0); }
  void destroy() { __tsan_destroy_fiber(fiber); }
  void is_current() { fiber = __tsan_get_current_fiber(); }
#else
  void create() {}
  void destroy() {}
  void is_current() {}
#endif
};

// Around each switch: leave() just before, on the old stack; arrived() just after, on the new one. No memory is ordered
// by it.
inline void leave([[maybe_unused]] Stack& from, [[maybe_unused]] const Stack& to) {
#ifdef ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&from.fiber, to.bottom, to.bytes);
#endif
#ifdef THREAD_SANITIZER
  __tsan_switch_to_fiber(to.fiber, 1);
#endif
}
inline void arrived([[maybe_unused]] Stack& at, [[maybe_unused]] Stack& from) {
#ifdef ADDRESS_SANITIZER
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(at.fiber, &bottom, &bytes);
  if (from.bottom == nullptr) {  // the stack of the CPU's thread, whose place is not known before
    from.bottom = bottom;
    from.bytes = bytes;
  }
#endif
}

// What happened before a release() is there for all that acquire() the same address later.
inline void release([[maybe_unused]] void* address) {
#ifdef THREAD_SANITIZER
  __tsan_release(address);
#endif
}
inline void acquire([[maybe_unused]] void* address) {
#ifdef THREAD_SANITIZER
  __tsan_acquire(address);
#endif
}

// While one lives, memory is allocated, filled and freed without a race with anyone.
struct Unwatched {
#ifdef THREAD_SANITIZER
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unwatched() {}
  ~Unwatched() {}
#endif
};

}  // namespace emulator
