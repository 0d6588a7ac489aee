// BERT's masking of words, host and device: which tokens are chosen, and what takes their place. Only whole numbers are
// compared, so every device chooses the same tokens.
//
// Random numbers: the key of token s of a row is word s%4 of block s/4 (of word w: w%4 of w/4) in the row's stream for
// selection; what becomes of a chosen token s is block s of its stream for replacement. Rows are at most 2^16 long.
#pragma once
#include "philox.h"
#include "streams.h"

namespace sslfast {

constexpr int64_t kLongestRow = 65536;

struct TokenRules {
  uint64_t seed;
  uint32_t epoch;
  uint32_t view;    // below 1024
  uint64_t chosen;  // a token is chosen where its key is below this, 0 … 2^32: probability · 2^32
  // Of a chosen token's number: below `masked` it becomes mask_id, else below `replaced` a random word, else it stays.
  uint64_t masked, replaced;
  int64_t mask_id;
  int64_t vocabulary;  // random words are 0 … vocabulary − 1; below 2^32
  int64_t ignore;      // the label of a token that was not chosen
};

SSLFAST_INLINE Stream selection_stream(const TokenRules& rules, uint64_t sample) {
  return {rules.seed, sample, rules.epoch, kTokenSelectionStream + rules.view};
}
SSLFAST_INLINE Stream replacement_stream(const TokenRules& rules, uint64_t sample) {
  return {rules.seed, sample, rules.epoch, kTokenReplacementStream + rules.view};
}

// What stands in the place of a chosen token `id`, by the first two words of its replacement block.
SSLFAST_INLINE int64_t replacement(const TokenRules& rules, uint32_t fate, uint32_t which, int64_t id) {
  if (fate < rules.masked) return rules.mask_id;
  return fate < rules.replaced ? static_cast<int64_t>(which * static_cast<uint64_t>(rules.vocabulary) >> 32) : id;
}

// ------------------------------------------------------------------------------------------------ an exact number

// Of a row's candidates, to the nearest whole number (halves up) and at least one; nothing where probability is 0.
SSLFAST_INLINE int64_t token_budget(const TokenRules& rules, int64_t candidates) {
  if (rules.chosen == 0 || candidates == 0) return 0;
  const auto nearest = static_cast<int64_t>((candidates * rules.chosen + (uint64_t{1} << 31)) >> 32);
  return nearest > 1 ? nearest : 1;
}

// A candidate in one number: by key, then by word, then by place.
SSLFAST_INLINE uint64_t ranked_token(uint32_t key, uint32_t word, uint32_t place) {
  return static_cast<uint64_t>(key) << 32 | (word & 0xFFFFu) << 16 | place;
}

struct Chosen {
  int64_t begin, count;  // the places are list[begin … begin + count)
};

// Whole words in the order of their keys, `next()` giving the n candidates from the smallest on, until `budget` tokens
// are chosen. A word that no longer fits is passed over, as in BERT; where none fits, it is the first.
template <typename Next>
SSLFAST_INLINE Chosen choose_exactly(int64_t n, int64_t budget, Next& next, uint32_t* list) {
  int64_t begin = 0, end = 0;
  uint64_t token = n > 0 ? next() : 0;
  for (int64_t i = 0; i < n && end - begin < budget;) {
    const uint64_t word = token >> 16;
    const bool first = i == 0;
    int64_t run = 0;
    do {
      list[end + run++] = static_cast<uint32_t>(token & 0xFFFFu);
      if (++i < n) token = next();
    } while (i < n && token >> 16 == word);
    if (end - begin + run <= budget) {
      end += run;
    } else if (first) {
      begin = end = run;
    }
  }
  return end > begin ? Chosen{begin, end - begin} : Chosen{0, begin};
}

}  // namespace sslfast
