// What the kernels of mean_assignment are told.
#pragma once
#include "common/mean_assignment.h"
#include "cpu/engine/logit_rows.h"

namespace sslfast {

// Logits x [B, K] without gaps, with y = log2(e)·x/τ relative to a base of each row.
struct AssignedRows {
  int64_t batch;  // B, of which the first `rows` count
  int64_t rows;
  int64_t prototypes;   // K
  int64_t target_rows;  // row b has the target b mod target_rows
  int64_t pieces;       // of the rows; each has sums of its own
  double factor;        // log2(e)/τ
  const void* logits;
  const void* targets;  // accumulators [target_rows, K], or none
  const void* weights;  // accumulators [B] of the rows in the sums, or none: 1
};

// Gradients that are there: of the sums (up to a whole vector), and of each row's two numbers.
template <typename A>
struct AssignmentGrads {
  const A *sums, *cross_entropy, *entropy;
};

// Numbers of scratch memory of a piece forward, or of a worker backward: exponentials of whole rows, their chunks'
// weights and maxima, and a chunk each of logits, raw numbers and a target.
inline int64_t assignment_scratch(int64_t prototypes) {
  const int64_t chunks = chunks_of(prototypes);
  return padded_columns(kSummedRows * (padded_columns(prototypes) + chunks) + chunks + 3 * kLogitChunk);
}

}  // namespace sslfast

#define SSLFAST_ASSIGNMENT_SIGNATURES(T)                                                                \
  void assignment_forward(const ::sslfast::Parallel&, const ::sslfast::AssignedRows&,                   \
                          ::sslfast::Accumulator<T>* scratch, ::sslfast::Accumulator<T>* sums,          \
                          ::sslfast::Accumulator<T>* cross_entropy, ::sslfast::Accumulator<T>* entropy, \
                          ::sslfast::AssignmentStats<::sslfast::Accumulator<T>>* stats, const T*);      \
  void assignment_backward(const ::sslfast::Parallel&, const ::sslfast::AssignedRows&,                  \
                           ::sslfast::Accumulator<T>* scratch,                                          \
                           const ::sslfast::AssignmentGrads<::sslfast::Accumulator<T>>&,                \
                           const ::sslfast::AssignmentStats<::sslfast::Accumulator<T>>* stats, T* dlogits);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_ASSIGNMENT_SIGNATURES, float, double, bf16, fp16))
