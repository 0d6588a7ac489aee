// What the kernels of sinkhorn are told.
#pragma once
#include "cpu/engine/logit_rows.h"

namespace sslfast {

// Logits x [B, S, K], row-major without gaps: B rows of each of S positions. In units of log 2,
//     z_bk = log2(e)·(x_bk / τ + f_k).
struct SinkhornRows {
  int64_t batch;  // B, of which the first `rows` count
  int64_t rows;
  int64_t positions;   // S
  int64_t prototypes;  // K
  double factor;       // log2(e) / τ
  int64_t pieces;      // of the rows of a position; each has sums of its own
};

}  // namespace sslfast

#define SSLFAST_SINKHORN_SIGNATURES(T)                                                          \
  void sinkhorn_largest(const ::sslfast::Parallel&, const ::sslfast::SinkhornRows&, const T* x, \
                        ::sslfast::Accumulator<T>* largest, ::sslfast::Accumulator<T>* sums,    \
                        ::sslfast::Accumulator<T>* scratch);                                    \
  void sinkhorn_mass(const ::sslfast::Parallel&, const ::sslfast::SinkhornRows&, const T* x,    \
                     const ::sslfast::Accumulator<T>* bias, ::sslfast::Accumulator<T>* sums,    \
                     ::sslfast::Accumulator<T>* scratch);                                       \
  void sinkhorn_assign(const ::sslfast::Parallel&, const ::sslfast::SinkhornRows&, const T* x,  \
                       const ::sslfast::Accumulator<T>* bias, ::sslfast::Accumulator<T>* out,   \
                       ::sslfast::Accumulator<T>* scratch);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_SINKHORN_SIGNATURES, float, double, bf16, fp16))

namespace sslfast {

inline constexpr int64_t kSinkhornBlock = 16;     // rows whose column maxima are taken together
inline constexpr int64_t kSinkhornColumns = 256;  // columns of such a block

// Numbers of scratch memory that a piece of any visit needs.
inline int64_t sinkhorn_scratch(int64_t prototypes) {
  const int64_t softmax = kSummedRows * (padded_columns(prototypes) + 2 * chunks_of(prototypes)) + kLogitChunk;
  const int64_t block = kSinkhornBlock * kSinkhornColumns;
  return padded_columns(softmax > block ? softmax : block);
}

}  // namespace sslfast
