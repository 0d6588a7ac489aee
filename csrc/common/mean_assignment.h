// What the CPU's and the GPU's gradient of mean_assignment share. For the host and the device.
#pragma once
#include "half.h"

namespace sslfast {

// A row's statistics, as the forward leaves them: its numbers are relative to a base,
//     y_k = log2(e)·x_k/τ − base,   log_sum = log2 Σ 2^y,   p_k = 2^(y_k − log_sum);
// mass = Σ_k t_k of its target, entropy = −Σ_k p_k ln p_k.
template <typename A>
struct AssignmentStats {
  A base, log_sum, mass, entropy;
};
inline constexpr int64_t kAssignmentStats = 4;
inline constexpr double kLeastLogarithm = -1100;  // log2 of less than any number: so much for p = 0, whose p·ln p is 0

// The gradient of one row's logits, for g = d/d(cross entropy), h = d/d(entropy) and w·v = d/dp:
//     dx_k = p_k·((g·mass − w<p, v> − h·entropy)/τ + w/τ·v_k − h/τ·ln p_k) − g/τ·t_k
template <typename A>
struct AssignmentGradient {
  A own, mean, target, entropy;

  // `dot`: <p, v>; `per_logit`: 1/τ. ln p = ln 2·(y − log_sum).
  SSLFAST_INLINE AssignmentGradient of(const AssignmentStats<A>& row, A g, A h, A w, A dot, A per_logit) {
    return {(g * row.mass - w * dot - h * row.entropy) * per_logit, w * per_logit, g * per_logit,
            h * per_logit * A(0.69314718055994530942)};
  }
  // V: A, or a vector of them; `log_p`: log2 p.
  template <typename V>
  SSLFAST_INLINE V at(const AssignmentGradient& row, V p, V log_p, V v, V t) {
    return p * (row.own + row.mean * v - row.entropy * log_p) - row.target * t;
  }
};

}  // namespace sslfast
