// Rows of predictions against rows of targets that lie in the cache: statistics, the loss of a row and its gradient.
#pragma once
#include "common/patch_target.h"
#include "levels.h"
#include "vec.h"

namespace sslfast {

// Predictions: row r is the image r / per_image; its elements lie side by side.
struct PredictedRows {
  const void* data;
  int64_t rows, per_image, width;
  int64_t image_stride, row_stride;
};

}  // namespace sslfast

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

// A floating-point sum may not be reordered by the compiler, so its order is written down: lane l takes the elements
// l, l + kSumLanes, ...
constexpr int kSumLanes = 64;

template <typename A, typename F>
A sum_of(int64_t count, F term) {
  A lane[kSumLanes] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= count; i += kSumLanes) {
    for (int l = 0; l < kSumLanes; ++l) lane[l] += term(i + l);
  }
  for (int l = 0; i + l < count; ++l) lane[l] += term(i + l);
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

// x ← (x − mean) · factor over `count` numbers: the mean first, then the squares about it, so that nothing cancels.
// What rounding took from the mean (of a flat patch a part of its deviation) is the mean of the differences from it.
template <typename A>
void standardise(A* __restrict__ x, int64_t count, A eps, int kind) {
  const A mean = sum_of<A>(count, [x](int64_t i) { return x[i]; }) / A(count);
  const A rest = sum_of<A>(count, [x, mean](int64_t i) { return x[i] - mean; }) / A(count);
  const A squares = sum_of<A>(count, [=](int64_t i) {
    const A d = (x[i] - mean) - rest;
    return d * d;
  });
  const A factor = target_factor(squares, A(count), eps, kind);
  for (int64_t i = 0; i < count; ++i) x[i] = ((x[i] - mean) - rest) * factor;
}

template <typename F>
void with_kind(int kind, F f) {
  if (kind == kSquared) return f.template operator()<kSquared>();
  if (kind == kAbsolute) return f.template operator()<kAbsolute>();
  return f.template operator()<kSmooth>();
}

template <typename T, typename A>
A row_loss(const T* __restrict__ pred, const A* __restrict__ target, int64_t width, const PointLoss& loss) {
  A sum = 0;
  with_kind(loss.kind, [&]<int kKind>() {
    const A beta = A(loss.beta);
    sum = sum_of<A>(width, [=](int64_t d) { return point_loss<kKind>(A(widen(pred[d])) - target[d], beta); });
  });
  return sum;
}

template <typename T, typename A>
void row_gradient(const T* __restrict__ pred, const A* __restrict__ target, int64_t width, const PointLoss& loss,
                  A scale, T* __restrict__ dpred) {
  with_kind(loss.kind, [&]<int kKind>() {
    const A beta = A(loss.beta);
    for (int64_t d = 0; d < width; ++d) {
      narrow(scale * point_slope<kKind>(A(widen(pred[d])) - target[d], beta), &dpred[d]);
    }
  });
}

template <typename T>
const T* row_of(const PredictedRows& pred, int64_t r) {
  return static_cast<const T*>(pred.data) + r / pred.per_image * pred.image_stride +
         r % pred.per_image * pred.row_stride;
}

// Calls piece(p) for `pieces` pieces of consecutive rows, and in it row(r, p) for each of them.
template <typename F>
void each_row(const Parallel& parallel, int64_t rows, int64_t pieces, F row) {
  auto piece = [&](int64_t p) {
    const int64_t end = (p + 1) * rows / pieces;
    for (int64_t r = p * rows / pieces; r < end; ++r) row(r, p);
  };
  parallel_each(parallel, pieces, piece);
}

}  // namespace
}  // namespace sslfast::SSLFAST_CPU_LEVEL

// The functions op_forward and op_backward of a loss of rows for every element type, which the last pointer tells:
// declared, and defined by templates forward<T> and backward<T> of the same arguments.
#define SSLFAST_ROW_LOSS_SIGNATURES(op, Call, T)                                                                      \
  void op##_forward(const ::sslfast::Parallel&, const ::sslfast::Call&, ::sslfast::Accumulator<T>* of_row, const T*); \
  void op##_backward(const ::sslfast::Parallel&, const ::sslfast::Call&, ::sslfast::Accumulator<T> scale, T* dpred);
#define SSLFAST_ROW_LOSS_FUNCTIONS(op, Call, T)                                                  \
  void op##_forward(const Parallel& parallel, const Call& x, Accumulator<T>* of_row, const T*) { \
    forward<T>(parallel, x, of_row);                                                             \
  }                                                                                              \
  void op##_backward(const Parallel& parallel, const Call& x, Accumulator<T> scale, T* dpred) {  \
    backward<T>(parallel, x, scale, dpred);                                                      \
  }
#define SSLFAST_DECLARE_ROW_LOSS(op, Call)                                                                   \
  SSLFAST_DECLARE(SSLFAST_ROW_LOSS_SIGNATURES(op, Call, float) SSLFAST_ROW_LOSS_SIGNATURES(op, Call, double) \
                      SSLFAST_ROW_LOSS_SIGNATURES(op, Call, bf16) SSLFAST_ROW_LOSS_SIGNATURES(op, Call, fp16))
#define SSLFAST_DEFINE_ROW_LOSS(op, Call)      \
  SSLFAST_ROW_LOSS_FUNCTIONS(op, Call, float)  \
  SSLFAST_ROW_LOSS_FUNCTIONS(op, Call, double) \
  SSLFAST_ROW_LOSS_FUNCTIONS(op, Call, bf16)   \
  SSLFAST_ROW_LOSS_FUNCTIONS(op, Call, fp16)
