// build: one level, exact
// Sampling of augmentation parameters on the CPU: the arithmetic is in common/view_params.h. One level serves all, and
// the build switches the joining of products and sums off for this file, so that the bits are the same everywhere.
#ifdef SSLFAST_CPU_DISPATCH
#include "checks/view_params.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace sslfast {
namespace {

Tensor view_params_cpu(const Tensor& ids_any, std::optional<Tensor> sizes_any, std::vector<int64_t> size, int64_t seed,
                       int64_t epoch, int64_t view, std::vector<double> numbers) {
  ViewParamsArguments arguments(ids_any, sizes_any, size, numbers);
  const int64_t views = arguments.views, count = arguments.count;
  const auto* id = const_data<int64_t>(arguments.ids);
  const int64_t* each = arguments.each_size();
  auto* out = mutable_data<float>(arguments.params);
  constexpr int64_t kRowsPerTask = 256;
  auto task = [&](int64_t t) {
    const int64_t end = std::min((t + 1) * kRowsPerTask, views * count);
    for (int64_t i = t * kRowsPerTask; i < end; ++i) {
      const int64_t v = i / count, b = i % count;
      ViewNumbers of_view;
      __builtin_memcpy(&of_view, numbers.data() + v * kViewNumbers, sizeof of_view);
      const Stream stream{static_cast<uint64_t>(seed), static_cast<uint64_t>(id[b]), static_cast<uint32_t>(epoch),
                          static_cast<uint32_t>(view + v)};
      sample_view(stream, of_view, each ? each[2 * b] : size[0], each ? each[2 * b + 1] : size[1], out + i * kColumns);
    }
  };
  parallel_each(torch_parallel(), (views * count + kRowsPerTask - 1) / kRowsPerTask, task);
  return arguments.params;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, view_params)
#endif  // SSLFAST_CPU_DISPATCH
