// Rows of tokens: what the gather and the scatter of tokens read, write and sum in the same way.
#pragma once
#include <cstddef>

#include "common/half.h"
#include "levels.h"

namespace sslfast {

// A batch of token rows with its strides in elements; `data` is null where there are none.
struct TokenRows {
  const void* data;
  int64_t image, row, feature;
};

// A sum over images is kept in two levels: of a group, and of the groups before it. Its error then grows with the size
// of a group plus the number of groups, not with their product.
inline constexpr int64_t kGroup = 64;
// Features that a gradient's sum over the batch takes at once, on the stack.
inline constexpr int64_t kSumBlock = 1024;

namespace SSLFAST_CPU_LEVEL {
namespace {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename T>
inline const T* row_of(const TokenRows& rows, int64_t image, int64_t row) {
  return static_cast<const T*>(rows.data) + image * rows.image + row * rows.row;
}

template <typename T>
inline void zero_row(T* __restrict__ out, int64_t width) {
  __builtin_memset(out, 0, static_cast<size_t>(width) * sizeof(T));
}

// out = x (+ add); `step` is the stride of x in elements, 1 in nearly every call.
template <typename T>
inline void write_row(const T* __restrict__ x, int64_t step, const T* __restrict__ add, T* __restrict__ out,
                      int64_t width) {
  if (step == 1 && add == nullptr) {
    __builtin_memcpy(out, x, static_cast<size_t>(width) * sizeof(T));
  } else if (step == 1) {
    for (int64_t d = 0; d < width; ++d) narrow(widen(x[d]) + widen(add[d]), &out[d]);
  } else if (add == nullptr) {
    for (int64_t d = 0; d < width; ++d) out[d] = x[d * step];
  } else {
    for (int64_t d = 0; d < width; ++d) narrow(widen(x[d * step]) + widen(add[d]), &out[d]);
  }
}

template <typename T, typename A>
inline void add_row(const T* __restrict__ x, A* __restrict__ sum, int64_t width) {
  for (int64_t d = 0; d < width; ++d) sum[d] += A(widen(x[d]));
}

template <typename A>
inline void fold(A* __restrict__ group, A* __restrict__ sum, int64_t width) {
  for (int64_t d = 0; d < width; ++d) {
    sum[d] += group[d];
    group[d] = 0;
  }
}

template <typename T, typename A>
inline void narrow_row(const A* __restrict__ sum, T* __restrict__ out, int64_t width) {
  for (int64_t d = 0; d < width; ++d) narrow(sum[d], &out[d]);
}

// Calls rows(image, begin, end) for pieces of each image's `rows` rows. A piece is 64 KiB of output; where features are
// not neighbours in x (tokens from a convolution), a whole image, since a cache line then holds many tokens' feature.
template <typename T, typename F>
void each_piece(const Parallel& parallel, int64_t images, int64_t rows, int64_t width, bool whole, F& f) {
  if (rows == 0) return;
  const int64_t piece = whole ? rows : greater(1, smaller(rows, 65536 / (width * static_cast<int64_t>(sizeof(T)))));
  const int64_t pieces = ceil_div(rows, piece);
  auto task = [&](int64_t t) {
    const int64_t begin = t % pieces * piece;
    f(t / pieces, begin, smaller(begin + piece, rows));
  };
  parallel_each(parallel, images * pieces, task);
}

// Calls row(r, d, n) for rows [begin, end) and blocks of n features from d: all features at once, or, where these are
// strided, as many as let every cache line of x that a block touches stay in the first level.
template <typename F>
inline void each_block(int64_t begin, int64_t end, int64_t width, bool strided, const F& row) {
  const int64_t block = strided ? 16 : width;
  for (int64_t d = 0; d < width; d += block) {
    for (int64_t r = begin; r < end; ++r) row(r, d, smaller(block, width - d));
  }
}

// Σ of partial sums [pieces, width], in their order.
template <typename T>
void sum_pieces(const Accumulator<T>* partial, int64_t pieces, int64_t width, T* out) {
  using A = Accumulator<T>;
  for (int64_t d0 = 0; d0 < width; d0 += kSumBlock) {
    const int64_t n = smaller(kSumBlock, width - d0);
    A sum[kSumBlock] = {};
    for (int64_t p = 0; p < pieces; ++p) add_row(partial + p * width + d0, sum, n);
    narrow_row(sum, out + d0, n);
  }
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include "operator.h"

namespace sslfast {

// `x` [.., rows, features] as it lies in memory. Of [S, 1, rows, features] the step from one to the next is that of the
// masks: a dimension of one entry has any stride.
inline TokenRows token_rows(const Tensor& x) {
  const int64_t d = x.dim(), outer = d > 3 && x.size(d - 3) == 1 ? d - 4 : d - 3;
  return {x.const_data_ptr(), d > 2 ? x.stride(outer) : 0, x.stride(d - 2), x.stride(d - 1)};
}

// `grad` itself where its features are neighbours, else a copy.
inline Tensor dense_features(const Tensor& grad) {
  return grad.stride(grad.dim() - 1) == 1 ? grad : as_contiguous(grad);
}

// A new tensor of the dtype of `like`, on huge pages where it is large.
inline Tensor new_rows(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor out = allocate(like, shape);
  if (out.numel() > 0)
    advise_huge_pages(out.mutable_data_ptr(), out.numel() * static_cast<int64_t>(out.element_size()));
  return out;
}

inline void check_table(const MaybeTensor& rows, const char* name, int64_t width, const Tensor& like) {
  if (!rows.has_value()) return;
  SSLFAST_CHECK(rows->dim() == 2, name, " must have two dimensions");
  check_tensor(*rows, name, {rows->size(0), width}, like.scalar_type(), like);
}

}  // namespace sslfast
#endif
