// BERT's masking of words on the GPU: a thread for the four tokens of a Philox block; for an exact number a block of
// threads a row, which sorts the candidates by key. What is chosen and drawn is in common/mask_tokens.h.
#include "checks/mask_tokens.h"

#include <optional>
#include <tuple>
#include <vector>

namespace sslfast {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSharedTokens = 4096;  // a row's ranks up to here are sorted in shared memory

template <typename T>
struct TokenBatch {
  int64_t rows, length;     // B, S
  const int64_t* samples;   // [B]
  const uint8_t* special;   // [B, S] or null
  const int64_t* word_ids;  // [B, S] or null
  const T* ids;             // [B, S]
  T *inputs, *labels;       // [B, S]
};

template <typename T>
__device__ bool is_candidate(const TokenBatch<T>& batch, int64_t at) {
  return (!batch.special || batch.special[at] == 0) && (!batch.word_ids || batch.word_ids[at] >= 0);
}

__device__ uint32_t word_of(const Philox4& random, int64_t j) {
  const uint32_t low = j & 1 ? random.word[1] : random.word[0], high = j & 1 ? random.word[3] : random.word[2];
  return j & 2 ? high : low;
}

__device__ uint32_t key_of(const Stream& stream, int64_t word) {
  return word_of(draw(stream, static_cast<uint32_t>(word) >> 2 & 0x3FFFu), word);
}

template <typename T>
__device__ T replaced(const TokenRules& rules, const Stream& stream, int64_t s, T id) {
  const Philox4 random = draw(stream, static_cast<uint32_t>(s));
  return static_cast<T>(replacement(rules, random.word[0], random.word[1], id));
}

template <typename T>
struct alignas(16) Four {
  T token[4];
};

// kWhole: rows are a multiple of four tokens, and every four start at 16 bytes.
template <typename T, bool kWhole>
__global__ void mask_kernel(TokenBatch<T> batch, TokenRules rules) {
  const int64_t fours = (batch.length + 3) / 4;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = i / fours, first = i % fours * 4;
  if (b >= batch.rows) return;
  const int64_t at = b * batch.length + first;
  const int count = kWhole || batch.length - first >= 4 ? 4 : static_cast<int>(batch.length - first);
  const auto sample = static_cast<uint64_t>(batch.samples[b]);
  const Stream selection = selection_stream(rules, sample), fates = replacement_stream(rules, sample);
  Four<T> ids, labels;
  if constexpr (kWhole) {
    ids = *reinterpret_cast<const Four<T>*>(batch.ids + at);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < count) ids.token[j] = batch.ids[at + j];
  }
  Philox4 random{};
  if (!batch.word_ids) random = draw(selection, static_cast<uint32_t>(first / 4));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    labels.token[j] = static_cast<T>(rules.ignore);
    if (j >= count || !is_candidate(batch, at + j)) continue;
    const uint32_t key = batch.word_ids ? key_of(selection, batch.word_ids[at + j]) : random.word[j];
    if (key >= rules.chosen) continue;
    labels.token[j] = ids.token[j];
    ids.token[j] = replaced(rules, fates, first + j, ids.token[j]);
  }
  if constexpr (kWhole) {
    *reinterpret_cast<Four<T>*>(batch.inputs + at) = ids;
    *reinterpret_cast<Four<T>*>(batch.labels + at) = labels;
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j >= count) continue;
      batch.inputs[at + j] = ids.token[j];
      batch.labels[at + j] = labels.token[j];
    }
  }
}

// Bitonic, ascending; `count` is a power of two, and all threads of the block call it.
__device__ void sort_in_block(uint64_t* x, int64_t count) {
  for (int64_t run = 2; run <= count; run *= 2)
    for (int64_t step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int64_t i = threadIdx.x; i < count; i += kThreads) {
        const int64_t other = i ^ step;
        if (other < i) continue;  // its partner exchanges them
        const uint64_t a = x[i];
        if ((a > x[other]) != ((i & run) == 0)) continue;
        x[i] = x[other];
        x[other] = a;
      }
    }
  __syncthreads();
}

template <typename T>
__global__ void mask_exactly_kernel(TokenBatch<T> batch, TokenRules rules, int64_t room, uint64_t* __restrict__ ranks,
                                    uint32_t* __restrict__ lists) {
  extern __shared__ uint64_t shared_ranks[];
  __shared__ Chosen chosen;
  const int64_t b = blockIdx.x, row = b * batch.length;
  uint64_t* const rank = room <= kSharedTokens ? shared_ranks : ranks + b * room;
  uint32_t* const list = lists + row;
  const auto sample = static_cast<uint64_t>(batch.samples[b]);
  const Stream selection = selection_stream(rules, sample), fates = replacement_stream(rules, sample);
  int64_t candidates = 0;
  for (int64_t first = 0; first < room; first += kThreads) {
    const int64_t s = first + threadIdx.x;
    const bool candidate = s < batch.length && is_candidate(batch, row + s);
    if (s < batch.length) {
      batch.inputs[row + s] = batch.ids[row + s];
      batch.labels[row + s] = static_cast<T>(rules.ignore);
    }
    uint64_t value = ~uint64_t{0};
    if (candidate) {
      const int64_t word = batch.word_ids ? batch.word_ids[row + s] : s;
      value = ranked_token(key_of(selection, word), static_cast<uint32_t>(word), static_cast<uint32_t>(s));
    }
    if (s < room) rank[s] = value;
    candidates += __syncthreads_count(candidate);
  }
  sort_in_block(rank, room);
  const int64_t budget = token_budget(rules, candidates);
  if (!batch.word_ids) {
    for (int64_t i = threadIdx.x; i < budget; i += kThreads) list[i] = static_cast<uint32_t>(rank[i] & 0xFFFFu);
    if (threadIdx.x == 0) chosen = {0, budget};
  } else if (threadIdx.x == 0) {  // whether a word fits depends on those before it
    auto next = [rank, i = int64_t{0}]() mutable { return rank[i++]; };
    chosen = choose_exactly(candidates, budget, next, list);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < chosen.count; i += kThreads) {
    const int64_t s = list[chosen.begin + i];
    const T id = batch.ids[row + s];
    batch.labels[row + s] = id;
    batch.inputs[row + s] = replaced(rules, fates, s, id);
  }
}

// What a row is sorted in where it is to have an exact number of chosen tokens; `room` is a power of two.
struct Scratch {
  int64_t room;     // 0: no exact number
  uint64_t* ranks;  // [B, room] where that is more than fits into shared memory
  uint32_t* lists;  // [B, S]
};

template <typename T>
void launch(const TokenBatch<T>& batch, const TokenRules& rules, const Scratch& scratch, cudaStream_t stream) {
  if (batch.rows * batch.length == 0) return;
  SSLFAST_CHECK(batch.rows < (int64_t{1} << 31), "input_ids must have fewer than 2^31 rows, got ", batch.rows);
  if (scratch.room > 0) {
    const size_t shared = scratch.room <= kSharedTokens ? scratch.room * sizeof(uint64_t) : 0;
    mask_exactly_kernel<T><<<static_cast<unsigned>(batch.rows), kThreads, shared, stream>>>(
        batch, rules, scratch.room, scratch.ranks, scratch.lists);
  } else {
    const int64_t threads = batch.rows * ((batch.length + 3) / 4);
    const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
    const bool whole = batch.length % 4 == 0 && reinterpret_cast<uintptr_t>(batch.ids) % 16 == 0;
    if (whole)
      mask_kernel<T, true><<<blocks, kThreads, 0, stream>>>(batch, rules);
    else
      mask_kernel<T, false><<<blocks, kThreads, 0, stream>>>(batch, rules);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> mask_tokens_cuda(const Tensor& ids_any, const Tensor& samples_any,
                                            std::optional<Tensor> special_any, std::optional<Tensor> words_any,
                                            std::vector<int64_t> limits, int64_t mask_id, int64_t vocab_size,
                                            int64_t ignore_index, bool exact, int64_t seed, int64_t epoch,
                                            int64_t view) {
  const torch::stable::accelerator::DeviceGuard guard(ids_any.get_device_index());
  MaskTokensArguments arguments(ids_any, samples_any, special_any, words_any);
  const TokenRules rules = token_rules(limits, mask_id, vocab_size, ignore_index, seed, epoch, view);
  const int64_t rows = arguments.rows, length = arguments.length;
  const Tensor& ids = arguments.ids;
  int64_t room = exact ? 1 : 0;
  while (exact && room < length) room *= 2;
  Tensor ranks = allocate(ids, {room > kSharedTokens ? rows : 0, room}, ScalarType::Long);
  Tensor lists = allocate(ids, {exact ? rows : 0, length}, ScalarType::Int);
  const Scratch scratch{room, mutable_data<uint64_t>(ranks), mutable_data<uint32_t>(lists)};
  arguments.dispatch_ids([&](auto element) {
    using T = decltype(element);
    const TokenBatch<T> batch{rows,
                              length,
                              const_data<int64_t>(arguments.samples),
                              arguments.special_data(),
                              arguments.word_data(),
                              const_data<T>(ids),
                              mutable_data<T>(arguments.inputs),
                              mutable_data<T>(arguments.labels)};
    launch(batch, rules, scratch, current_stream(ids));
  });
  return {arguments.inputs, arguments.labels};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, mask_tokens)
