// BERT's masking of words on the CPU: one pass from the ids to inputs and labels, a few rows to a task.
#include "common/mask_tokens_host.h"

#include "cpu/engine/levels.h"

namespace sslfast {

// All row-major without gaps; pointers that may be null are marked so in TokenRow.
struct TokenBatch {
  int64_t rows, length;  // B, S
  int64_t rows_per_task;
  const int64_t* samples;
  const uint8_t* special;
  const int64_t* word_ids;
  uint64_t* ranked;       // [B, 2, S], or null: no exact number
  uint32_t* list;         // [B, S], the same
  TokenScratch* scratch;  // [workers]
};

}  // namespace sslfast

#define SSLFAST_MASK_TOKENS_SIGNATURE(T)                                                                   \
  void mask_tokens(const ::sslfast::Parallel&, const ::sslfast::TokenBatch&, const ::sslfast::TokenRules&, \
                   const T* ids, T* inputs, T* labels);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_MASK_TOKENS_SIGNATURE, int32_t, int64_t))

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
void mask_batch(const Parallel& parallel, const TokenBatch& batch, const TokenRules& rules, const T* ids, T* inputs,
                T* labels) {
  int64_t next = 0;
  each_task(parallel, (batch.rows + batch.rows_per_task - 1) / batch.rows_per_task, &next,
            [&](int64_t worker, int64_t t) {
              TokenScratch& scratch = batch.scratch[worker];
              const int64_t begin = t * batch.rows_per_task;
              const int64_t end = begin + batch.rows_per_task < batch.rows ? begin + batch.rows_per_task : batch.rows;
              for (int64_t b = begin; b < end; ++b) {
                const int64_t at = b * batch.length;
                const TokenRow<T> row{batch.length,
                                      static_cast<uint64_t>(batch.samples[b]),
                                      ids + at,
                                      batch.special ? batch.special + at : nullptr,
                                      batch.word_ids ? batch.word_ids + at : nullptr,
                                      inputs + at,
                                      labels + at};
                if (batch.ranked)
                  mask_row_exactly(row, rules, batch.ranked + 2 * at, batch.list + at, scratch);
                else
                  mask_row(row, rules, scratch);
              }
            });
}

}  // namespace

void mask_tokens(const Parallel& parallel, const TokenBatch& batch, const TokenRules& rules, const int32_t* ids,
                 int32_t* inputs, int32_t* labels) {
  mask_batch(parallel, batch, rules, ids, inputs, labels);
}
void mask_tokens(const Parallel& parallel, const TokenBatch& batch, const TokenRules& rules, const int64_t* ids,
                 int64_t* inputs, int64_t* labels) {
  mask_batch(parallel, batch, rules, ids, inputs, labels);
}

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks/mask_tokens.h"
#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor> mask_tokens_cpu(const Tensor& ids_any, const Tensor& samples_any,
                                           std::optional<Tensor> special_any, std::optional<Tensor> words_any,
                                           std::vector<int64_t> limits, int64_t mask_id, int64_t vocab_size,
                                           int64_t ignore_index, bool exact, int64_t seed, int64_t epoch,
                                           int64_t view) {
  MaskTokensArguments arguments(ids_any, samples_any, special_any, words_any);
  const TokenRules rules = token_rules(limits, mask_id, vocab_size, ignore_index, seed, epoch, view);
  const int64_t rows = arguments.rows, length = arguments.length;
  const Tensor& ids = arguments.ids;
  std::optional<Tensor> ranked, list;
  if (exact) {
    ranked = allocate(ids, {rows, 2, length}, ScalarType::Long);
    list = allocate(ids, {rows, length}, ScalarType::Int);
  }
  constexpr int64_t kTokensPerTask = 8192;
  const int64_t rows_per_task = std::max<int64_t>(1, kTokensPerTask / std::max<int64_t>(1, length));
  const Parallel parallel = torch_parallel();
  const int64_t workers = std::min(parallel.threads, (rows + rows_per_task - 1) / rows_per_task);
  Tensor memory = scratch(ids, workers * static_cast<int64_t>(sizeof(TokenScratch)));
  const TokenBatch batch{rows,
                         length,
                         rows_per_task,
                         const_data<int64_t>(arguments.samples),
                         arguments.special_data(),
                         arguments.word_data(),
                         ranked ? mutable_data<uint64_t>(*ranked) : nullptr,
                         list ? mutable_data<uint32_t>(*list) : nullptr,
                         static_cast<TokenScratch*>(aligned(memory))};
  arguments.dispatch_ids([&](auto element) {
    using T = decltype(element);
    SSLFAST_CALL(mask_tokens, parallel, batch, rules, const_data<T>(ids), mutable_data<T>(arguments.inputs),
                 mutable_data<T>(arguments.labels));
  });
  return {arguments.inputs, arguments.labels};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, mask_tokens)
#endif  // SSLFAST_CPU_DISPATCH
