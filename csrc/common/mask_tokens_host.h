// One row of BERT's masking on the CPU, of the level being compiled: random numbers by vectors of Philox blocks, the
// choice without branches, and the replacements' numbers for the chosen tokens alone.
#pragma once
#include "mask_tokens.h"

namespace sslfast {

inline constexpr int64_t kTokenChunk = 1024;  // what is held besides the row itself stays in the first cache
inline constexpr int kMostBucketBits = 12;

// Memory of one thread: on the heap, because a thread's stack may be smaller.
struct TokenScratch {
  uint32_t key[kTokenChunk + 3], list[kTokenChunk], block[kTokenChunk], words[4][kTokenChunk];
  uint32_t bucket_end[1 << kMostBucketBits];
  uint8_t chosen[kTokenChunk];
};

namespace SSLFAST_CPU_LEVEL {

// A row as it lies in memory; `special` and `word_ids` may be null.
template <typename T>
struct TokenRow {
  int64_t length;
  uint64_t sample;
  const T* ids;
  const uint8_t* special;   // not 0: never chosen
  const int64_t* word_ids;  // below 0: never chosen
  T* inputs;
  T* labels;
};

// words[j][i] = word j of block[i]. The loop over blocks becomes vector code: they do not depend on each other.
template <int kWords>
static inline void draw_blocks(const Stream& s, const uint32_t* __restrict__ block, int64_t count,
                               uint32_t (*__restrict__ words)[kTokenChunk]) {
  const uint32_t view = s.view << 16, epoch = s.epoch;
  const auto low = static_cast<uint32_t>(s.sample), high = static_cast<uint32_t>(s.sample >> 32);
  const auto k0 = static_cast<uint32_t>(s.seed), k1 = static_cast<uint32_t>(s.seed >> 32);
  for (int64_t i = 0; i < count; ++i) {
    const Philox4 four = philox4x32(block[i] | view, epoch, low, high, k0, k1);
    for (int j = 0; j < kWords; ++j) words[j][i] = four.word[j];
  }
}

// scratch.key[i] of the tokens first … first + count, where `first` is a multiple of 4.
template <typename T>
static inline void draw_keys(const TokenRow<T>& row, const Stream& stream, int64_t first, int64_t count,
                             TokenScratch& scratch) {
  uint32_t* __restrict__ key = scratch.key, * __restrict__ block = scratch.block;
  uint32_t (*__restrict__ words)[kTokenChunk] = scratch.words;
  if (row.word_ids == nullptr) {
    const int64_t blocks = (count + 3) / 4;
    for (int64_t i = 0; i < blocks; ++i) block[i] = static_cast<uint32_t>(first / 4 + i);
    draw_blocks<4>(stream, block, blocks, words);
    for (int64_t i = 0; i < blocks; ++i)
      for (int j = 0; j < 4; ++j) key[4 * i + j] = words[j][i];
    return;
  }
  const int64_t* __restrict__ word = row.word_ids + first;
  for (int64_t i = 0; i < count; ++i) block[i] = static_cast<uint32_t>(word[i]) >> 2 & 0x3FFFu;
  draw_blocks<4>(stream, block, count, words);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t low = word[i] & 1 ? words[1][i] : words[0][i], high = word[i] & 1 ? words[3][i] : words[2][i];
    key[i] = word[i] & 2 ? high : low;
  }
}

template <typename T>
static inline bool is_candidate(const TokenRow<T>& row, int64_t s) {
  return (row.special == nullptr || row.special[s] == 0) && (row.word_ids == nullptr || row.word_ids[s] >= 0);
}

// Inputs and labels of the chosen tokens at list[0 … count); the inputs already hold the row.
template <typename T>
static void replace_tokens_at(const TokenRow<T>& row, const TokenRules& rules, const uint32_t* list, int64_t count,
                              TokenScratch& scratch) {
  const Stream stream = replacement_stream(rules, row.sample);
  uint32_t (*words)[kTokenChunk] = scratch.words;
  for (int64_t first = 0; first < count; first += kTokenChunk) {
    const int64_t some = count - first < kTokenChunk ? count - first : kTokenChunk;
    draw_blocks<2>(stream, list + first, some, words);
    for (int64_t i = 0; i < some; ++i) {
      const uint32_t s = list[first + i];
      row.labels[s] = row.ids[s];
      row.inputs[s] = static_cast<T>(replacement(rules, words[0][i], words[1][i], row.ids[s]));
    }
  }
}

template <typename T>
static void copy_row(const TokenRow<T>& row, T ignore, int64_t begin, int64_t end) {
  const T* __restrict__ ids = row.ids;
  T* __restrict__ inputs = row.inputs, * __restrict__ labels = row.labels;
  for (int64_t s = begin; s < end; ++s) {
    inputs[s] = ids[s];
    labels[s] = ignore;
  }
}

// Each token, or word, by itself: chosen where its key is below the limit.
template <typename T>
static void mask_row(const TokenRow<T>& row, const TokenRules& rules, TokenScratch& scratch) {
  const Stream stream = selection_stream(rules, row.sample);
  uint32_t* __restrict__ key = scratch.key, * __restrict__ list = scratch.list;
  uint8_t* __restrict__ chosen = scratch.chosen;
  for (int64_t first = 0; first < row.length; first += kTokenChunk) {
    const int64_t count = row.length - first < kTokenChunk ? row.length - first : kTokenChunk;
    copy_row(row, static_cast<T>(rules.ignore), first, first + count);
    if (rules.chosen == 0) continue;
    draw_keys(row, stream, first, count, scratch);
    const auto last = static_cast<uint32_t>(rules.chosen - 1);
    for (int64_t i = 0; i < count; ++i) chosen[i] = key[i] <= last;
    if (row.special != nullptr)
      for (int64_t i = 0; i < count; ++i) chosen[i] &= row.special[first + i] == 0;
    if (row.word_ids != nullptr)
      for (int64_t i = 0; i < count; ++i) chosen[i] &= row.word_ids[first + i] >= 0;
    int64_t length = 0;
    for (int64_t i = 0; i < count; ++i) {
      list[length] = static_cast<uint32_t>(first + i);
      length += chosen[i];
    }
    replace_tokens_at(row, rules, list, length, scratch);
  }
}

// Ascending; quick for the few that share a bucket, and not quadratic where one word is all of a row.
static inline void shell_sort(uint64_t* x, int64_t n) {
  constexpr int64_t kGaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
  for (const int64_t gap : kGaps)
    for (int64_t i = gap; i < n; ++i) {
      const uint64_t value = x[i];
      int64_t j = i;
      for (; j >= gap && x[j - gap] > value; j -= gap) x[j] = x[j - gap];
      x[j] = value;
    }
}

// Numbers in ascending order, sorted only as far as they are asked for: keys are uniform, so that of about as many
// buckets as numbers each has one or two.
struct AscendingTokens {
  uint32_t* end;  // [1 << kMostBucketBits]: of each bucket in `sorted`
  uint64_t* sorted;
  int64_t at = 0, known = 0;  // sorted[at … known) is in order
  int bucket = 0;

  AscendingTokens(const uint64_t* x, int64_t n, uint64_t* out, uint32_t* bucket_end) : end(bucket_end), sorted(out) {
    int bits = 2;
    while (bits < kMostBucketBits && (int64_t{1} << bits) < n) ++bits;
    const int shift = 64 - bits;
    for (int k = 0; k < 1 << bits; ++k) end[k] = 0;
    for (int64_t i = 0; i < n; ++i) ++end[x[i] >> shift];
    uint32_t before = 0;
    for (int k = 0; k < 1 << bits; ++k) {
      const uint32_t count = end[k];
      end[k] = before;
      before += count;
    }
    for (int64_t i = 0; i < n; ++i) out[end[x[i] >> shift]++] = x[i];
  }
  // Asked for n times at most.
  uint64_t operator()() {
    while (at == known) {
      known = end[bucket++];
      shell_sort(sorted + at, known - at);
    }
    return sorted[at++];
  }
};

// An exact number of tokens. `ranked` has room for two rows, `list` for one.
template <typename T>
static void mask_row_exactly(const TokenRow<T>& row, const TokenRules& rules, uint64_t* ranked, uint32_t* list,
                             TokenScratch& scratch) {
  const Stream stream = selection_stream(rules, row.sample);
  const uint32_t* key = scratch.key;
  copy_row(row, static_cast<T>(rules.ignore), 0, row.length);
  int64_t n = 0;
  for (int64_t first = 0; first < row.length; first += kTokenChunk) {
    const int64_t count = row.length - first < kTokenChunk ? row.length - first : kTokenChunk;
    draw_keys(row, stream, first, count, scratch);
    for (int64_t i = 0; i < count; ++i) {
      const auto s = static_cast<uint32_t>(first + i);
      ranked[n] = ranked_token(key[i], row.word_ids ? static_cast<uint32_t>(row.word_ids[s]) : s, s);
      n += is_candidate(row, s);
    }
  }
  AscendingTokens next(ranked, n, ranked + row.length, scratch.bucket_end);
  const Chosen chosen = choose_exactly(n, token_budget(rules, n), next, list);
  replace_tokens_at(row, rules, list + chosen.begin, chosen.count, scratch);
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
