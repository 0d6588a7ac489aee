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

// Calls f(worker, task) for every task once, each worker alone with its number below min(threads, tasks): that of its
// own scratch memory. `next` is a counter.
template <typename F>
void each_task(const Parallel& parallel, int64_t tasks, int64_t* next, F&& f) {
  *next = 0;
  auto body = [&](int64_t worker) {
    for (;;) {
      const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) return;
      f(worker, task);
    }
  };
  parallel_each(parallel, tasks < parallel.threads ? tasks : parallel.threads, body);
}

}  // namespace sslfast
