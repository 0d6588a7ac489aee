// Masks in NumPy arrays, for the workers of a data loader: one thread, and the interpreter is free meanwhile.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>

#include "common/masks_host.h"

namespace py = pybind11;

namespace sslfast {
void add_masks(py::module_& m);
}

namespace {

using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

template <typename T>
using Numbers = py::array_t<T, py::array::c_style | py::array::forcecast>;

void check(const std::string& wrong) {
  if (!wrong.empty()) throw std::invalid_argument("sslfast: " + wrong);
}

py::tuple random_mask(const Ids& samples, const std::vector<int64_t>& grid, int64_t kept,
                      const std::vector<int64_t>& unit, const std::optional<Numbers<float>>& noise, bool ascending,
                      int64_t seed, int64_t epoch, int64_t view) {
  sslfast::RandomMask mask{};
  check(sslfast::make_random_mask(grid, unit, kept, ascending, seed, epoch, view, &mask));
  const py::ssize_t count = samples.size(), units = mask.units, cells = sslfast::cells_of(mask.shape);
  if (noise && (noise->ndim() != 2 || noise->shape(0) != count || noise->shape(1) != units)) {
    throw std::invalid_argument("sslfast: noise must be [samples, units]");
  }
  const py::ssize_t keep_size = kept * (cells / units);
  py::array_t<int64_t> keep({count, keep_size}), masked({count, cells - keep_size}), restore({count, cells});
  const int64_t* sample = samples.data();
  const float* of_noise = noise ? noise->data() : nullptr;
  int64_t *keep_row = keep.mutable_data(), *masked_row = masked.mutable_data(), *restore_row = restore.mutable_data();
  {
    const py::gil_scoped_release released;
    sslfast::make_tables(&mask);
    sslfast::MaskScratch scratch;
    for (py::ssize_t b = 0; b < count; ++b) {
      sslfast::random_mask_image(mask, sample[b], of_noise ? of_noise + b * units : nullptr, scratch,
                                 keep_row + b * keep_size, masked_row + b * (cells - keep_size),
                                 restore_row + b * cells);
    }
  }
  return py::make_tuple(keep, masked, restore);
}

py::array_t<bool> block_mask(const Ids& samples, const Numbers<double>& counts, const std::vector<int64_t>& grid,
                             const std::vector<double>& area, const std::vector<double>& log_aspect, int64_t tries,
                             bool complete, int64_t seed, int64_t epoch, int64_t view) {
  sslfast::BlockRule rule{};
  check(sslfast::make_block_rule(grid, area, log_aspect, tries, complete, &rule));
  if (counts.size() != samples.size()) throw std::invalid_argument("sslfast: counts must be as many as the samples");
  const py::ssize_t count = samples.size(), patches = grid[0] * grid[1];
  py::array_t<bool> mask({count, patches});
  const int64_t* sample = samples.data();
  const double* wanted = counts.data();
  auto* row = reinterpret_cast<uint8_t*>(mask.mutable_data());
  {
    const py::gil_scoped_release released;
    sslfast::MaskScratch scratch;
    for (py::ssize_t b = 0; b < count; ++b) {
      const sslfast::Stream stream{static_cast<uint64_t>(seed), static_cast<uint64_t>(sample[b]),
                                   static_cast<uint32_t>(epoch),
                                   sslfast::kBlockMaskStream + static_cast<uint32_t>(view)};
      sslfast::block_mask_image(stream, rule, wanted[b], scratch, row + b * patches);
    }
  }
  return mask;
}

}  // namespace

void sslfast::add_masks(py::module_& m) {
  using py::literals::operator""_a;
  m.def("random_mask", &random_mask, "samples"_a, "grid"_a, "kept"_a, "unit"_a, "noise"_a, "ascending"_a, "seed"_a,
        "epoch"_a, "view"_a, "sslfast.masking.random_masks of NumPy samples: (keep, masked, restore).");
  m.def("block_mask", &block_mask, "samples"_a, "counts"_a, "grid"_a, "area"_a, "log_aspect"_a, "tries"_a, "complete"_a,
        "seed"_a, "epoch"_a, "view"_a, "sslfast.masking.block_masks of NumPy samples: [B, patches].");
}
