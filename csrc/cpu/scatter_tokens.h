// One call of scatter_tokens, and of its backward.
#pragma once
#include "cpu/engine/token_rows.h"

namespace sslfast {

struct ScatterTokens {
  int64_t batch, tokens;         // B, L
  int64_t kept, passed, prefix;  // rows of x and P; under `mask`, kept is L
  int64_t width;                 // D
  const int64_t* restore;        // [B, L], or null
  const uint8_t* mask;           // [B, L], not 0 where masked; or null
  bool everywhere;               // position has a row for each row of the output, else for each token
};

struct ScatterInputs {
  TokenRows x;           // [B, passed + K, D]
  const void* token;     // [D]
  const void* position;  // or null
  const void* prefix;    // [P, D], or null
};

// A task takes so many sums over rows of the output, and its sums fit the first two levels of cache.
inline constexpr int64_t kRowSums = 4096;

// Sums of rows and of the token over a block of features: of the images so far, and of the group that is being added.
// On the heap, because a thread's stack may be smaller.
template <typename A>
struct ScatterSums {
  A row[kRowSums], row_group[kRowSums], token[kSumBlock], token_group[kSumBlock];
};

// Null where it is not needed.
template <typename T>
struct ScatterGradients {
  T* x;
  T* token;
  T* position;
  T* prefix;
  Accumulator<T>* partial;            // [pieces of the output's rows, D], with `token`
  ScatterSums<Accumulator<T>>* sums;  // [workers]
};

// Rows of the output that one task of the backward takes in every image: a function of the sizes alone, so that a sum
// never depends on the threads.
static inline int64_t rows_per_piece(int64_t rows, int64_t width) {
  const int64_t fit = kRowSums / (width < kSumBlock ? width : kSumBlock), share = (rows + 15) / 16;
  const int64_t each = fit < share ? fit : share;
  return each < 1 ? 1 : each;
}

}  // namespace sslfast

#define SSLFAST_SCATTER_TOKENS_SIGNATURES(T)                                                \
  void scatter_tokens_forward(const ::sslfast::Parallel&, const ::sslfast::ScatterTokens&,  \
                              const ::sslfast::ScatterInputs&, T* out);                     \
  void scatter_tokens_backward(const ::sslfast::Parallel&, const ::sslfast::ScatterTokens&, \
                               const ::sslfast::TokenRows& grad, const ::sslfast::ScatterGradients<T>&);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_SCATTER_TOKENS_SIGNATURES, float, double, bf16, fp16))
