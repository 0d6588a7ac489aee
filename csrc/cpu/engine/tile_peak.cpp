// How fast the micro-kernel runs on tiles that stay in cache: the peak that rooflines of the tiled operations refer to.
#include <ctime>

#include "levels.h"
#include "tile_gemm.h"

// Seconds that every thread takes for `repeats` products of [m, k] by [k, n], m and n at most kTile, each on its own
// operands. `memory`: tile_peak_memory(k) floats a thread.
SSLFAST_DECLARE(double tile_peak(int64_t m, int64_t n, int64_t k, int64_t repeats, float* memory,
                                 const Parallel& parallel))
SSLFAST_DECLARE(int64_t tile_peak_memory(int64_t k))
SSLFAST_DECLARE(int64_t tile_limit())

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

int64_t tile_limit() { return kTile; }

int64_t tile_peak_memory(int64_t k) { return 2 * block_size<float>(kTile, k) + kTile * kTile; }

double tile_peak(int64_t m, int64_t n, int64_t k, int64_t repeats, float* memory, const Parallel& parallel) {
  const int64_t size = tile_peak_memory(k);
  auto prepare = [&](int64_t thread) {
    for (int64_t i = 0; i < size; ++i) memory[thread * size + i] = static_cast<float>(i % 7) - 3;
  };
  parallel_each(parallel, parallel.threads, prepare);
  const SplitFactor<float> factor(1);
  auto body = [&](int64_t thread) {
    const float *panels = memory + thread * size, *transposed = panels + block_size<float>(kTile, k);
    float* product = memory + thread * size + 2 * block_size<float>(kTile, k);
    for (int64_t r = 0; r < repeats; ++r) tile_similarity(panels, transposed, kTile, m, n, k, factor, product);
  };
  timespec begin, end;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  parallel_each(parallel, parallel.threads, body);
  clock_gettime(CLOCK_MONOTONIC, &end);
  return static_cast<double>(end.tv_sec - begin.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - begin.tv_nsec);
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <vector>

#include "torch_api.h"

namespace sslfast {
namespace {

double tile_peak_op(int64_t m, int64_t n, int64_t k, int64_t repeats) {
  const int64_t limit = SSLFAST_CALL(tile_limit);
  SSLFAST_CHECK(m > 0 && m <= limit && n > 0 && n <= limit && k > 0 && repeats > 0, "tile_peak: m and n must be 1 to ",
                limit, ", k and repeats positive; got m=", m, ", n=", n, ", k=", k, ", repeats=", repeats);
  const Parallel parallel = torch_parallel();
  std::vector<float> memory(static_cast<size_t>(parallel.threads * SSLFAST_CALL(tile_peak_memory, k)));
  return SSLFAST_CALL(tile_peak, m, n, k, repeats, memory.data(), parallel);
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CompositeExplicitAutograd, m) {
  m.impl("tile_peak", TORCH_BOX(&sslfast::tile_peak_op));
}
#endif  // SSLFAST_CPU_DISPATCH
