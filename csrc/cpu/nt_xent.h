// NT-Xent on the CPU: what the operator hands to the kernel of the active instruction-set level.
#pragma once
#include <cstdint>

#include "cpu/engine/levels.h"
#include "cpu/engine/packed_rows.h"

namespace sslfast {

struct NtXentInput {
  Rows z0, z1;  // [n, d] each
  int64_t n, d;
  double temperature;
  bool normalize;
};

// All arrays hold float, or double for double inputs.
struct NtXentSaved {
  void* inv_norm;      // [2n]  1 / max(‖z_i‖, 1e-12)
  void* row_max;       // [2n]  exponent (base 2) that row_sum is relative to
  void* row_sum;       // [2n]  Σ_{j≠i} 2^(x_ij − row_max_i)
  void* tiles;         // similarity tiles kept for the backward, as many as fit
  int64_t tiles_size;  // in numbers
};

struct NtXentGradient {
  double grad_loss;
  void *dz0, *dz1;  // [n, d] each, in the inputs' element type
  double dtemperature;
};

}  // namespace sslfast

// Bytes of scratch memory (aligned to 64) that the kernels need: O(n·d).
SSLFAST_DECLARE(int64_t nt_xent_workspace(const NtXentInput& input, int64_t tiles_size, bool backward, int64_t threads))
// Fills `saved` and returns the loss.
SSLFAST_DECLARE(double nt_xent_forward(const NtXentInput& input, const NtXentSaved& saved, void* workspace,
                                       const Parallel& parallel))
// Fills dz0, dz1 and dtemperature.
SSLFAST_DECLARE(void nt_xent_backward(const NtXentInput& input, const NtXentSaved& saved, NtXentGradient& gradient,
                                      void* workspace, const Parallel& parallel))
