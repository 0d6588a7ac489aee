// Threads, without a thread library.
#pragma once
#include <cstdint>

namespace sslfast {

// How a kernel shares work among threads without naming a thread library: run(count, body, data) calls body(data, i)
// once for every i in [0, count), in any order, and returns when all are done.
struct Parallel {
  void (*run)(int64_t count, void (*body)(void*, int64_t), void* data);
  int64_t threads;  // how many bodies can run at the same time
};

template <typename F>
void parallel_each(const Parallel& parallel, int64_t count, F& f) {
  parallel.run(count, [](void* data, int64_t i) { (*static_cast<F*>(data))(i); }, &f);
}

}  // namespace sslfast
