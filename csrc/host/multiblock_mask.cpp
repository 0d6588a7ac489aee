// I-JEPA's multi-block masks over NumPy arrays, without torch.
#include "common/multiblock_mask.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace sslfast {
namespace {

using Ids = py::array_t<int64_t, py::array::c_style>;

py::tuple multiblock_mask(const Ids& samples, const std::vector<int64_t>& grid, int64_t targets,
                          const std::vector<int64_t>& target_block, const std::vector<int64_t>& context_block,
                          int64_t kept, int64_t min_keep, bool allow_overlap, bool upstream, int64_t seed,
                          int64_t epoch, int64_t view) {
  if (samples.ndim() != 1) throw py::value_error("samples must be a vector");
  if (!fits(grid, targets, target_block, context_block, kept, upstream)) throw py::value_error(kMultiBlockLimits);
  const MultiBlockRules rules =
      rules_of(grid, targets, target_block, context_block, kept, min_keep, allow_overlap, upstream, seed, epoch, view);
  const int64_t count = samples.size(), of_target = target_block[0] * target_block[1];
  Ids context({count, kept}), target({targets, count, of_target}), counts(count);
  const int64_t* const sample = samples.data();
  int64_t *const context_out = context.mutable_data(), *const target_out = target.mutable_data();
  int64_t* const counts_out = counts.mutable_data();
  {
    const py::gil_scoped_release others_run;
    MultiBlockScratch scratch;
    for (int64_t b = 0; b < count; ++b)
      counts_out[b] = multiblock_sample(rules, static_cast<uint64_t>(sample[b]), context_out + b * kept,
                                        target_out + b * of_target, count * of_target, scratch);
  }
  return py::make_tuple(context, target, counts);
}

}  // namespace

void add_multiblock_mask(py::module_& m) {
  m.def("multiblock_mask", &multiblock_mask, py::arg("samples"), py::arg("grid"), py::arg("targets"),
        py::arg("target_block"), py::arg("context_block"), py::arg("kept"), py::arg("min_keep"),
        py::arg("allow_overlap"), py::arg("upstream"), py::arg("seed"), py::arg("epoch"), py::arg("view"),
        "Context [B, kept], targets [T, B, patches of one] and the contexts' own sizes [B], int64. Arguments as those "
        "of the operator; see sslfast.masking.multiblock_masks.");
}

}  // namespace sslfast
