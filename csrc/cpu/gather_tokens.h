// One call of gather_tokens, and of its backward.
#pragma once
#include "cpu/engine/token_rows.h"

namespace sslfast {

struct GatherTokens {
  int64_t masks, batch;   // S, B
  int64_t length, kept;   // L, K
  int64_t prefix, width;  // P, D
  bool packed;            // x holds the kept rows
  const int64_t* ids;     // [S, B, K]
};

// Null where there is none.
struct GatherInputs {
  TokenRows x;           // [B, L, D], or [B, K, D] if packed
  const void* position;  // [L, D]
  const void* prefix;    // [P, D]
  const void* token;     // [D]
};

// Which rows of the gradient were read from token l of image b: first[b·L + l], next[b·S·K + first], … until −1,
// as s·K + k in ascending order.
struct Readers {
  int32_t* first;  // [B, L]
  int32_t* next;   // [B, S·K]
};

// Null where it is not needed.
template <typename T>
struct GatherGradients {
  T* x;
  T* position;
  T* prefix;
  T* token;
  Accumulator<T>* partial;  // [gather_token_pieces, D], with `token`
};

// Tokens of one task of the sums over the batch: a function of L alone, so that a sum never depends on the threads.
inline constexpr int64_t kTokenPieces = 256;
static inline int64_t tokens_per_piece(int64_t length) {
  const int64_t most = (length + kTokenPieces - 1) / kTokenPieces;
  return most < 4 ? 4 : most;
}

}  // namespace sslfast

#define SSLFAST_GATHER_TOKENS_SIGNATURES(T)                                                \
  void gather_tokens_forward(const ::sslfast::Parallel&, const ::sslfast::GatherTokens&,   \
                             const ::sslfast::GatherInputs&, T* out);                      \
  void gather_tokens_backward(const ::sslfast::Parallel&, const ::sslfast::GatherTokens&,  \
                              const ::sslfast::TokenRows& grad, const ::sslfast::Readers&, \
                              const ::sslfast::GatherGradients<T>&);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_GATHER_TOKENS_SIGNATURES, float, double, bf16, fp16))
