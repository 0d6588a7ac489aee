// The gradients of second moments on the CPU: see second_moment.h. With s = 2·d/d off (4· for a matrix with itself),
// Ŷ the partner's columns and M the matrix between a view's partner and itself,
//
//   dX̂ = s·Ŷ offdiag(M) + Ŷ diag(d/d M_ii)  =  s·(ŶŶᵀ X̂ − Ŷ diag(M_ii)) + …
//
// the first in primal, the second in dual form; dX̂ then goes through the columns' scale and mean.
#include "cpu/engine/dual_backward.h"
#include "cpu/engine/primal_backward.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// f(backward) with the algorithm of the input's form and type.
template <typename F>
void with_backward(const MomentInput& input, bool kept, int64_t threads, Arena& arena, F&& f) {
  with_accumulator(input.views[0].type, [&](auto t) {
    using T = decltype(t);
    if (input.dual)
      f(DualBackward<T>(input, kept, threads, arena));
    else
      f(PrimalBackward<T>(input, kept, threads, arena));
  });
}

}  // namespace

int64_t second_moment_backward_workspace(const MomentInput& input, bool kept, int64_t threads) {
  Arena arena{nullptr};
  with_backward(input, kept, threads, arena, [](auto&&) {});
  return arena.bytes;
}

void second_moment_backward(const MomentInput& input, const MomentSaved& saved, const MomentGradient& gradient,
                            void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  with_backward(input, saved.moments != nullptr, parallel.threads, arena,
                [&](auto&& backward) { backward.run(saved, gradient, parallel); });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
