// Tokens in their places on the CPU. Forward: each row of the output is written once. Backward: one pass over the
// gradient; a task takes a few rows of every image, in the order of the images, and has their sums to itself.
#include "scatter_tokens.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

// The row of x that stands at row r of image b, or kToken, or (of the prefix) kPrefix.
constexpr int64_t kToken = -1, kPrefix = -2;
inline int64_t source_of(const ScatterTokens& call, int64_t b, int64_t r) {
  const int64_t row = r - call.prefix, l = row - call.passed;
  if (row < 0) return kPrefix;
  if (l < 0) return row;
  if (call.mask != nullptr) return call.mask[b * call.tokens + l] ? kToken : row;
  const int64_t k = call.restore[b * call.tokens + l];
  return k < call.kept ? call.passed + k : kToken;
}

// The row of position that is added to row r, or −1.
inline int64_t position_of(const ScatterTokens& call, int64_t r) {
  return call.everywhere ? r : greater(-1, r - call.prefix - call.passed);
}

template <typename T>
void forward(const Parallel& parallel, const ScatterTokens& call, const ScatterInputs& in, T* out) {
  const int64_t width = call.width, rows = call.prefix + call.passed + call.tokens;
  const T* position = static_cast<const T*>(in.position);
  const bool strided = in.x.feature != 1;
  auto piece = [&](int64_t b, int64_t begin, int64_t end) {
    auto row = [&](int64_t r, int64_t d, int64_t n) {
      const int64_t source = source_of(call, b, r), at = position == nullptr ? -1 : position_of(call, r);
      const T* add = at < 0 ? nullptr : position + at * width + d;
      T* target = out + (b * rows + r) * width + d;
      if (source >= 0)
        write_row<T>(row_of<T>(in.x, b, source) + d * in.x.feature, in.x.feature, add, target, n);
      else if (source == kToken)
        write_row<T>(static_cast<const T*>(in.token) + d, 1, add, target, n);
      else
        write_row<T>(static_cast<const T*>(in.prefix) + r * width + d, 1, add, target, n);
    };
    each_block(begin, end, width, strided, row);
  };
  each_piece<T>(parallel, call.batch, rows, width, strided, piece);
}

template <typename T>
void rows_gradient(const ScatterTokens& call, const TokenRows& grad, const ScatterGradients<T>& out, int64_t begin,
                   int64_t end, int64_t d, int64_t n, ScatterSums<Accumulator<T>>& sums, Accumulator<T>* total) {
  const int64_t width = call.width, x_rows = call.passed + call.kept;
  const auto summed = [&](int64_t r) {
    return r < call.prefix ? out.prefix != nullptr || (out.position != nullptr && call.everywhere)
                           : out.position != nullptr && position_of(call, r) >= 0;
  };
  zero_row(sums.row, (end - begin) * n);
  zero_row(sums.row_group, (end - begin) * n);
  zero_row(sums.token, n);
  zero_row(sums.token_group, n);
  const auto fold_all = [&] {
    for (int64_t r = begin; r < end; ++r) {
      if (summed(r)) fold(sums.row_group + (r - begin) * n, sums.row + (r - begin) * n, n);
    }
    fold(sums.token_group, sums.token, n);
  };
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t r = begin; r < end; ++r) {
      const T* g = row_of<T>(grad, b, r) + d;
      const int64_t source = source_of(call, b, r);
      if (source >= 0 && out.x != nullptr) write_row<T>(g, 1, nullptr, out.x + (b * x_rows + source) * width + d, n);
      if (source == kToken) {
        if (out.token != nullptr) add_row(g, sums.token_group, n);
        if (out.x != nullptr && call.mask != nullptr) zero_row(out.x + (b * x_rows + r - call.prefix) * width + d, n);
      }
      if (summed(r)) add_row(g, sums.row_group + (r - begin) * n, n);
    }
    if (b % kGroup == kGroup - 1) fold_all();
  }
  fold_all();
  for (int64_t r = begin; r < end; ++r) {
    const auto* sum = sums.row + (r - begin) * n;
    const int64_t at = position_of(call, r);
    if (out.position != nullptr && at >= 0) narrow_row(sum, out.position + at * width + d, n);
    if (out.prefix != nullptr && r < call.prefix) narrow_row(sum, out.prefix + r * width + d, n);
  }
  if (total != nullptr) __builtin_memcpy(total + d, sums.token, static_cast<size_t>(n) * sizeof(*total));
}

template <typename T>
void backward(const Parallel& parallel, const ScatterTokens& call, const TokenRows& grad,
              const ScatterGradients<T>& out) {
  const int64_t width = call.width, rows = call.prefix + call.passed + call.tokens;
  const int64_t each = rows_per_piece(rows, width), pieces = ceil_div(rows, each);
  int64_t next = 0;
  each_task(parallel, pieces, &next, [&](int64_t worker, int64_t p) {
    for (int64_t d = 0; d < width; d += kSumBlock) {
      rows_gradient(call, grad, out, p * each, smaller((p + 1) * each, rows), d, smaller(kSumBlock, width - d),
                    out.sums[worker], out.token == nullptr ? nullptr : out.partial + p * width);
    }
  });
  if (out.token != nullptr) sum_pieces(out.partial, pieces, width, out.token);
}

}  // namespace

#define SSLFAST_SCATTER_TOKENS_DEFINE(T)                                                                              \
  void scatter_tokens_forward(const Parallel& parallel, const ScatterTokens& call, const ScatterInputs& in, T* out) { \
    forward(parallel, call, in, out);                                                                                 \
  }                                                                                                                   \
  void scatter_tokens_backward(const Parallel& parallel, const ScatterTokens& call, const TokenRows& grad,            \
                               const ScatterGradients<T>& out) {                                                      \
    backward(parallel, call, grad, out);                                                                              \
  }
SSLFAST_EACH(SSLFAST_SCATTER_TOKENS_DEFINE, float, double, bf16, fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <tuple>
#include <vector>

namespace sslfast {
namespace {

// Where each token comes from; `index` is contiguous and outlives the call. A row of an int64 index that is no
// permutation is an error: a row of x would have no gradient, or two.
void set_index(ScatterTokens& call, const Tensor& index) {
  SSLFAST_CHECK(index.dim() == 2 && index.size(0) == call.batch, "index must be [images, tokens]");
  SSLFAST_CHECK(call.width > 0 && call.passed >= 0 && call.kept >= 0, "passed must be from 0 to the rows of x");
  call.tokens = index.size(1);
  if (index.scalar_type() == ScalarType::Bool) {
    SSLFAST_CHECK(call.kept == call.tokens && call.passed == 0, "mask must have a column for each row of x");
    call.mask = static_cast<const uint8_t*>(index.const_data_ptr());
    return;
  }
  SSLFAST_CHECK(index.scalar_type() == ScalarType::Long, "index must be int64 or bool");
  SSLFAST_CHECK(call.kept <= call.tokens, "index must have at least as many columns as x has tokens");
  call.restore = const_data<int64_t>(index);
  std::vector<int64_t> seen(static_cast<size_t>(call.tokens), -1);
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t l = 0; l < call.tokens; ++l) {
      const int64_t k = call.restore[b * call.tokens + l];
      SSLFAST_CHECK(k >= 0 && k < call.tokens && seen[static_cast<size_t>(k)] != b,
                    "index must be a permutation in each row, got ", k, " in row ", b);
      seen[static_cast<size_t>(k)] = b;
    }
  }
}

Tensor scatter_tokens_cpu(const Tensor& x, const Tensor& index_any, const Tensor& token_any,
                          const MaybeTensor& position_any, const MaybeTensor& prefix_any, int64_t passed) {
  SSLFAST_CHECK(x.dim() == 3, "x must have three dimensions, got ", x.dim());
  const Tensor index = as_contiguous(index_any), token = as_contiguous(token_any);
  ScatterTokens call{};
  call.batch = x.size(0);
  call.width = x.size(2);
  call.passed = passed;
  call.kept = x.size(1) - passed;
  set_index(call, index);
  check_tensor(token, "token", {call.width}, x.scalar_type(), x);
  check_table(position_any, "position", call.width, x);
  check_table(prefix_any, "prefix", call.width, x);
  call.prefix = prefix_any.has_value() ? prefix_any->size(0) : 0;
  const int64_t rows = call.prefix + passed + call.tokens;
  const int64_t positions = position_any.has_value() ? position_any->size(0) : rows;
  SSLFAST_CHECK(positions == call.tokens || positions == rows, "position must have a row for each token, or for all");
  call.everywhere = positions == rows;
  const MaybeTensor position = contiguous_or_none(position_any), prefix = contiguous_or_none(prefix_any);
  Tensor out = new_rows(x, {call.batch, rows, call.width});
  const ScatterInputs in{token_rows(x), token.const_data_ptr(), data_or_null(position), data_or_null(prefix)};
  dispatch_float(x, "x", [&](auto element) {
    using T = decltype(element);
    SSLFAST_CALL(scatter_tokens_forward, torch_parallel(), call, in, mutable_data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_tokens_backward_cpu(const Tensor& grad_any, const Tensor& index_any,
                                                                       int64_t kept, int64_t passed, int64_t positions,
                                                                       std::vector<int64_t> needs) {
  SSLFAST_CHECK(grad_any.dim() == 3 && needs.size() == 4, "grad must have three dimensions, and needs four numbers");
  const Tensor grad = dense_features(grad_any), index = as_contiguous(index_any);
  const int64_t rows = grad.size(1);
  ScatterTokens call{};
  call.batch = grad.size(0);
  call.width = grad.size(2);
  call.passed = passed;
  call.kept = kept;
  set_index(call, index);
  call.prefix = rows - passed - call.tokens;
  SSLFAST_CHECK(call.prefix >= 0, "grad has an unexpected shape");
  SSLFAST_CHECK(needs[2] == 0 || positions == call.tokens || positions == rows,
                "positions must be the number of tokens, or of rows of grad");
  call.everywhere = positions == rows;
  Tensor dx = needs[0] != 0 ? new_rows(grad, {call.batch, passed + kept, call.width}) : new_rows(grad, {0});
  Tensor dtoken = needs[1] != 0 ? new_rows(grad, {call.width}) : new_rows(grad, {0});
  Tensor dposition = needs[2] != 0 ? new_rows(grad, {positions, call.width}) : new_rows(grad, {0});
  Tensor dprefix = needs[3] != 0 ? new_rows(grad, {call.prefix, call.width}) : new_rows(grad, {0});
  const int64_t each = rows_per_piece(rows, call.width), pieces = (rows + each - 1) / each;
  Tensor partial = allocate(grad, {needs[1] != 0 ? pieces * call.width : 0}, accumulator_type(grad));
  const Parallel parallel = torch_parallel();
  dispatch_float(grad, "grad", [&](auto element) {
    using T = decltype(element);
    using Sums = ScatterSums<Accumulator<T>>;
    Tensor memory = scratch(grad, std::min(parallel.threads, pieces) * static_cast<int64_t>(sizeof(Sums)));
    const ScatterGradients<T> out{static_cast<T*>(data_or_null(dx)),
                                  static_cast<T*>(data_or_null(dtoken)),
                                  static_cast<T*>(data_or_null(dposition)),
                                  static_cast<T*>(data_or_null(dprefix)),
                                  static_cast<Accumulator<T>*>(data_or_null(partial)),
                                  static_cast<Sums*>(aligned(memory))};
    SSLFAST_CALL(scatter_tokens_backward, parallel, call, token_rows(grad), out);
  });
  return {dx, dtoken, dposition, dprefix};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, scatter_tokens, scatter_tokens_backward)
#endif  // SSLFAST_CPU_DISPATCH
