// Arguments of distillation_cross_entropy, checked alike on every device. For registration code alone.
#pragma once
#include <cmath>
#include <optional>
#include <vector>

#include "torch_api.h"

namespace sslfast {

struct Distilled {
  double student_temperature, teacher_temperature;
  bool ignore_diagonal, assigned;
};

namespace {

int64_t check_views(const std::vector<Tensor>& views, const char* name, int64_t rows, const Tensor& like) {
  int64_t count = 0;
  for (const Tensor& x : views) {
    SSLFAST_CHECK(x.dim() == 3, name, " must have three dimensions, got ", x.dim());
    check_tensor(x, name, {x.size(0), rows, like.size(2)}, like.scalar_type(), like);
    count += x.size(0);
  }
  SSLFAST_CHECK(count > 0, name, " must have at least one view");
  return count;
}

void check_distillation(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers,
                        const std::optional<Tensor>& bias, const Distilled& how, const std::optional<Tensor>& rows,
                        const std::optional<Tensor>& teacher_rows) {
  SSLFAST_CHECK(!students.empty() && !teachers.empty(), "student and teacher must have at least one view");
  SSLFAST_CHECK(students[0].dim() == 3, "student must have three dimensions, got ", students[0].dim());
  SSLFAST_CHECK(teachers[0].dim() == 3, "teacher must have three dimensions, got ", teachers[0].dim());
  const int64_t batch = students[0].size(1);
  check_views(students, "student", batch, students[0]);
  const int64_t count = check_views(teachers, "teacher", teacher_rows ? teachers[0].size(1) : batch, students[0]);
  for (const double temperature : {how.student_temperature, how.teacher_temperature}) {
    SSLFAST_CHECK(std::isfinite(temperature) && temperature != 0, "temperatures must be finite and not zero, got ",
                  temperature);
  }
  if (rows) check_tensor(*rows, "rows", {}, ScalarType::Long, students[0]);
  if (teacher_rows) check_tensor(*teacher_rows, "teacher_rows", {batch}, ScalarType::Long, students[0]);
  if (!bias) return;
  SSLFAST_CHECK(bias->dim() == 3 && (bias->size(0) == 1 || bias->size(0) == count) && bias->size(1) > 0,
                "bias must be [teachers or 1, positions, prototypes]");
  check_tensor(*bias, "bias", {bias->size(0), bias->size(1), students[0].size(2)}, accumulator_type(students[0]),
               students[0]);
}

}  // namespace
}  // namespace sslfast
