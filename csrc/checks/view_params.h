// Arguments of view_params, checked alike on every device. For registration code alone.
#pragma once
#include <optional>
#include <vector>

#include "common/view_params.h"
#include "torch_api.h"

namespace sslfast {
namespace {

struct ViewParamsArguments {
  int64_t views, count;
  Tensor ids;                   // [B]
  std::optional<Tensor> sizes;  // [B, 2]; none: all are of one size
  Tensor params;                // [V, B, kColumns], the result

  ViewParamsArguments(const Tensor& ids_any, const std::optional<Tensor>& sizes_any, const std::vector<int64_t>& size,
                      const std::vector<double>& numbers)
      : views(static_cast<int64_t>(numbers.size()) / kViewNumbers), count(ids_any.numel()) {
    SSLFAST_CHECK(numbers.size() % kViewNumbers == 0, "numbers must be a multiple of ", kViewNumbers, ", got ",
                  numbers.size());
    check_tensor(ids_any, "ids", {count}, ScalarType::Long, ids_any);
    ids = as_contiguous(ids_any);
    if (sizes_any.has_value()) {
      check_tensor(*sizes_any, "size", {count, 2}, ScalarType::Long, ids);
      sizes = as_contiguous(*sizes_any);
    } else {
      SSLFAST_CHECK(size.size() == 2, "size must have two numbers, got ", size.size());
    }
    params = allocate(ids, {views, count, kColumns}, ScalarType::Float);
  }
  const int64_t* each_size() const { return sizes.has_value() ? const_data<int64_t>(*sizes) : nullptr; }
};

}  // namespace
}  // namespace sslfast
