// Second moments of columns on the CPU: see second_moment.h. Both forms are one product of panels, XᵀY over their long
// side, by tiles: primal form takes panels of columns (the tiles are M's), dual form panels of rows (those of the Gram
// matrices). The backward multiplies the matrix with the columns' panels, a block of columns at a time, and takes each
// block through its columns' scale and mean while it is in the cache.
//
// Operations, U = 2·N·D·min(N, D): ½U for each symmetric product, 1U for a moment matrix between two views; backward 1U
// for each view that learns.
#include "cpu/engine/moment_products.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
int64_t second_moment_workspace(const MomentInput& input, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.views[0].type, [&](auto t) { Forward<decltype(t)>(input, threads, arena); });
  return arena.bytes;
}

MomentSums second_moment_forward(const MomentInput& input, const MomentSaved& saved, void* memory,
                                 const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  return with_accumulator(input.views[0].type, [&](auto t) {
    return Forward<decltype(t)>(input, parallel.threads, arena).run(saved, parallel);
  });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

// The arguments that both operators have, contiguous and checked; `input` points into the tensors here.
struct MomentArguments {
  Tensor a;
  MaybeTensor b;
  ScalarType kind;  // the accumulator's dtype
  MomentInput input;

  MomentArguments(const Tensor& a_any, const MaybeTensor& b_any, bool cross, bool center, int64_t scale, double eps,
                  bool dual)
      : a(as_contiguous(a_any)), b(contiguous_or_none(b_any)), kind(accumulator_type(a)) {
    SSLFAST_CHECK(a.dim() == 2 && a.size(0) > 0 && a.size(1) > 0, "a must be two-dimensional and not empty");
    if (b.has_value()) check_tensor(*b, "b", {a.size(0), a.size(1)}, a.scalar_type(), a);
    SSLFAST_CHECK(b.has_value() || !cross, "cross needs b");
    SSLFAST_CHECK(scale >= 0 && scale <= 2, "scale must be 0, 1 or 2, got ", scale);
    const ElementType type = element_type(a, "a");
    input = {{{a.const_data_ptr(), type}, {data_or_null(b), type}},
             a.size(0),
             a.size(1),
             cross,
             center,
             static_cast<ColumnScale>(scale),
             eps,
             dual};
  }
  MomentArguments(const MomentArguments&) = delete;

  Tensor empty(std::initializer_list<int64_t> shape) const { return allocate(a, shape, kind); }
  // `x`, which may be large, on huge pages.
  static Tensor large(Tensor x) {
    advise_huge_pages(x.mutable_data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()));
    return x;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> second_moment_cpu(const Tensor& a, const MaybeTensor& b,
                                                                             bool cross, bool center, int64_t scale,
                                                                             double eps, bool dual, bool keep) {
  const MomentArguments arguments(a, b, cross, center, scale, eps, dual);
  const MomentInput& input = arguments.input;
  const int64_t views = input.view_count(), matrices = input.matrix_count();
  const int64_t items = dual ? input.n : input.d;
  Tensor off = arguments.empty({matrices}), diagonal = arguments.empty({matrices, input.d}),
         distance = arguments.empty({});
  Tensor mean = arguments.empty({views, input.d}), factor = arguments.empty({views, input.d});
  Tensor moments =
      keep ? arguments.large(arguments.empty({dual ? views : matrices, items, items})) : arguments.empty({0});
  const MomentSaved saved{diagonal.mutable_data_ptr(), mean.mutable_data_ptr(), factor.mutable_data_ptr(),
                          data_or_null(moments)};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(arguments.a, SSLFAST_CALL(second_moment_workspace, input, parallel.threads));
  const MomentSums sums = SSLFAST_CALL(second_moment_forward, input, saved, aligned(memory), parallel);
  for (int64_t m = 0; m < matrices; ++m) {
    if (arguments.kind == ScalarType::Double)
      mutable_data<double>(off)[m] = sums.off_diagonal[m];
    else
      mutable_data<float>(off)[m] = static_cast<float>(sums.off_diagonal[m]);
  }
  set_scalar(distance, sums.distance);
  return {off, diagonal, distance, mean, factor, moments};
}

std::tuple<Tensor, Tensor> second_moment_backward_cpu(const Tensor& grad_off, const Tensor& grad_diagonal,
                                                      const Tensor& grad_distance, const Tensor& a,
                                                      const MaybeTensor& b, const Tensor& diagonal, const Tensor& mean,
                                                      const Tensor& factor, const Tensor& moments, bool cross,
                                                      bool center, int64_t scale, double eps, bool dual, bool need_a,
                                                      bool need_b) {
  const MomentArguments arguments(a, b, cross, center, scale, eps, dual);
  const MomentInput& input = arguments.input;
  const int64_t views = input.view_count(), matrices = input.matrix_count(), items = dual ? input.n : input.d;
  Tensor off = as_contiguous(grad_off), grad_entries = as_contiguous(grad_diagonal);
  Tensor sums = as_contiguous(diagonal), means = as_contiguous(mean);
  Tensor factors = as_contiguous(factor), kept = as_contiguous(moments);
  check_tensor(off, "grad_off", {matrices}, arguments.kind, arguments.a);
  check_tensor(grad_entries, "grad_diagonal", {matrices, input.d}, arguments.kind, arguments.a);
  check_tensor(grad_distance, "grad_distance", {}, arguments.kind, arguments.a);
  check_tensor(sums, "diagonal", {matrices, input.d}, arguments.kind, arguments.a);
  check_tensor(means, "mean", {views, input.d}, arguments.kind, arguments.a);
  check_tensor(factors, "factor", {views, input.d}, arguments.kind, arguments.a);
  if (kept.numel() != 0)
    check_tensor(kept, "moments", {dual ? views : matrices, items, items}, arguments.kind, arguments.a);
  auto output = [&](bool wanted) {
    const ScalarType kind = arguments.a.scalar_type();
    return wanted ? arguments.large(allocate(arguments.a, {input.n, input.d}, kind)) : allocate(arguments.a, {0}, kind);
  };
  Tensor da = output(need_a), db = output(need_b && views == 2);
  MomentGradient gradient{
      {0, 0}, scalar(grad_distance), grad_entries.const_data_ptr(), {data_or_null(da), data_or_null(db)}};
  for (int64_t m = 0; m < matrices; ++m)
    gradient.off_diagonal[m] =
        arguments.kind == ScalarType::Double ? const_data<double>(off)[m] : const_data<float>(off)[m];
  const MomentSaved saved{sums.mutable_data_ptr(), means.mutable_data_ptr(), factors.mutable_data_ptr(),
                          data_or_null(kept)};
  const Parallel parallel = torch_parallel();
  const bool have = kept.numel() != 0;
  Tensor memory = scratch(arguments.a, SSLFAST_CALL(second_moment_backward_workspace, input, have, parallel.threads));
  SSLFAST_CALL(second_moment_backward, input, saved, gradient, aligned(memory), parallel);
  return {da, db};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, second_moment, second_moment_backward)
#endif  // SSLFAST_CPU_DISPATCH
