// The loss of predicted features on the GPU: a block of threads takes a teacher's row into shared memory and normalises
// it there. Memory traffic is the bound: predictions and gathered rows are read once each way.
#include "checks/masked_feature_loss.h"
#include "target_rows.h"

namespace sslfast {
namespace {

// The teacher's features [B, L, D]: row ids[r] of the image r / K mod B; the elements of a row lie side by side.
struct FeatureSource {
  const void* data;
  ScalarType type;
  int width;
  int64_t images, length, image_stride, row_stride;
  int64_t per_image;  // K
  const int64_t* ids;
  bool layer_norm;
  double eps;

  __device__ bool counts(int64_t) const { return true; }
  __device__ bool bad(int64_t r) const { return ids[r] < 0 || ids[r] >= length; }

  template <typename P, typename A>
  __device__ void read(int64_t r, A* out) const {
    const P* row = static_cast<const P*>(data) + r / per_image % images * image_stride + ids[r] * row_stride;
    for (int d = threadIdx.x; d < width; d += kRowBlock) out[d] = A(widen(row[d]));
  }

  template <typename A>
  __device__ void fill(int64_t r, A* out) const {
    switch (type) {
      case ScalarType::Float: read<float>(r, out); break;
      case ScalarType::Double: read<double>(r, out); break;
      case ScalarType::BFloat16: read<bf16>(r, out); break;
      default: read<fp16>(r, out);
    }
    if (layer_norm) standardise<A>({out, width, 1, 1, 0}, A(eps), kLayerNorm);
  }
};

// Checked arguments, and what they point into.
struct Arguments {
  Tensor pred, teacher, ids;
  FeatureSource source;
  PredictedRows rows;
  PointLoss point;

  Arguments(const Tensor& pred_any, const Tensor& teacher_any, const Tensor& ids_any, int64_t kind, double beta,
            bool layer_norm, double eps)
      : pred(with_rows(pred_any, "pred")), teacher(with_rows(teacher_any, "teacher")), ids(as_contiguous(ids_any)) {
    check_feature_loss(pred, teacher, ids, kind, beta);
    dispatch_float(teacher, "teacher", [](auto) {});
    rows = rows_of(pred);
    point = {static_cast<int>(kind), beta};
    source = {teacher.const_data_ptr(),
              teacher.scalar_type(),
              rows.width,
              teacher.size(0),
              teacher.size(1),
              teacher.stride(0),
              teacher.stride(1),
              pred.size(1),
              const_data<int64_t>(ids),
              layer_norm,
              eps};
  }
};

Tensor masked_feature_loss_cuda(Tensor pred, Tensor teacher, Tensor ids, int64_t kind, double beta, bool layer_norm,
                                double eps) {
  const Arguments x(pred, teacher, ids, kind, beta, layer_norm, eps);
  const torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  Tensor loss = allocate(pred, {}, accumulator_type(pred)), count = allocate(loss, {});
  dispatch_float(pred, "pred", [&](auto element) {
    launch_loss<decltype(element)>(x.source, x.rows, x.point, nullptr, loss, count, current_stream(pred));
  });
  return loss;
}

Tensor masked_feature_loss_backward_cuda(Tensor grad_loss, Tensor pred, Tensor teacher, Tensor ids, int64_t kind,
                                         double beta, bool layer_norm, double eps) {
  const Arguments x(pred, teacher, ids, kind, beta, layer_norm, eps);
  check_tensor(grad_loss, "grad_loss", {}, accumulator_type(pred), pred);
  const torch::stable::accelerator::DeviceGuard guard(pred.get_device_index());
  Tensor dpred = allocate(pred, {pred.size(0), pred.size(1), pred.size(2)});
  dispatch_float(pred, "pred", [&](auto element) {
    launch_gradient<decltype(element)>(x.source, x.rows, x.point, grad_loss, nullptr, dpred, current_stream(pred));
  });
  return dpred;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, masked_feature_loss, masked_feature_loss_backward)
