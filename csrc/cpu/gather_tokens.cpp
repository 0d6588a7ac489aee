// Kept tokens on the CPU. Forward: each row of the output is written once. Backward: dx is written in its own order,
// row by row, from the gradient's rows that were read from each token; sums over the batch take the images in order.
#include "gather_tokens.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
void forward(const Parallel& parallel, const GatherTokens& call, const GatherInputs& in, T* out) {
  const int64_t width = call.width, rows = call.prefix + call.kept;
  const T* position = static_cast<const T*>(in.position);
  const T* token = static_cast<const T*>(in.token);
  const bool strided = in.x.data != nullptr && in.x.feature != 1;
  auto piece = [&](int64_t image, int64_t begin, int64_t end) {  // image: s·B + b
    const int64_t* ids = call.ids + image * call.kept;
    auto row = [&](int64_t r, int64_t d, int64_t n) {
      T* target = out + (image * rows + r) * width + d;
      const int64_t k = r - call.prefix;
      if (k < 0) return write_row<T>(static_cast<const T*>(in.prefix) + r * width + d, 1, nullptr, target, n);
      const int64_t id = ids[k];
      if (id < 0) return zero_row(target, n);
      const T* add = position == nullptr ? nullptr : position + id * width + d;
      if (token != nullptr) return write_row<T>(token + d, 1, add, target, n);
      const T* source = row_of<T>(in.x, image % call.batch, call.packed ? k : id) + d * in.x.feature;
      write_row<T>(source, in.x.feature, add, target, n);
    };
    each_block(begin, end, width, strided, row);
  };
  each_piece<T>(parallel, call.masks * call.batch, rows, width, strided, piece);
}

void find_readers(const Parallel& parallel, const GatherTokens& call, const Readers& readers) {
  const int64_t reads = call.masks * call.kept;
  auto image = [&](int64_t b) {
    int32_t* first = readers.first + b * call.length;
    int32_t* next = readers.next + b * reads;
    for (int64_t l = 0; l < call.length; ++l) first[l] = -1;
    for (int64_t s = call.masks - 1; s >= 0; --s) {
      const int64_t* ids = call.ids + (s * call.batch + b) * call.kept;
      for (int64_t k = call.kept - 1; k >= 0; --k) {
        if (ids[k] < 0) continue;
        next[s * call.kept + k] = first[ids[k]];
        first[ids[k]] = static_cast<int32_t>(s * call.kept + k);
      }
    }
  };
  parallel_each(parallel, call.batch, image);
}

// The gradient's row that was read as number `read` = s·K + k of image b.
template <typename T>
const T* read_row(const GatherTokens& call, const TokenRows& grad, int64_t b, int64_t read) {
  return row_of<T>(grad, read / call.kept * call.batch + b, call.prefix + read % call.kept);
}

template <typename T>
void tokens_gradient(const Parallel& parallel, const GatherTokens& call, const TokenRows& grad, const Readers& readers,
                     T* dx) {
  using A = Accumulator<T>;
  const int64_t width = call.width, rows = call.packed ? call.kept : call.length;
  auto piece = [&](int64_t b, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      T* target = dx + (b * rows + r) * width;
      int64_t read = r;
      const int32_t* next = nullptr;
      if (call.packed) {
        if (call.ids[b * call.kept + r] < 0) read = -1;
      } else {
        read = readers.first[b * call.length + r];
        next = readers.next + b * call.masks * call.kept;
      }
      if (read < 0) {
        zero_row(target, width);
      } else if (next == nullptr || next[read] < 0) {
        write_row<T>(read_row<T>(call, grad, b, read), 1, nullptr, target, width);
      } else {
        for (int64_t d = 0; d < width; d += kSumBlock) {
          const int64_t n = smaller(kSumBlock, width - d);
          A sum[kSumBlock] = {};
          for (int64_t i = read; i >= 0; i = next[i]) add_row(read_row<T>(call, grad, b, i) + d, sum, n);
          narrow_row(sum, target + d, n);
        }
      }
    }
  };
  each_piece<T>(parallel, call.batch, rows, width, false, piece);
}

// dposition[l] = Σ_b Σ of the gradient's rows read at l; dtoken = Σ_l of the same sums.
template <typename T>
void table_gradients(const Parallel& parallel, const GatherTokens& call, const TokenRows& grad, const Readers& readers,
                     const GatherGradients<T>& out) {
  using A = Accumulator<T>;
  const int64_t width = call.width, each = tokens_per_piece(call.length), pieces = ceil_div(call.length, each);
  auto piece = [&](int64_t p) {
    A* total = out.token == nullptr ? nullptr : out.partial + p * width;
    if (total != nullptr) zero_row(total, width);
    for (int64_t l = p * each; l < smaller((p + 1) * each, call.length); ++l) {
      for (int64_t d = 0; d < width; d += kSumBlock) {
        const int64_t n = smaller(kSumBlock, width - d);
        A sum[kSumBlock] = {}, group[kSumBlock] = {};
        for (int64_t b = 0; b < call.batch; ++b) {
          const int32_t* next = readers.next + b * call.masks * call.kept;
          for (int64_t i = readers.first[b * call.length + l]; i >= 0; i = next[i])
            add_row(read_row<T>(call, grad, b, i) + d, group, n);
          if (b % kGroup == kGroup - 1) fold(group, sum, n);
        }
        fold(group, sum, n);
        if (out.position != nullptr) narrow_row(sum, out.position + l * width + d, n);
        if (total != nullptr) add_row(sum, total + d, n);
      }
    }
  };
  parallel_each(parallel, pieces, piece);
  if (out.token != nullptr) sum_pieces(out.partial, pieces, width, out.token);
}

template <typename T>
void prefix_gradient(const Parallel& parallel, const GatherTokens& call, const TokenRows& grad, T* dprefix) {
  using A = Accumulator<T>;
  constexpr int64_t kBlock = kSumBlock / 8;  // few rows: features are shared among threads too
  const int64_t width = call.width, images = call.masks * call.batch, blocks = ceil_div(width, kBlock);
  auto block = [&](int64_t t) {
    const int64_t r = t / blocks, d = t % blocks * kBlock, n = smaller(kBlock, width - d);
    A sum[kBlock] = {}, group[kBlock] = {};
    for (int64_t image = 0; image < images; ++image) {
      add_row(row_of<T>(grad, image, r) + d, group, n);
      if (image % kGroup == kGroup - 1) fold(group, sum, n);
    }
    fold(group, sum, n);
    narrow_row(sum, dprefix + r * width + d, n);
  };
  parallel_each(parallel, call.prefix * blocks, block);
}

template <typename T>
void backward(const Parallel& parallel, const GatherTokens& call, const TokenRows& grad, const Readers& readers,
              const GatherGradients<T>& out) {
  if (readers.first != nullptr) find_readers(parallel, call, readers);
  if (out.x != nullptr) tokens_gradient(parallel, call, grad, readers, out.x);
  if (out.position != nullptr || out.token != nullptr) table_gradients(parallel, call, grad, readers, out);
  if (out.prefix != nullptr) prefix_gradient(parallel, call, grad, out.prefix);
}

}  // namespace

#define SSLFAST_GATHER_TOKENS_DEFINE(T)                                                                            \
  void gather_tokens_forward(const Parallel& parallel, const GatherTokens& call, const GatherInputs& in, T* out) { \
    forward(parallel, call, in, out);                                                                              \
  }                                                                                                                \
  void gather_tokens_backward(const Parallel& parallel, const GatherTokens& call, const TokenRows& grad,           \
                              const Readers& readers, const GatherGradients<T>& out) {                             \
    backward(parallel, call, grad, readers, out);                                                                  \
  }
SSLFAST_EACH(SSLFAST_GATHER_TOKENS_DEFINE, float, double, bf16, fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <limits>
#include <tuple>
#include <vector>

namespace sslfast {
namespace {

// The sizes of a call; `ids` is contiguous and outlives it. Ids that reach beyond `length` tokens are an error.
GatherTokens gather_call(const Tensor& ids, int64_t length, bool bounded, int64_t width, bool packed) {
  const int64_t d = ids.dim();
  SSLFAST_CHECK(d == 2 || (d == 3 && !packed), "ids must be [images, kept], or [masks, images, kept] unless packed");
  SSLFAST_CHECK(ids.scalar_type() == ScalarType::Long, "ids must be int64");
  GatherTokens call{d == 3 ? ids.size(0) : 1, ids.size(d - 2), length, ids.size(d - 1), 0, width, packed,
                    const_data<int64_t>(ids)};
  SSLFAST_CHECK(width > 0, "tokens must have at least one feature");
  const int64_t most = std::numeric_limits<int32_t>::max();
  SSLFAST_CHECK(length <= most && call.masks * call.kept <= most, "an image must have fewer than 2^31 tokens");
  for (int64_t i = 0; i < ids.numel(); ++i) {
    SSLFAST_CHECK(call.ids[i] >= -1 && (!bounded || call.ids[i] < length), "ids must be from -1 to ", length - 1,
                  ", got ", call.ids[i]);
  }
  return call;
}

Tensor gather_tokens_cpu(const MaybeTensor& x, const Tensor& ids_any, const MaybeTensor& position_any,
                         const MaybeTensor& prefix_any, const MaybeTensor& token_any, bool packed) {
  SSLFAST_CHECK(x.has_value() != token_any.has_value(), "gather_tokens takes either x or token");
  const Tensor& like = x.has_value() ? *x : *token_any;
  const int64_t width = like.size(like.dim() - 1), positions = position_any.has_value() ? position_any->size(0) : 0;
  const bool whole = x.has_value() && !packed;  // x has all tokens
  const Tensor ids = as_contiguous(ids_any);
  SSLFAST_CHECK(!x.has_value() || x->dim() == 3, "x must have three dimensions, got ", like.dim());
  GatherTokens call =
      gather_call(ids, whole ? x->size(1) : positions, whole || position_any.has_value(), width, packed);
  if (x.has_value())
    check_tensor(*x, "x", {call.batch, packed ? call.kept : call.length, width}, x->scalar_type(), ids);
  if (token_any.has_value()) check_tensor(*token_any, "token", {width}, like.scalar_type(), ids);
  check_table(position_any, "position", width, like);
  check_table(prefix_any, "prefix", width, like);
  SSLFAST_CHECK(!position_any.has_value() || positions == call.length, "position must have a row for each token");
  call.prefix = prefix_any.has_value() ? prefix_any->size(0) : 0;
  const MaybeTensor position = contiguous_or_none(position_any), prefix = contiguous_or_none(prefix_any);
  const MaybeTensor token = contiguous_or_none(token_any);
  const int64_t rows = call.prefix + call.kept;
  Tensor out = ids.dim() == 3 ? new_rows(like, {call.masks, call.batch, rows, width})
                              : new_rows(like, {call.batch, rows, width});
  const GatherInputs in{x.has_value() ? token_rows(*x) : TokenRows{}, data_or_null(position), data_or_null(prefix),
                        data_or_null(token)};
  dispatch_float(like, "x", [&](auto element) {
    using T = decltype(element);
    SSLFAST_CALL(gather_tokens_forward, torch_parallel(), call, in, mutable_data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_tokens_backward_cpu(const Tensor& grad_any, const Tensor& ids_any,
                                                                      int64_t length, bool packed,
                                                                      std::vector<int64_t> needs) {
  const int64_t dims = grad_any.dim();
  SSLFAST_CHECK(dims == ids_any.dim() + 1 && needs.size() == 4 && length >= 0,
                "grad must have one dimension more than ids, needs four numbers, and length be at least 0");
  const Tensor ids = as_contiguous(ids_any);
  // Image b of mask s is number s·B + b.
  const bool steady = dims == 3 || grad_any.size(0) == 1 || grad_any.size(1) == 1 ||
                      grad_any.stride(0) == grad_any.size(1) * grad_any.stride(1);
  const Tensor grad = steady ? dense_features(grad_any) : as_contiguous(grad_any);
  const bool tables = needs[1] != 0 || needs[3] != 0, tokens = needs[0] != 0 && !packed;
  GatherTokens call = gather_call(ids, length, tables || tokens, grad.size(dims - 1), packed);
  call.prefix = grad.size(dims - 2) - call.kept;
  SSLFAST_CHECK(call.prefix >= 0 && grad.size(dims - 3) == call.batch && (dims < 4 || grad.size(0) == call.masks),
                "grad has an unexpected shape");
  const int64_t width = call.width, pieces = (length + tokens_per_piece(length) - 1) / tokens_per_piece(length);
  Tensor dx = needs[0] != 0 ? new_rows(grad, {call.batch, packed ? call.kept : length, width}) : new_rows(grad, {0});
  Tensor dposition = needs[1] != 0 ? new_rows(grad, {length, width}) : new_rows(grad, {0});
  Tensor dprefix = needs[2] != 0 ? new_rows(grad, {call.prefix, width}) : new_rows(grad, {0});
  Tensor dtoken = needs[3] != 0 ? new_rows(grad, {width}) : new_rows(grad, {0});
  Tensor partial = allocate(grad, {needs[3] != 0 ? pieces * width : 0}, accumulator_type(grad));
  const int64_t reads = call.masks * call.kept;
  Tensor readers = allocate(grad, {tables || tokens ? call.batch * (length + reads) : 0}, ScalarType::Int);
  Readers found{nullptr, nullptr};
  if (readers.numel() > 0) {
    found.first = mutable_data<int32_t>(readers);
    found.next = found.first + call.batch * length;
  }
  dispatch_float(grad, "grad", [&](auto element) {
    using T = decltype(element);
    const GatherGradients<T> out{static_cast<T*>(data_or_null(dx)), static_cast<T*>(data_or_null(dposition)),
                                 static_cast<T*>(data_or_null(dprefix)), static_cast<T*>(data_or_null(dtoken)),
                                 static_cast<Accumulator<T>*>(data_or_null(partial))};
    SSLFAST_CALL(gather_tokens_backward, torch_parallel(), call, token_rows(grad), found, out);
  });
  return {dx, dposition, dprefix, dtoken};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, gather_tokens, gather_tokens_backward)
#endif  // SSLFAST_CPU_DISPATCH
