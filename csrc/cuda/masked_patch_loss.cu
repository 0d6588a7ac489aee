// The loss of predicted patches on the GPU: a block of threads takes a patch off the image into shared memory, in the
// prediction's order. Memory traffic is the bound: masked patches and their predictions are read once each way.
#include <tuple>
#include <vector>

#include "checks/masked_patch_loss.h"
#include "target_rows.h"

namespace sslfast {
namespace {

constexpr int kMostNumbers = 64;  // channels that mean and std can be given for

// Images [B, C, T, H, W] of any strides (in elements), cut into patches; value = (pixel − mean[c]) · inv_std[c].
struct PatchSource {
  const void* data;
  TargetPixel type;
  int channels, patch[3], grid[3];
  int64_t stride[5];
  int64_t per_image;    // rows of predictions
  const uint8_t* mask;  // [rows], or
  const int64_t* ids;   // [rows]
  int target;
  bool channels_inner, scaled;
  double mean[kMostNumbers], inv_std[kMostNumbers];

  __device__ bool counts(int64_t r) const { return !mask || mask[r]; }
  __device__ bool bad(int64_t r) const {
    return ids && (ids[r] < 0 || ids[r] >= static_cast<int64_t>(grid[0]) * grid[1] * grid[2]);
  }

  template <typename P, typename A>
  __device__ void read(int64_t r, A* out) const {
    const int64_t l = ids ? ids[r] : r % per_image, row = l / grid[2];
    const P* from = static_cast<const P*>(data) + r / per_image * stride[0] + row / grid[1] * patch[0] * stride[2] +
                    row % grid[1] * patch[1] * stride[3] + l % grid[2] * patch[2] * stride[4];
    const int values = patch[0] * patch[1] * patch[2];
    const int step = channels_inner ? channels : 1, apart = channels_inner ? 1 : values;
    for (int i = threadIdx.x; i < values; i += kRowBlock) {
      const int y = i / patch[2];
      const P* pixel = from + y / patch[1] * stride[2] + y % patch[1] * stride[3] + i % patch[2] * stride[4];
      for (int c = 0; c < channels; ++c) {
        A value = pixel_value<A>(pixel[c * stride[1]]);
        if (scaled) value = (value - A(mean[c])) * A(inv_std[c]);
        out[i * step + c * apart] = value;
      }
    }
  }

  template <typename A>
  __device__ void fill(int64_t r, A* out) const {
    switch (type) {
      case kByte: read<uint8_t>(r, out); break;
      case kFloat: read<float>(r, out); break;
      case kDouble: read<double>(r, out); break;
      case kBrain: read<bf16>(r, out); break;
      default: read<fp16>(r, out);
    }
    // One group of all channels, or a group each.
    const int values = patch[0] * patch[1] * patch[2], groups = target == kChannelNorm ? channels : 1;
    const int step = channels_inner ? channels : 1, apart = channels_inner ? 1 : values;
    for (int g = 0; g < (target == kPlain ? 0 : groups); ++g) {
      standardise<A>({out + g * apart, values, step, channels / groups, apart}, A(1e-6), target);
    }
  }
};

// Checked arguments, and what they point into.
struct Arguments {
  Tensor pred, index;
  PatchSource source = {};
  PredictedRows rows;
  PointLoss point;

  Arguments(const Tensor& images, const Tensor& pred_any, const Tensor& index_any, const std::vector<int64_t>& patch,
            int64_t kind, int64_t target, const std::vector<double>& mean, const std::vector<double>& std,
            bool channels_inner)
      : pred(with_rows(pred_any, "pred")), index(as_contiguous(index_any)) {
    const PatchLossShape shape = patch_loss_shape(images, pred, index, patch, kind, target, mean, std);
    const bool masked = shape.masked;
    for (int d = 0; d < 3; ++d) {
      source.patch[d] = static_cast<int>(patch[d]);
      source.grid[d] = static_cast<int>(shape.grid[d]);
    }
    rows = rows_of(pred);
    point = {static_cast<int>(kind), 1.0};
    source.data = images.const_data_ptr();
    source.type = target_pixel(images);
    source.channels = static_cast<int>(shape.channels);
    for (int d = 0; d < 5; ++d) source.stride[d] = images.stride(d);
    source.per_image = pred.size(1);
    source.mask = masked ? static_cast<const uint8_t*>(index.const_data_ptr()) : nullptr;
    source.ids = masked ? nullptr : const_data<int64_t>(index);
    source.target = static_cast<int>(target);
    source.channels_inner = channels_inner;
    source.scaled = !mean.empty() || !std.empty();
    if (source.scaled) set_numbers(mean, std, static_cast<size_t>(shape.channels));
  }

  void set_numbers(const std::vector<double>& mean, const std::vector<double>& std, size_t channels) {
    SSLFAST_CHECK(channels <= kMostNumbers, "mean and std must be of at most ", kMostNumbers, " channels");
    for (size_t c = 0; c < channels; ++c) {
      source.mean[c] = mean.empty() ? 0.0 : mean[c];
      source.inv_std[c] = std.empty() ? 1.0 : 1.0 / std[c];
    }
  }
};

std::tuple<Tensor, Tensor> masked_patch_loss_cuda(Tensor images, Tensor pred, Tensor index, std::vector<int64_t> patch,
                                                  int64_t kind, int64_t target, std::vector<double> mean,
                                                  std::vector<double> std, bool channels_inner) {
  const Arguments x(images, pred, index, patch, kind, target, mean, std, channels_inner);
  const torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  Tensor loss = allocate(pred, {}, accumulator_type(pred)), count = allocate(loss, {});
  dispatch_float(pred, "pred", [&](auto element) {
    launch_loss<decltype(element)>(x.source, x.rows, x.point, x.source.mask, loss, count, current_stream(pred));
  });
  return {loss, count};
}

Tensor masked_patch_loss_backward_cuda(Tensor grad_loss, Tensor images, Tensor pred, Tensor index, Tensor count,
                                       std::vector<int64_t> patch, int64_t kind, int64_t target,
                                       std::vector<double> mean, std::vector<double> std, bool channels_inner) {
  const Arguments x(images, pred, index, patch, kind, target, mean, std, channels_inner);
  check_patch_gradient(grad_loss, count, pred);
  const torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  Tensor dpred = allocate(pred, {pred.size(0), pred.size(1), pred.size(2)});
  dispatch_float(pred, "pred", [&](auto element) {
    launch_gradient<decltype(element)>(x.source, x.rows, x.point, grad_loss, &count, dpred, current_stream(pred));
  });
  return dpred;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, masked_patch_loss, masked_patch_loss_backward)
