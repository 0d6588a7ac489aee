// The arithmetic of the cosine of two rows, for the host and the device:
//     c = (p·z) r_p r_z,   r_x = 1 / max(|x|, eps)
//     dc/dp = r_p (z r_z − c p r_p) where |p| > eps,   r_p r_z z elsewhere (a constant divisor); z likewise.
// `A` is the accumulator: float, or double for double elements.
#pragma once
#include "square_root.h"

namespace sslfast {

// Sums over a row.
template <typename A>
struct RowProducts {
  A pp, zz, pz;
};

template <typename A>
SSLFAST_INLINE RowProducts<A> add_products(RowProducts<A> sum, A p, A z) {
  return {sum.pp + p * p, sum.zz + z * z, sum.pz + p * z};
}

// What the backward needs of a row.
template <typename A>
struct Cosine {
  A inv_p, inv_z, value;
};

template <typename A>
SSLFAST_INLINE A clamped_inverse(A sum_of_squares, A eps) {
  const A norm = square_root(sum_of_squares);
  return A(1) / (norm < eps ? eps : norm);  // a NaN stays NaN
}

// r_p goes into the sum first: the product of the two alone could overflow where neither of the rows is large.
template <typename A>
SSLFAST_INLINE Cosine<A> cosine_of(RowProducts<A> sum, A eps) {
  const A inv_p = clamped_inverse(sum.pp, eps), inv_z = clamped_inverse(sum.zz, eps);
  return {inv_p, inv_z, sum.pz * inv_p * inv_z};
}

// The weight of x r_x in the gradient: the cosine, or 0 where eps was the divisor.
template <typename A>
SSLFAST_INLINE A pull(A cosine, A inv_norm, A eps) {
  return inv_norm < A(1) / eps ? cosine : A(0);
}

// d/dx of the cosine times g, for a row x against the row y.
template <typename A>
SSLFAST_INLINE A cosine_gradient(A x, A y, A inv_x, A inv_y, A weight, A g) {
  return g * inv_x * (y * inv_y - weight * (x * inv_x));
}

}  // namespace sslfast
