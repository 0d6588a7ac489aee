// What the registrations of losses on masked positions share: predictions by rows, ids, pieces of work, the mean.
#pragma once
#include <algorithm>
#include <vector>

#include "target_rows.h"
#include "torch_api.h"

namespace sslfast {

// `x` [images, rows, width] with the elements of a row side by side: itself, or a copy. A slice of rows, as of a
// sequence without its class token, is not copied.
inline Tensor with_rows(const Tensor& x, const char* name) {
  SSLFAST_CHECK(x.dim() == 3, name, " must have three dimensions, got ", x.dim());
  return x.stride(2) == 1 || x.size(2) == 1 ? x : as_contiguous(x);
}

inline PredictedRows rows_of(const Tensor& x) {
  return {x.const_data_ptr(), x.size(0) * x.size(1), x.size(1), x.size(2), x.stride(0), x.stride(1)};
}

inline void check_ids(const int64_t* ids, int64_t count, int64_t length) {
  for (int64_t i = 0; i < count; ++i) {
    SSLFAST_CHECK(ids[i] >= 0 && ids[i] < length, "ids must be from 0 to ", length - 1, ", got ", ids[i]);
  }
}

// More pieces than threads, so that pieces with more masked rows do no harm; results do not depend on their number.
inline int64_t pieces_of(int64_t rows) {
  return std::max<int64_t>(1, std::min<int64_t>(rows, 8 * static_cast<int64_t>(torch::stable::get_num_threads())));
}

// Σ of_row / values, in their order and in double: the same on any number of threads. Of nothing it is 0/0, NaN.
template <typename A>
A mean_of(const std::vector<A>& of_row, int64_t values) {
  double sum = 0;
  for (const A x : of_row) sum += x;
  return static_cast<A>(sum / static_cast<double>(values));
}

}  // namespace sslfast
