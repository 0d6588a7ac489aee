// The pairwise sigmoid loss (SigLIP) on the CPU: value and gradient in one pass over the tiles. With y_ij = +1 where
// the ids are equal, else −1, t_ij = −y_ij·(scale·q_i·k_j + bias) and u = exp(−|t|):
//
//   loss = Σ_ij softplus(t_ij),   softplus(t) = max(t, 0) + log(1 + u)
//   W_ij = d loss/d s_ij = −y_ij σ(t_ij),   dq = scale·W k,   dk = scale·Wᵀ q,   dscale = Σ_i q_i·(W k)_i
//   dbias = Σ_ij W_ij
//
// 3U operations in all (U = 2·M·N·D): no normaliser couples the pairs, so nothing is recomputed.
#include "cpu/engine/cross_similarity.h"

namespace sslfast {

struct LogSigmoidResult {
  double loss, dbias;
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t similarity_logsigmoid_workspace(const CrossInput& input, bool need_q, bool need_k,
                                                        int64_t threads))
SSLFAST_DECLARE(LogSigmoidResult similarity_logsigmoid(const CrossInput& input, double bias, CrossGradient& gradient,
                                                       void* workspace, const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// log(1 + u) for u in [0, 1]: 2·artanh(r) with r = u/(2 + u) ≤ 1/3, by its series in r² ≤ 1/9. The first term left out
// is below 2e-9 for float and 3e-18 for double.
template <typename T>
static inline vec<T> log1pv(vec<T> u) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  const vec<T> r = u / (u + T(2)), square = r * r;
  vec<T> p = broadcast(T(1) / T(2 * terms - 1));
#pragma GCC unroll 20
  for (int k = terms - 2; k >= 0; --k) p = p * square + T(1) / T(2 * k + 1);
  return p * r * T(2);
}

template <typename T>
struct LogSigmoid {
  CrossSimilarity<T> cross;
  double *loss, *dbias;  // [blocks of q]

  LogSigmoid(const CrossInput& input, bool need_q, bool need_k, int64_t threads, Arena& arena)
      : cross(input, 1.0, true, need_q, need_k, threads, arena),
        loss(arena.take<double>(cross.of_q.count)),
        dbias(arena.take<double>(cross.of_q.count)) {}

  // W in place of t = s (for negatives) and the sums of softplus(t) and of σ(t) over the tile.
  void epilogue(T* x, int64_t rows, int64_t columns, T bias, double* total_loss, double* total_weight) const {
    for (int64_t i = 0; i < rows; ++i) {
      vec<T> softplus = {}, weight = {};
      T* row = x + i * kTile;
      for (int64_t j = 0; j < columns; j += kLanes<T>) {
        const vec<T> t = load(row + j) + bias, zero = {};
        const vec<T> u = exp2v<true>((t > zero ? -t : t) * T(kLog2e)), inverse = T(1) / (u + T(1));
        softplus += at_least<T>(t, zero) + log1pv<T>(u);
        const vec<T> sigma = t > zero ? inverse : u * inverse;
        weight += sigma;
        store(row + j, sigma);
      }
      *total_loss += static_cast<double>(sum_lanes<T>(softplus));
      *total_weight += static_cast<double>(sum_lanes<T>(weight));
    }
  }

  LogSigmoidResult run(double bias, CrossGradient& gradient, const Parallel& parallel) {
    cross.pack(parallel, 1.0);
    for (int64_t i = 0; i < cross.of_q.count; ++i) loss[i] = dbias[i] = 0;
    const T b = static_cast<T>(bias);
    cross.each_tile(parallel, [&](int64_t i, int64_t j, T* x) {
      const int64_t rows = cross.of_q.length(i), columns = cross.of_k.length(j);
      cross.similarity(i, j, x);
      // A padded column has t = −∞: neither a loss nor a weight.
      if (columns % kLanes<T> != 0) mask_padding(x, rows, columns, false);
      // A positive has t = −s: its place holds −s − 2·bias while the bias is added to all, and its weight is −σ(t).
      double flipped = 0;
      cross.each_equal_id(i, j, [&](int64_t r, int64_t c) { x[r * kTile + c] = -x[r * kTile + c] - 2 * b; });
      epilogue(x, rows, columns, b, &loss[i], &dbias[i]);
      cross.each_equal_id(i, j, [&](int64_t r, int64_t c) {
        flipped += static_cast<double>(x[r * kTile + c]);
        x[r * kTile + c] = -x[r * kTile + c];
      });
      dbias[i] -= 2 * flipped;
      cross.products(i, j, x);
    });
    LogSigmoidResult result{0, 0};
    for (int64_t i = 0; i < cross.of_q.count; ++i) {
      result.loss += loss[i];
      result.dbias += dbias[i];
    }
    cross.write_gradients(parallel, gradient);
    return result;
  }
};

}  // namespace

int64_t similarity_logsigmoid_workspace(const CrossInput& input, bool need_q, bool need_k, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.q.type, [&](auto t) { LogSigmoid<decltype(t)>(input, need_q, need_k, threads, arena); });
  return arena.bytes;
}

LogSigmoidResult similarity_logsigmoid(const CrossInput& input, double bias, CrossGradient& gradient, void* memory,
                                       const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  const bool need_q = gradient.dq != nullptr, need_k = gradient.dk != nullptr;
  return with_accumulator(input.q.type, [&](auto t) {
    return LogSigmoid<decltype(t)>(input, need_q, need_k, parallel.threads, arena).run(bias, gradient, parallel);
  });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/cross_operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> similarity_logsigmoid_cpu(const Tensor& q, const Tensor& k,
                                                                             const Tensor& scale, const Tensor& bias,
                                                                             const Tensor& row_ids,
                                                                             const Tensor& col_ids, bool need_q,
                                                                             bool need_k) {
  const CrossArguments given(q, k, scale, MaybeTensor(), row_ids, col_ids, MaybeTensor());
  check_tensor(bias, "bias", {}, given.kind, given.q);
  Tensor loss = given.number(), dscale = given.number(), dbias = given.number();
  Tensor dq = given.gradient(given.q, need_q), dk = given.gradient(given.k, need_k);
  CrossGradient gradient{data_or_null(dq), data_or_null(dk), nullptr, 0};
  const Parallel parallel = torch_parallel();
  Tensor memory =
      scratch(given.q, SSLFAST_CALL(similarity_logsigmoid_workspace, given.input, need_q, need_k, parallel.threads));
  const LogSigmoidResult result =
      SSLFAST_CALL(similarity_logsigmoid, given.input, scalar(bias), gradient, aligned(memory), parallel);
  set_scalar(loss, result.loss);
  set_scalar(dscale, gradient.dscale);
  set_scalar(dbias, result.dbias);
  return {loss, dq, dk, dscale, dbias};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, similarity_logsigmoid)
#endif  // SSLFAST_CPU_DISPATCH
