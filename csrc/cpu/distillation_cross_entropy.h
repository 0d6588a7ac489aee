// What the kernels of distillation_cross_entropy are told.
#pragma once
#include "cpu/engine/logit_rows.h"

namespace sslfast {

// Views of B samples, each a matrix [B, K] without gaps: S of the student, T of the teacher (of R rows, if row b of the
// student meets row teacher_rows[b] of it). In units of log 2
//     y = log2(e)·student / τs,   z = log2(e)·(teacher / τt + bias);
// `assigned`: the teacher's numbers are the target itself, and neither τt nor bias is used.
struct DistillationRows {
  int64_t batch;  // B, of which the first `rows` count
  int64_t rows;
  int64_t prototypes;  // K
  int students, teachers;
  const void* const* student;  // [S]
  const void* const* teacher;  // [T]
  double student_factor, teacher_factor;
  const void* bias;              // accumulators [T or 1, P, K], or none: a teacher's row r takes r mod P
  int64_t bias_rows, bias_view;  // P, and from one view's bias to the next
  bool ignore_diagonal;          // the pairs of view t with view t
  bool assigned;
  const int64_t* teacher_rows;  // [B] of 0 … R − 1, or none: b itself
  int64_t teacher_row(int64_t b) const { return teacher_rows ? teacher_rows[b] : b; }
  bool pair(int t, int s) const { return !(ignore_diagonal && t == s); }
};

// Numbers of scratch memory for each worker: a chunk of every teacher, of one student and of raw numbers, the running
// values of every view and the dot products of every pair.
inline int64_t distillation_scratch(const DistillationRows& x) {
  return (x.teachers + 3) * kLogitChunk + padded_columns(3 * (x.students + x.teachers) + x.students * x.teachers);
}

}  // namespace sslfast

// Statistics of a row of a view: {base, log2 Σ 2^(y − base)}; of a target that is given {0, Σ}.
#define SSLFAST_DISTILLATION_SIGNATURES(T)                                                                      \
  void distillation_forward(const ::sslfast::Parallel&, const ::sslfast::DistillationRows&,                     \
                            ::sslfast::Accumulator<T>* scratch, ::sslfast::Accumulator<T>* of_row,              \
                            ::sslfast::Accumulator<T>* student_stats, ::sslfast::Accumulator<T>* teacher_stats, \
                            const T*);                                                                          \
  void distillation_backward(const ::sslfast::Parallel&, const ::sslfast::DistillationRows&,                    \
                             ::sslfast::Accumulator<T>* scratch, const ::sslfast::Accumulator<T>* grad_of_row,  \
                             const ::sslfast::Accumulator<T>* student_stats,                                    \
                             const ::sslfast::Accumulator<T>* teacher_stats, T* const* dstudent);
SSLFAST_DECLARE(SSLFAST_EACH(SSLFAST_DISTILLATION_SIGNATURES, float, double, bf16, fp16))
