// BERT's masking of words over NumPy arrays: the row kernel of the CPU operator, without torch.
#define SSLFAST_CPU_LEVEL host
#include "common/mask_tokens_host.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

namespace py = pybind11;

namespace sslfast {
namespace {

template <typename T>
using Rows = py::array_t<T, py::array::c_style>;

template <typename T>
py::tuple mask_tokens(const Rows<T>& ids, const Rows<int64_t>& samples, const std::optional<Rows<bool>>& special,
                      const std::optional<Rows<int64_t>>& word_ids, const std::array<uint64_t, 3>& limits,
                      int64_t mask_id, int64_t vocab_size, int64_t ignore_index, bool exact, int64_t seed,
                      uint32_t epoch, uint32_t view) {
  if (ids.ndim() != 2 || ids.shape(1) > kLongestRow) throw py::value_error("input_ids must be [B, S], S <= 65536");
  const int64_t rows = ids.shape(0), length = ids.shape(1);
  if (samples.size() != rows) throw py::value_error("samples must be as many as the rows");
  if (special && special->size() != ids.size()) throw py::value_error("special must have the shape of input_ids");
  if (word_ids && word_ids->size() != ids.size()) throw py::value_error("word_ids must have the shape of input_ids");
  const TokenRules rules{
      static_cast<uint64_t>(seed), epoch, view, limits[0], limits[1], limits[2], mask_id, vocab_size, ignore_index};
  Rows<T> inputs({rows, length}), labels({rows, length});
  const T* const id = ids.data();
  const int64_t *const sample = samples.data(), *const words = word_ids ? word_ids->data() : nullptr;
  const auto* const apart = special ? reinterpret_cast<const uint8_t*>(special->data()) : nullptr;
  T *const input = inputs.mutable_data(), *const label = labels.mutable_data();
  {
    const py::gil_scoped_release others_run;
    std::vector<uint64_t> ranked(exact ? 2 * length : 0);
    std::vector<uint32_t> list(exact ? length : 0);
    const auto scratch = std::make_unique<TokenScratch>();
    for (int64_t b = 0; b < rows; ++b) {
      const int64_t at = b * length;
      const host::TokenRow<T> row{length,
                                  static_cast<uint64_t>(sample[b]),
                                  id + at,
                                  apart ? apart + at : nullptr,
                                  words ? words + at : nullptr,
                                  input + at,
                                  label + at};
      if (exact)
        host::mask_row_exactly(row, rules, ranked.data(), list.data(), *scratch);
      else
        host::mask_row(row, rules, *scratch);
    }
  }
  return py::make_tuple(inputs, labels);
}

}  // namespace

void add_mask_tokens(py::module_& m) {
  const char* text =
      "Inputs and labels [B, S] of input_ids (int64 or int32); see sslfast.masking.mask_tokens. Arguments as those of "
      "the operator.";
  m.def("mask_tokens", &mask_tokens<int64_t>, py::arg("input_ids").noconvert(), py::arg("samples"), py::arg("special"),
        py::arg("word_ids"), py::arg("limits"), py::arg("mask_id"), py::arg("vocab_size"), py::arg("ignore_index"),
        py::arg("exact"), py::arg("seed"), py::arg("epoch"), py::arg("view"), text);
  m.def("mask_tokens", &mask_tokens<int32_t>, py::arg("input_ids").noconvert(), py::arg("samples"), py::arg("special"),
        py::arg("word_ids"), py::arg("limits"), py::arg("mask_id"), py::arg("vocab_size"), py::arg("ignore_index"),
        py::arg("exact"), py::arg("seed"), py::arg("epoch"), py::arg("view"), text);
}

}  // namespace sslfast
