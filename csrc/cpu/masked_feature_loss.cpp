// The loss of predicted features on the CPU: a teacher's row is read into the cache, normalised there, and compared.
#include "masked_feature_loss.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int64_t kElementBytes[] = {4, 8, 2, 2};

// Where row r's target lies in the teacher, in elements.
inline int64_t offset_of(const FeatureLoss& x, int64_t r) {
  const int64_t image = r / x.pred.per_image % (x.teacher.rows / x.teacher.per_image);
  return image * x.teacher.image_stride + x.ids[r] * x.teacher.row_stride;
}

// Asks for the next row's target while this one is in work. Inlined, since a function that does nothing else is taken
// for one without effect, and its calls are dropped.
static inline __attribute__((always_inline)) void prefetch_after(const FeatureLoss& x, int64_t r) {
  if (r + 1 >= x.pred.rows) return;
  const int64_t size = kElementBytes[x.teacher_type];
  const char* from = static_cast<const char*>(x.teacher.data) + size * offset_of(x, r + 1);
  for (int64_t i = 0; i < size * x.pred.width; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

template <typename P, typename A>
void widen_row(const FeatureLoss& x, int64_t offset, A* __restrict__ out) {
  const P* __restrict__ row = static_cast<const P*>(x.teacher.data) + offset;
  for (int64_t d = 0; d < x.pred.width; ++d) out[d] = A(widen(row[d]));
}

// The target of row r, in the scratch memory of piece p.
template <typename A>
const A* target_of(const FeatureLoss& x, int64_t r, int64_t p) {
  A* out = reinterpret_cast<A*>(x.scratch) + p * x.pred.width;
  const int64_t offset = offset_of(x, r);
  switch (x.teacher_type) {
    case 0: widen_row<float>(x, offset, out); break;
    case 1: widen_row<double>(x, offset, out); break;
    case 2: widen_row<bf16>(x, offset, out); break;
    default: widen_row<fp16>(x, offset, out);
  }
  prefetch_after(x, r);
  if (x.layer_norm) standardise(out, x.pred.width, A(x.eps), kLayerNorm);
  return out;
}

template <typename T>
void forward(const Parallel& parallel, const FeatureLoss& x, Accumulator<T>* of_row) {
  each_row(parallel, x.pred.rows, x.pieces, [&x, of_row](int64_t r, int64_t p) {
    of_row[r] = row_loss(row_of<T>(x.pred, r), target_of<Accumulator<T>>(x, r, p), x.pred.width, x.loss);
  });
}

template <typename T>
void backward(const Parallel& parallel, const FeatureLoss& x, Accumulator<T> scale, T* dpred) {
  each_row(parallel, x.pred.rows, x.pieces, [&x, scale, dpred](int64_t r, int64_t p) {
    const int64_t width = x.pred.width;
    row_gradient(row_of<T>(x.pred, r), target_of<Accumulator<T>>(x, r, p), width, x.loss, scale, dpred + r * width);
  });
}

}  // namespace

SSLFAST_DEFINE_ROW_LOSS(masked_feature_loss, FeatureLoss)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include "checks/masked_feature_loss.h"
#include "cpu/engine/huge_pages.h"
#include "cpu/engine/loss_rows.h"

namespace sslfast {
namespace {

template <typename T>
constexpr int kTypeNumber = 0;
template <>
constexpr int kTypeNumber<double> = 1;
template <>
constexpr int kTypeNumber<bf16> = 2;
template <>
constexpr int kTypeNumber<fp16> = 3;

// Checked arguments, and what they point into.
struct Arguments {
  Tensor pred, teacher, ids, scratch;
  FeatureLoss x;

  Arguments(const Tensor& pred_any, const Tensor& teacher_any, const Tensor& ids_any, int64_t kind, double beta,
            bool layer_norm, double eps)
      : pred(with_rows(pred_any, "pred")),
        teacher(with_rows(teacher_any, "teacher")),
        ids(as_contiguous(ids_any)),
        scratch(pred) {
    check_feature_loss(pred, teacher, ids, kind, beta);
    x.pred = rows_of(pred);
    x.teacher = rows_of(teacher);
    x.ids = const_data<int64_t>(ids);
    check_ids(x.ids, ids.numel(), teacher.size(1));
    x.teacher_type = dispatch_float(teacher, "teacher", [](auto element) { return kTypeNumber<decltype(element)>; });
    x.loss = {static_cast<int>(kind), beta};
    x.layer_norm = layer_norm;
    x.eps = eps;
    x.pieces = pieces_of(x.pred.rows);
    scratch = allocate(pred, {x.pieces * x.pred.width}, accumulator_type(pred));
    x.scratch = static_cast<char*>(scratch.mutable_data_ptr());
  }
};

Tensor masked_feature_loss_cpu(Tensor pred, Tensor teacher, Tensor ids, int64_t kind, double beta, bool layer_norm,
                               double eps) {
  const Arguments arguments(pred, teacher, ids, kind, beta, layer_norm, eps);
  const FeatureLoss& x = arguments.x;
  Tensor loss = allocate(pred, {}, accumulator_type(pred));
  dispatch_float(pred, "pred", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    std::vector<A> of_row(x.pred.rows);
    SSLFAST_CALL(masked_feature_loss_forward, torch_parallel(), x, of_row.data(), static_cast<const T*>(nullptr));
    *mutable_data<A>(loss) = mean_of(of_row, x.pred.rows * x.pred.width);
  });
  return loss;
}

Tensor masked_feature_loss_backward_cpu(Tensor grad_loss, Tensor pred, Tensor teacher, Tensor ids, int64_t kind,
                                        double beta, bool layer_norm, double eps) {
  const Arguments arguments(pred, teacher, ids, kind, beta, layer_norm, eps);
  check_tensor(grad_loss, "grad_loss", {}, accumulator_type(pred), pred);
  Tensor dpred = allocate(pred, {pred.size(0), pred.size(1), pred.size(2)});
  advise_huge_pages(dpred.mutable_data_ptr(), dpred.numel() * static_cast<int64_t>(dpred.element_size()));
  dispatch_float(pred, "pred", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const A scale = *const_data<A>(grad_loss) / static_cast<A>(pred.numel());
    SSLFAST_CALL(masked_feature_loss_backward, torch_parallel(), arguments.x, scale, mutable_data<T>(dpred));
  });
  return dpred;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, masked_feature_loss, masked_feature_loss_backward)
#endif  // SSLFAST_CPU_DISPATCH
