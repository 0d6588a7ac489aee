// sslfast._host: the torch-free module. It tells how the compiled parts were built, and draws masks in NumPy arrays, as
// the workers of a data loader need them.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "build_info.h"

namespace py = pybind11;

namespace sslfast {
void add_masks(py::module_& m);            // masks.cpp
void add_mask_tokens(py::module_& m);      // mask_tokens.cpp
void add_multiblock_mask(py::module_& m);  // multiblock_mask.cpp
}  // namespace sslfast

namespace {

py::object words_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  std::istringstream stream(text);
  py::list words;
  for (std::string word; stream >> word;) words.append(word);
  return words;
}

py::object text_or_none(const std::string& text) {
  if (text.empty()) return py::none();
  return py::str(text);
}

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = SSLFAST_BUILD_VERSION;
  info["torch"] = SSLFAST_BUILD_TORCH;
  info["compiler"] = compiler();
  info["cpu_levels"] = words_or_none(SSLFAST_BUILD_CPU_LEVELS);
  info["cuda_archs"] = words_or_none(SSLFAST_BUILD_CUDA_ARCHS);
  info["nvcc"] = text_or_none(SSLFAST_BUILD_NVCC);
  info["options"] = text_or_none(SSLFAST_BUILD_OPTIONS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the build of sslfast, and masks as NumPy arrays; needs no torch.";
  m.def("build_info", &build_info,
        "How the compiled parts were built: version (of sslfast), torch (compiled against), compiler, cpu_levels "
        "(list),\n"
        "cuda_archs (list, or None without CUDA), nvcc (version or None), options (text or None).");
  sslfast::add_masks(m);
  sslfast::add_mask_tokens(m);
  sslfast::add_multiblock_mask(m);
}
