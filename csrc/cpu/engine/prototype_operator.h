// How the operators on student, teacher and prototypes take their arguments. Include it behind #ifdef
// SSLFAST_CPU_DISPATCH.
#pragma once
#include <initializer_list>
#include <vector>

#include "cpu/prototype_cross_entropy.h"
#include "operator.h"

namespace sslfast {

// One side's prototypes as they are given.
struct GivenPrototypes {
  const Tensor& rows;
  const MaybeTensor& gain;
  bool normalize;
};

struct Temperatures {
  double student, teacher;
};

// Contiguous and checked; `input` points into the tensors here, and into the two lists of views.
struct PrototypeArguments {
  Tensor student, teacher, prototypes, teacher_prototypes;
  MaybeTensor gain, teacher_gain, bias, weights;
  ScalarType kind;  // the accumulator's dtype
  PrototypeInput input;

  PrototypeArguments(const Tensor& student_any, const Tensor& teacher_any, const GivenPrototypes& of_student,
                     const GivenPrototypes& of_teacher, const MaybeTensor& bias_any, const MaybeTensor& weights_any,
                     const std::vector<int64_t>& teacher_views, const std::vector<int64_t>& student_views,
                     const Temperatures& temperatures)
      : student(as_contiguous(student_any)),
        teacher(as_contiguous(teacher_any)),
        prototypes(as_contiguous(of_student.rows)),
        teacher_prototypes(as_contiguous(of_teacher.rows)),
        gain(contiguous_or_none(of_student.gain)),
        teacher_gain(contiguous_or_none(of_teacher.gain)),
        bias(contiguous_or_none(bias_any)),
        weights(contiguous_or_none(weights_any)),
        kind(accumulator_type(student)) {
    SSLFAST_CHECK(student.dim() == 3 && teacher.dim() == 3 && student.size(1) == teacher.size(1) &&
                      student.size(2) == teacher.size(2) && student.numel() > 0 && teacher.numel() > 0,
                  "student and teacher must be [views, samples, features] with the same samples and features");
    const int64_t samples = student.size(1), d = student.size(2), k = prototypes.dim() == 2 ? prototypes.size(0) : 0;
    SSLFAST_CHECK(k > 0, "there must be prototypes");
    check_tensor(prototypes, "prototypes", {k, d}, prototypes.scalar_type(), student);
    check_tensor(teacher_prototypes, "teacher_prototypes", {k, d}, teacher_prototypes.scalar_type(), student);
    check_optional(gain, "gain", k, kind, student);
    check_optional(teacher_gain, "teacher_gain", k, kind, student);
    check_optional(bias, "teacher_bias", k, kind, student);
    check_optional(weights, "row_weights", samples, kind, student);
    SSLFAST_CHECK(!student_views.empty() && teacher_views.size() == student_views.size(),
                  "teacher_views and student_views must be lists of the same length");
    check_views(teacher_views, teacher.size(0), "teacher");
    check_views(student_views, student.size(0), "student");
    input = {{rows_of(student, "student"), student.size(0)},
             {rows_of(teacher, "teacher"), teacher.size(0)},
             samples,
             d,
             k,
             {rows_of(prototypes, "prototypes"), data_or_null(gain), of_student.normalize},
             {rows_of(teacher_prototypes, "teacher_prototypes"), data_or_null(teacher_gain), of_teacher.normalize},
             data_or_null(bias),
             data_or_null(weights),
             teacher_views.data(),
             student_views.data(),
             static_cast<int64_t>(student_views.size()),
             temperatures.student,
             temperatures.teacher};
  }
  PrototypeArguments(const PrototypeArguments&) = delete;

  Tensor empty(std::initializer_list<int64_t> shape) const { return allocate(student, shape, kind); }

 private:
  static Rows rows_of(const Tensor& x, const char* name) { return {x.const_data_ptr(), element_type(x, name)}; }

  static void check_views(const std::vector<int64_t>& views, int64_t count, const char* name) {
    SSLFAST_CHECK(count <= kMostViews, name, " must have at most ", kMostViews, " views");
    for (const int64_t view : views) SSLFAST_CHECK(view >= 0 && view < count, name, " has no view ", view);
  }
};

}  // namespace sslfast
