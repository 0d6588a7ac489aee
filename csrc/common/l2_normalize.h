// The arithmetic of row-wise L2-normalisation, one element or one row at a time, for the host and the device:
//     y_i = r_i x_i,   r_i = 1 / max(|x_i|, eps)
//     dx_i = r_i (dy_i − (dy_i·y_i) y_i) where |x_i| > eps,   dx_i = r_i dy_i elsewhere (a constant divisor).
// `A` is the accumulator: float, or double for double elements.
#pragma once
#include "square_root.h"

namespace sslfast {

// One more term of the sum of squares.
template <typename A>
SSLFAST_INLINE A add_square(A sum, A x) {
  return sum + x * x;
}

// r = 1 / max(√sum, eps). A NaN stays NaN, as under clamp_min; an infinite norm gives 0, and 0·∞ = NaN where ∞ was.
template <typename A>
SSLFAST_INLINE A inverse_norm(A sum_of_squares, A eps) {
  const A norm = square_root(sum_of_squares);
  return A(1) / (norm < eps ? eps : norm);
}

template <typename A>
SSLFAST_INLINE A normalized(A x, A r) {
  return x * r;
}

// One more term of dy·y; y = r x is rounded as the forward rounded it, so r² (which overflows sooner) is never formed.
template <typename A>
SSLFAST_INLINE A add_projection(A sum, A dy, A x, A r) {
  return sum + dy * (x * r);
}

// The weight of y in dx: dy·y, or 0 where eps was the divisor. (A NaN norm makes r NaN, and dx with it.)
template <typename A>
SSLFAST_INLINE A projection_weight(A projection, A r, A eps) {
  return r < A(1) / eps ? projection : A(0);
}

template <typename A>
SSLFAST_INLINE A gradient(A dy, A x, A r, A weight) {
  return r * (dy - weight * (x * r));
}

}  // namespace sslfast
