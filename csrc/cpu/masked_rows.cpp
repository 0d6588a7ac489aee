// build: one level
// The masked tokens of a batch as one list of a fixed size, on the CPU.
#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <tuple>
#include <vector>

#include "checks/masked_rows.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor> masked_rows_cpu(const Tensor& mask_any, int64_t size) {
  MaskedRowsArguments arguments(mask_any, size);
  const int64_t count = arguments.images, tokens = arguments.tokens;
  const auto* masked = static_cast<const uint8_t*>(arguments.mask.const_data_ptr());
  const int64_t rows_per_task = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, tokens));
  const int64_t tasks = (count + rows_per_task - 1) / rows_per_task;
  std::vector<int64_t> first(count + 1);  // where a row's tokens begin in the list
  auto sums = [&](int64_t t) {
    for (int64_t b = t * rows_per_task; b < std::min(count, (t + 1) * rows_per_task); ++b) {
      int64_t sum = 0;
      for (int64_t l = 0; l < tokens; ++l) sum += masked[b * tokens + l] != 0;
      first[b + 1] = sum;
    }
  };
  parallel_each(torch_parallel(), tasks, sums);
  for (int64_t b = 0; b < count; ++b) first[b + 1] += first[b];
  const int64_t total = first[count];
  SSLFAST_CHECK(total <= size, "size must be at least the number of masked tokens, ", total, ", got ", size);
  auto* row = mutable_data<int64_t>(arguments.rows);
  auto* weight = mutable_data<float>(arguments.weights);
  auto write = [&](int64_t t) {
    for (int64_t b = t * rows_per_task; b < std::min(count, (t + 1) * rows_per_task); ++b) {
      int64_t at = first[b];
      const int64_t end = first[b + 1];
      std::fill(weight + at, weight + end, 1.0f / static_cast<float>(end - at));
      for (int64_t l = 0; at < end; ++l) {  // what is not masked is written over by the next that is
        row[at] = b * tokens + l;
        at += masked[b * tokens + l] != 0;
      }
    }
  };
  parallel_each(torch_parallel(), tasks, write);
  std::fill(row + total, row + size, int64_t{-1});
  std::fill(weight + total, weight + size, 0.0f);
  *mutable_data<int64_t>(arguments.count) = total;
  return {arguments.rows, arguments.weights, arguments.count};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, masked_rows)
#endif  // SSLFAST_CPU_DISPATCH
