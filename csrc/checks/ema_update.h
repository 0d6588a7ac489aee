// Arguments of ema_update_, checked alike on every device. For registration code alone.
#pragma once
#include <vector>

#include "torch_api.h"

namespace sslfast {
namespace {

// The two tensors' elements lie at the same offsets, without gaps: as flat memory they are the same vector.
bool same_flat_memory(const Tensor& a, const Tensor& b) {
  const int64_t dims = a.dim();
  if (b.dim() != dims) return false;
  int64_t expected = 1, found = 1;  // the next stride, from the innermost dimension outwards
  for (int64_t d = 0; d < dims; ++d) {
    if (a.size(d) != b.size(d) || (a.size(d) > 1 && a.stride(d) != b.stride(d))) return false;
    found *= a.size(d) > 1 ? a.size(d) : 1;
  }
  if (a.numel() == 0) return true;
  while (expected < found) {
    int64_t inner = -1;
    for (int64_t d = 0; d < dims && inner < 0; ++d) {
      if (a.size(d) > 1 && a.stride(d) == expected) inner = d;
    }
    if (inner < 0) return false;
    expected *= a.size(inner);
  }
  return true;
}

struct EmaArguments {
  std::vector<Tensor> averages, students, rounded;  // the last one empty, or as many
  double momentum;
  std::optional<Tensor> moving;  // the momentum, where it is a tensor: [] float64

  // `like` is the first average; there is one.
  const Tensor& like() const { return averages[0]; }

  void check() const {
    SSLFAST_CHECK(!averages.empty(), "averages must not be empty");
    SSLFAST_CHECK(students.size() == averages.size(), "students must be as many as averages, ", averages.size(),
                  ", got ", students.size());
    SSLFAST_CHECK(rounded.empty() || rounded.size() == averages.size(), "rounded must be as many as averages, ",
                  averages.size(), ", or none, got ", rounded.size());
    for (size_t i = 0; i < averages.size(); ++i) {
      check_one("averages", averages[i], averages[i], like());
      check_one("students", students[i], averages[i], students[0]);
      if (!rounded.empty()) check_one("rounded", rounded[i], averages[i], rounded[0]);
    }
    if (!rounded.empty()) {
      const bool wide =
          students[0].scalar_type() == ScalarType::Double || rounded[0].scalar_type() == ScalarType::Double;
      SSLFAST_CHECK(like().scalar_type() == ScalarType::Float && !wide,
                    "rounded copies are of float32 averages, and of students and copies of at most 32 bits");
    }
    if (moving) check_tensor(*moving, "momentum", {}, ScalarType::Double, like());
  }

 private:
  void check_one(const char* name, const Tensor& t, const Tensor& average, const Tensor& first) const {
    SSLFAST_CHECK(same_flat_memory(t, average), name, " must lie in memory as averages do, without gaps");
    SSLFAST_CHECK(t.scalar_type() == first.scalar_type(), name, " must have one dtype");
    SSLFAST_CHECK(t.device() == like().device(), name, " must be on one device");
  }
};

}  // namespace
}  // namespace sslfast
