// build: one level, exact
// Sampling of augmentation parameters on the CPU: the arithmetic is in common/view_params.h. One level serves all, and
// the build switches the joining of products and sums off for this file, so that the bits are the same everywhere.
#ifdef SSLFAST_CPU_DISPATCH
#include "common/view_params.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "torch_api.h"

namespace sslfast {
namespace {

Tensor view_params_cpu(const Tensor& ids_any, std::optional<Tensor> sizes_any, std::vector<int64_t> size, int64_t seed,
                       int64_t epoch, int64_t view, std::vector<double> numbers) {
  SSLFAST_CHECK(numbers.size() % kViewNumbers == 0, "numbers must be a multiple of ", kViewNumbers, ", got ",
                numbers.size());
  const auto views = static_cast<int64_t>(numbers.size()) / kViewNumbers, count = ids_any.numel();
  check_tensor(ids_any, "ids", {count}, ScalarType::Long, ids_any);
  const Tensor ids = contiguous(ids_any);
  std::optional<Tensor> sizes;
  if (sizes_any.has_value()) {
    check_tensor(*sizes_any, "size", {count, 2}, ScalarType::Long, ids);
    sizes = contiguous(*sizes_any);
  } else {
    SSLFAST_CHECK(size.size() == 2, "size must have two numbers, got ", size.size());
  }
  Tensor params = torch::stable::new_empty(ids, {views, count, kColumns}, ScalarType::Float);
  const auto* id = const_data<int64_t>(ids);
  const int64_t* each = sizes.has_value() ? const_data<int64_t>(*sizes) : nullptr;
  auto* out = mutable_data<float>(params);
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
  return params;
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) { m.impl("view_params", TORCH_BOX(&sslfast::view_params_cpu)); }
#endif  // SSLFAST_CPU_DISPATCH
