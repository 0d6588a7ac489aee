// Arguments of mask_tokens, checked alike on every device. For registration code alone.
#pragma once
#include <optional>
#include <vector>

#include "common/mask_tokens.h"
#include "torch_api.h"

namespace sslfast {
namespace {

struct MaskTokensArguments {
  int64_t rows, length;  // B, S
  Tensor ids, samples;
  std::optional<Tensor> special, words;
  Tensor inputs, labels;  // [B, S], the results

  MaskTokensArguments(const Tensor& ids_any, const Tensor& samples_any, const std::optional<Tensor>& special_any,
                      const std::optional<Tensor>& words_any) {
    SSLFAST_CHECK(ids_any.dim() == 2, "input_ids must be two-dimensional, got ", ids_any.dim(), " dimensions");
    rows = ids_any.size(0);
    length = ids_any.size(1);
    SSLFAST_CHECK(length <= kLongestRow, "input_ids must have at most ", kLongestRow, " tokens a row, got ", length);
    check_tensor(samples_any, "samples", {rows}, ScalarType::Long, ids_any);
    ids = as_contiguous(ids_any);
    samples = as_contiguous(samples_any);
    if (special_any.has_value()) {
      check_tensor(*special_any, "special", {rows, length}, ScalarType::Bool, ids);
      special = as_contiguous(*special_any);
    }
    if (words_any.has_value()) {
      check_tensor(*words_any, "word_ids", {rows, length}, ScalarType::Long, ids);
      words = as_contiguous(*words_any);
    }
    inputs = allocate(ids, {rows, length});
    labels = allocate(ids, {rows, length});
  }
  const uint8_t* special_data() const { return special ? const_data<uint8_t>(*special) : nullptr; }
  const int64_t* word_data() const { return words ? const_data<int64_t>(*words) : nullptr; }

  // Calls f(int64_t{} or int32_t{}) after the dtype of the ids.
  template <typename F>
  void dispatch_ids(F&& f) const {
    if (ids.scalar_type() == ScalarType::Long)
      f(int64_t{});
    else if (ids.scalar_type() == ScalarType::Int)
      f(int32_t{});
    else
      SSLFAST_CHECK(false, "input_ids must be int64 or int32, got ", torch::headeronly::toString(ids.scalar_type()));
  }
};

inline TokenRules token_rules(const std::vector<int64_t>& limits, int64_t mask_id, int64_t vocab_size,
                              int64_t ignore_index, int64_t seed, int64_t epoch, int64_t view) {
  SSLFAST_CHECK(limits.size() == 3, "limits must be three numbers, got ", limits.size());
  return {static_cast<uint64_t>(seed),
          static_cast<uint32_t>(epoch),
          static_cast<uint32_t>(view),
          static_cast<uint64_t>(limits[0]),
          static_cast<uint64_t>(limits[1]),
          static_cast<uint64_t>(limits[2]),
          mask_id,
          vocab_size,
          ignore_index};
}

}  // namespace
}  // namespace sslfast
