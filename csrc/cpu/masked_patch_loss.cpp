// The loss of predicted patches on the CPU: a masked patch is read from the image into the cache, brought into the
// prediction's order there, and compared; nothing of the size of the images is written, and no other patch is read.
#include "masked_patch_loss.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

// One channel of a patch, row by row of its pixels.
template <typename P, typename A>
void read_plane(const TargetImages& x, const P* __restrict__ from, A mean, A inv_std, A* __restrict__ out) {
  const int64_t width = x.patch[2], step = x.stride[4];
  for (int64_t t = 0; t < x.patch[0]; ++t) {
    for (int64_t y = 0; y < x.patch[1]; ++y, out += width) {
      const P* __restrict__ strip = from + t * x.stride[2] + y * x.stride[3];
      if (step == 1) {
        for (int64_t i = 0; i < width; ++i) out[i] = (pixel_value<A>(strip[i]) - mean) * inv_std;
      } else {
        for (int64_t i = 0; i < width; ++i) out[i] = (pixel_value<A>(strip[i * step]) - mean) * inv_std;
      }
    }
  }
}

// Where the patch starts, in elements.
int64_t start_of(const TargetImages& x, int64_t image, int64_t patch) {
  const int64_t row = patch / x.grid[2];
  return image * x.stride[0] + row / x.grid[1] * x.patch[0] * x.stride[2] + row % x.grid[1] * x.patch[1] * x.stride[3] +
         patch % x.grid[2] * x.patch[2] * x.stride[4];
}

template <typename P, typename A>
void read_planes(const TargetImages& x, int64_t image, int64_t patch, A* out) {
  const P* from = static_cast<const P*>(x.data) + start_of(x, image, patch);
  for (int64_t c = 0; c < x.channels; ++c) {
    read_plane(x, from + c * x.stride[1], A(x.mean[c]), A(x.inv_std[c]), out + c * values_of(x));
  }
}

constexpr int64_t kLine = 64;  // bytes of a cache line

// Inlined, since a function that does nothing else is taken for one without effect, and its calls are dropped.
static inline __attribute__((always_inline)) void prefetch_line_by_line(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

// Asks for the next patch while this one is in work: its strips are too short and too far apart for the processor to
// foresee them.
template <typename T>
static inline __attribute__((always_inline)) void prefetch_after(const PatchLoss& x, int64_t r) {
  do {
    if (++r >= x.pred.rows) return;
  } while (x.mask && !x.mask[r]);
  const TargetImages& of = x.images;
  const int64_t image = r / x.pred.per_image, size = kPixelBytes[of.type];
  const char* from =
      static_cast<const char*>(of.data) + size * start_of(of, image, x.ids ? x.ids[r] : r % x.pred.per_image);
  const int64_t step = size * of.stride[4];
  if (step > kLine) return;              // every pixel has a line of its own: more of them than are worth asking for
  const bool apart = of.stride[1] != 1;  // else the channels of a pixel lie side by side
  for (int64_t c = 0; c < (apart ? of.channels : 1); ++c) {
    for (int64_t t = 0; t < of.patch[0]; ++t) {
      for (int64_t y = 0; y < of.patch[1]; ++y) {
        const char* strip = from + size * (c * of.stride[1] + t * of.stride[2] + y * of.stride[3]);
        prefetch_line_by_line(strip, (of.patch[2] - 1) * step + 1);
      }
    }
  }
  prefetch_line_by_line(reinterpret_cast<const char*>(row_of<T>(x.pred, r)), sizeof(T) * x.pred.width);
}

template <typename A>
void read_patch(const TargetImages& x, int64_t image, int64_t patch, A* out) {
  switch (x.type) {
    case kByte: return read_planes<uint8_t>(x, image, patch, out);
    case kFloat: return read_planes<float>(x, image, patch, out);
    case kDouble: return read_planes<double>(x, image, patch, out);
    case kBrain: return read_planes<bf16>(x, image, patch, out);
    default: return read_planes<fp16>(x, image, patch, out);
  }
}

// Vector j of three: element e = j·lanes + l of r₀g₀b₀r₁g₁b₁… is channel e mod 3 of pixel e div 3.
template <int j, typename A>
static inline __attribute__((always_inline)) vec<A> third(vec<A> r, vec<A> g, vec<A> b) {
  constexpr int L = kLanes<A>;
#if defined(__clang__)
  vec<A> out = r;
  for (int l = 0; l < L; ++l) {
    const int e = j * L + l;
    out[l] = e % 3 == 0 ? r[e / 3] : e % 3 == 1 ? g[e / 3] : b[e / 3];
  }
  return out;
#else
  typename Vec<A>::mask first, second;
  for (int l = 0; l < L; ++l) {
    const int e = j * L + l;
    first[l] = e % 3 == 1 ? L + e / 3 : e / 3;
    second[l] = e % 3 == 2 ? L + e / 3 : l;
  }
  return __builtin_shuffle(__builtin_shuffle(r, g, first), b, second);
#endif
}

// out[i·channels + c] = planes[c·values + i].
template <typename A>
void interleave(const A* __restrict__ planes, int64_t values, int64_t channels, A* __restrict__ out) {
  int64_t i = 0;
  if (channels == 3) {
    constexpr int L = kLanes<A>;
    for (; i + L <= values; i += L) {
      const vec<A> r = load(planes + i), g = load(planes + values + i), b = load(planes + 2 * values + i);
      store(out + 3 * i, third<0, A>(r, g, b));
      store(out + 3 * i + L, third<1, A>(r, g, b));
      store(out + 3 * i + 2 * L, third<2, A>(r, g, b));
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t k = i; k < values; ++k) out[k * channels + c] = planes[c * values + k];
  }
}

// The target of row r, in the prediction's order; in the scratch memory of piece p.
template <typename T, typename A = Accumulator<T>>
const A* target_of(const PatchLoss& x, int64_t r, int64_t p) {
  const TargetImages& images = x.images;
  const int64_t width = x.pred.width, values = values_of(images);
  A* planes = reinterpret_cast<A*>(x.scratch) + 2 * p * width;
  read_patch(images, r / x.pred.per_image, x.ids ? x.ids[r] : r % x.pred.per_image, planes);
  prefetch_after<T>(x, r);
  if (x.target == kPatchNorm) standardise(planes, width, A(x.eps), kPatchNorm);
  if (x.target == kChannelNorm) {
    for (int64_t c = 0; c < images.channels; ++c) standardise(planes + c * values, values, A(x.eps), kChannelNorm);
  }
  if (!x.channels_inner || images.channels == 1) return planes;
  interleave(planes, values, images.channels, planes + width);
  return planes + width;
}

template <typename T>
void forward(const Parallel& parallel, const PatchLoss& x, Accumulator<T>* of_row) {
  using A = Accumulator<T>;
  each_row(parallel, x.pred.rows, x.pieces, [&x, of_row](int64_t r, int64_t p) {
    const bool counts = !x.mask || x.mask[r];
    of_row[r] = counts ? row_loss(row_of<T>(x.pred, r), target_of<T>(x, r, p), x.pred.width, x.loss) : A(0);
  });
}

template <typename T>
void backward(const Parallel& parallel, const PatchLoss& x, Accumulator<T> scale, T* dpred) {
  each_row(parallel, x.pred.rows, x.pieces, [&x, scale, dpred](int64_t r, int64_t p) {
    T* out = dpred + r * x.pred.width;
    if (x.mask && !x.mask[r]) {
      __builtin_memset(out, 0, sizeof(T) * static_cast<uint64_t>(x.pred.width));
    } else {
      row_gradient(row_of<T>(x.pred, r), target_of<T>(x, r, p), x.pred.width, x.loss, scale, out);
    }
  });
}

}  // namespace

SSLFAST_DEFINE_ROW_LOSS(masked_patch_loss, PatchLoss)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <tuple>
#include <vector>

#include "checks/masked_patch_loss.h"
#include "cpu/engine/huge_pages.h"
#include "cpu/engine/loss_rows.h"

namespace sslfast {
namespace {

// Checked arguments, and what they point into.
struct Arguments {
  Tensor pred, index, scratch;
  std::vector<double> mean, inv_std;
  PatchLoss x;

  Arguments(const Tensor& images, const Tensor& pred_any, const Tensor& index_any, const std::vector<int64_t>& patch,
            int64_t kind, int64_t target, const std::vector<double>& mean_any, const std::vector<double>& std,
            bool channels_inner)
      : pred(with_rows(pred_any, "pred")), index(as_contiguous(index_any)), scratch(index) {
    const PatchLossShape shape = patch_loss_shape(images, pred, index, patch, kind, target, mean_any, std);
    TargetImages& source = x.images;
    source.data = images.const_data_ptr();
    source.type = target_pixel(images);
    source.channels = shape.channels;
    for (int d = 0; d < 3; ++d) {
      source.patch[d] = patch[d];
      source.grid[d] = shape.grid[d];
    }
    for (int d = 0; d < 5; ++d) source.stride[d] = images.stride(d);
    const bool masked = shape.masked;
    x.pred = rows_of(pred);
    x.mask = masked ? static_cast<const uint8_t*>(index.const_data_ptr()) : nullptr;
    x.ids = masked ? nullptr : const_data<int64_t>(index);
    if (!masked) check_ids(x.ids, index.numel(), shape.patches);
    mean = mean_any.empty() ? std::vector<double>(shape.channels, 0.0) : mean_any;
    inv_std = std.empty() ? std::vector<double>(shape.channels, 1.0) : std;
    if (!std.empty()) {
      for (double& s : inv_std) s = 1.0 / s;
    }
    source.mean = mean.data();
    source.inv_std = inv_std.data();
    x.loss = {static_cast<int>(kind), 1.0};
    x.target = static_cast<int>(target);
    x.eps = 1e-6;
    x.channels_inner = channels_inner;
    x.pieces = pieces_of(x.pred.rows);
    scratch = allocate(pred, {2 * x.pieces * x.pred.width}, accumulator_type(pred));
    x.scratch = static_cast<char*>(scratch.mutable_data_ptr());
  }
};

std::tuple<Tensor, Tensor> masked_patch_loss_cpu(Tensor images, Tensor pred, Tensor index, std::vector<int64_t> patch,
                                                 int64_t kind, int64_t target, std::vector<double> mean,
                                                 std::vector<double> std, bool channels_inner) {
  const Arguments arguments(images, pred, index, patch, kind, target, mean, std, channels_inner);
  const PatchLoss& x = arguments.x;
  int64_t count = x.pred.rows;
  if (x.mask) count = std::count_if(x.mask, x.mask + x.pred.rows, [](uint8_t m) { return m != 0; });
  Tensor loss = allocate(pred, {}, accumulator_type(pred)), counted = torch::stable::empty_like(loss);
  dispatch_float(pred, "pred", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    std::vector<A> of_row(x.pred.rows);
    SSLFAST_CALL(masked_patch_loss_forward, torch_parallel(), x, of_row.data(), static_cast<const T*>(nullptr));
    *mutable_data<A>(loss) = mean_of(of_row, count * x.pred.width);
    *mutable_data<A>(counted) = static_cast<A>(count);
  });
  return {loss, counted};
}

Tensor masked_patch_loss_backward_cpu(Tensor grad_loss, Tensor images, Tensor pred, Tensor index, Tensor count,
                                      std::vector<int64_t> patch, int64_t kind, int64_t target,
                                      std::vector<double> mean, std::vector<double> std, bool channels_inner) {
  const Arguments arguments(images, pred, index, patch, kind, target, mean, std, channels_inner);
  check_patch_gradient(grad_loss, count, pred);
  Tensor dpred = allocate(pred, {pred.size(0), pred.size(1), pred.size(2)});
  advise_huge_pages(dpred.mutable_data_ptr(), dpred.numel() * static_cast<int64_t>(dpred.element_size()));
  dispatch_float(pred, "pred", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const A scale = *const_data<A>(grad_loss) / (*const_data<A>(count) * static_cast<A>(pred.size(2)));
    SSLFAST_CALL(masked_patch_loss_backward, torch_parallel(), arguments.x, scale, mutable_data<T>(dpred));
  });
  return dpred;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, masked_patch_loss, masked_patch_loss_backward)
#endif  // SSLFAST_CPU_DISPATCH
