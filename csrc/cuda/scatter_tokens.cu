// Tokens back in their places, the mask token elsewhere, positions and a prefix, on the GPU. Forward: a group of lanes
// a row of the result, which is written once. Backward: each row of the gradient belongs to one row of x or to the
// token, so both are read where they lie and nothing is read twice but for the sums of a position (token_rows.h). An
// ids_restore that is no permutation would leave rows of x without a gradient, or two to write one: such an image's
// tokens get NaN.
#include <tuple>
#include <vector>

#include "inverse_ids.h"
#include "token_rows.h"

namespace sslfast {
namespace {

struct Scatter {
  int64_t images;    // B
  int64_t length;    // L
  int64_t kept;      // K
  int64_t passed;    // rows of x that come before the tokens
  int64_t prefixes;  // P
  int64_t features;  // D
  int64_t unplaced;  // rows before the first that has a position
  Lanes lanes;
};

// Which row of x (beyond the passed ones) stands at token l of image b: ids_restore, or a mask under which x[b, l] is
// replaced; −1 where the mask token stands, below that where an id is not allowed.
struct Restore {
  const int64_t* index;
  int64_t length, kept;

  __device__ int64_t row_of_x(int64_t b, int64_t l) const {
    const int64_t k = index[b * length + l];
    return k < 0 || k >= length ? -2 : (k < kept ? k : -1);
  }
};
struct Replace {
  const bool* mask;
  int64_t length, kept;

  __device__ int64_t row_of_x(int64_t b, int64_t l) const { return mask[b * length + l] ? -1 : l; }
};

template <typename T, int kPack, typename Index>
__global__ void __launch_bounds__(kBlock, 6)
    scatter_kernel(const Scatter size, const RowsOf<T> x, const Index index, const T* __restrict__ token,
                   const T* __restrict__ position, const T* __restrict__ prefix, T* __restrict__ out) {
  const int64_t row = size.lanes.group(), before = size.prefixes + size.passed, rows = before + size.length;
  if (row >= size.images * rows) return;
  // Fewer than 2^31 rows, and a division of 64 bits is a long one.
  const uint32_t b = static_cast<uint32_t>(row) / static_cast<uint32_t>(rows);
  const uint32_t r = static_cast<uint32_t>(row) - b * static_cast<uint32_t>(rows);
  const T* from = token;
  if (r < size.prefixes) {
    from = prefix + r * size.features;
  } else if (r < before) {
    from = x.at(b, r - size.prefixes);
  } else {
    const int64_t k = index.row_of_x(b, r - before);
    if (k < -1) {
      return write_row<T, kPack>(size.lanes, nullptr, nullptr, bits_to_float(0x7fc00000u), out + row * size.features);
    }
    if (k >= 0) from = x.at(b, size.passed + k);
  }
  const bool placed = position != nullptr && r >= size.unplaced;
  write_row<T, kPack>(size.lanes, from, placed ? position + (r - size.unplaced) * size.features : nullptr, 0.0f,
                      out + row * size.features);
}

// The walk is over rows of the gradient: all of them where their sums are wanted, else those that came from x.
template <typename Index>
struct ScatterMap {
  static constexpr bool kSpoils = false;
  Index index;
  int64_t length, kept, passed, prefixes, features;
  int64_t image, row;  // strides of the gradient

  __device__ int64_t row_of_x(int64_t b, int64_t r) const {  // of all of x, −1 for none
    const int64_t at = r - prefixes;
    if (at < passed) return at;  // before 0 for a row of the prefix
    const int64_t k = index.row_of_x(b, at - passed);
    return k < 0 ? -1 : passed + k;
  }
  __device__ int64_t from(int64_t, int64_t b, int64_t r, bool summed) const {
    return summed || row_of_x(b, r) >= 0 ? b * image + r * row : -1;
  }
  // Each row of x is the destination of one row of the gradient; a replaced one is too, and gets zeros.
  __device__ int64_t to(int64_t b, int64_t r) const {
    int64_t at = row_of_x(b, r);
    if constexpr (std::is_same_v<Index, Replace>) at = r - prefixes;
    return at < 0 ? -1 : (b * (passed + kept) + at) * features;
  }
  __device__ bool carried(int64_t b, int64_t r) const { return row_of_x(b, r) >= 0; }
  __device__ int64_t token(int64_t n) const {
    const uint32_t b = static_cast<uint32_t>(n) / static_cast<uint32_t>(length);
    const int64_t l = n - static_cast<int64_t>(b) * length;
    return index.row_of_x(b, l) < 0 ? b * image + (prefixes + passed + l) * row : -1;
  }
};

// index [B, L], int64 or bool, contiguous and on the device of `like`.
Tensor checked_index(const Tensor& index, int64_t batch, int64_t passed, const Tensor& like) {
  SSLFAST_CHECK(index.dim() == 2, "index must be two-dimensional [B, L], got ", index.dim(), " dimensions");
  const bool mask = index.scalar_type() == ScalarType::Bool;
  check_tensor(index, "index", {batch, index.size(1)}, mask ? ScalarType::Bool : ScalarType::Long, like);
  SSLFAST_CHECK(passed >= 0 && !(mask && passed != 0), "passed must be at least 0, and 0 with a mask, got ", passed);
  return as_contiguous(index);
}

// Calls f(Restore or Replace).
template <typename F>
void with_index(const Tensor& index, int64_t length, int64_t kept, F f) {
  if (index.scalar_type() == ScalarType::Bool) return f(Replace{const_data<bool>(index), length, kept});
  f(Restore{const_data<int64_t>(index), length, kept});
}

Tensor scatter_tokens_cuda(const Tensor& x_any, const Tensor& index_any, const Tensor& token_any,
                           std::optional<Tensor> position_any, std::optional<Tensor> prefix_any, int64_t passed) {
  SSLFAST_CHECK(x_any.dim() == 3, "x must be [B, rows, D], got ", x_any.dim(), " dimensions");
  const int64_t batch = x_any.size(0), features = x_any.size(2);
  const torch::stable::accelerator::DeviceGuard guard(x_any.get_device_index());
  const Tensor index = checked_index(index_any, batch, passed, x_any);
  const int64_t length = index.size(1), kept = x_any.size(1) - passed;
  SSLFAST_CHECK(kept >= 0 && kept <= length && (index.scalar_type() == ScalarType::Long || kept == length),
                "x has an unexpected number of rows, ", x_any.size(1));
  check_tensor(token_any, "token", {features}, x_any.scalar_type(), x_any);
  const std::optional<Tensor> position = table_of(position_any, "position", features, x_any);
  const std::optional<Tensor> prefix = table_of(prefix_any, "prefix", features, x_any);
  const int64_t prefixes = prefix.has_value() ? prefix->size(0) : 0, rows = prefixes + passed + length;
  const int64_t placed = position.has_value() ? position->size(0) : rows;
  SSLFAST_CHECK(placed == rows || placed == length, "position must have ", length, " or ", rows, " rows, got ", placed);
  const Tensor x = rows_tensor(x_any), token = as_contiguous(token_any);
  Tensor out = allocate(x, {batch, rows, features});
  if (out.numel() == 0) return out;
  SSLFAST_CHECK(batch * rows < (int64_t{1} << 31), "the result must have fewer than 2^31 rows, got ", batch * rows);
  const cudaStream_t stream = current_stream(x);
  Scatter size{batch, length, kept, passed, prefixes, features, rows - placed, {}};
  dispatch_float(x, "x", [&](auto element) {
    using T = decltype(element);
    const RowsOf<T> from = rows_of<T>(x);
    const T *same = const_data<T>(token), *at = data_or_null<T>(position), *first = data_or_null<T>(prefix);
    T* to = mutable_data<T>(out);
    with_pack<T>(
        on_packs(features, sizeof(T), {from.data, same, at, first, to}, {from.image, from.row}), [&](auto pack) {
          size.lanes = lanes_for(features, decltype(pack)::value);
          with_index(index, length, kept, [&](auto which) {
            scatter_kernel<T, decltype(pack)::value><<<grid_size(size.lanes.blocks(batch * rows)), kBlock, 0, stream>>>(
                size, from, which, same, at, first, to);
          });
        });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// What one backward reads, and its results.
struct ScatterGradients {
  Tensor grad, index;
  int64_t batch, length, kept, passed, prefixes, positions, features;
  bool needs[4];  // of x, token, position, prefix
  Tensor dx, dtoken, dposition, dprefix;
  cudaStream_t stream;
};

template <typename T, typename Index>
void gradients(ScatterGradients& g, const Index& index) {
  using A = Accumulator<T>;
  const bool has_x = g.needs[0], has_position = g.needs[2], has_prefix = g.needs[3];
  const RowsOf<T> grad = rows_of<T>(g.grad);
  const T* dx = has_x ? const_data<T>(g.dx) : nullptr;
  const bool on = on_packs(g.features, sizeof(T), {grad.data, dx}, {grad.image, grad.row});
  const ScatterMap<Index> map{index, g.length, g.kept, g.passed, g.prefixes, g.features, grad.image, grad.row};
  const int64_t rows = g.prefixes + g.passed + g.length, unplaced = rows - g.positions;
  if (has_x || has_position || has_prefix) {
    // Rows of the walk, and those of them that are summed: prefix and positions may leave passed rows between them,
    // whose sums nobody takes.
    const int64_t begin = has_prefix ? 0 : (has_x ? g.prefixes : unplaced),
                  end = has_x || has_position ? rows : g.prefixes;
    Walk walk{1, g.batch, 0, 0, 0, 0, g.features, rows, {}, {}};
    walk.first = has_position ? std::min(begin, unplaced) : begin;
    walk.rows = end - walk.first;
    walk.sum_begin = has_prefix ? 0 : (has_position ? unplaced : end);
    walk.sum_end = has_position ? rows : (has_prefix ? g.prefixes : end);
    const Tensor partial = walk_rows<T>(walk, map, on, g.grad, has_x ? &g.dx : nullptr, g.stream);
    auto keep_sum = [&](int64_t row, Tensor& sum) {
      const A* from = const_data<A>(partial) + (row - walk.sum_begin) * g.features;
      add_pieces<T>(partial.size(0), partial.size(1) * g.features, from, sum, g.stream);
    };
    if (has_prefix) keep_sum(0, g.dprefix);
    if (has_position) keep_sum(unplaced, g.dposition);
  }
  if (std::is_same_v<Index, Restore> && has_x && g.dx.numel() > 0) {
    spoil_kernel<T><<<static_cast<unsigned>(g.batch), kInverseThreads, 0, g.stream>>>(
        g.length, const_data<int64_t>(g.index), g.passed, g.passed + g.kept, g.features, mutable_data<T>(g.dx));
  }
  if (g.needs[1]) sum_token<T>(g.batch * g.length, map, on, g.grad, g.dtoken, g.stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scatter_tokens_backward_cuda(const Tensor& grad_any, const Tensor& index_any,
                                                                        int64_t kept, int64_t passed, int64_t positions,
                                                                        std::vector<int64_t> needs) {
  SSLFAST_CHECK(grad_any.dim() == 3, "grad must be [B, rows, D], got ", grad_any.dim(), " dimensions");
  SSLFAST_CHECK(needs.size() == 4, "needs must have four numbers, got ", needs.size());
  const torch::stable::accelerator::DeviceGuard guard(grad_any.get_device_index());
  const int64_t batch = grad_any.size(0), features = grad_any.size(2);
  const Tensor index = checked_index(index_any, batch, passed, grad_any), grad = rows_tensor(grad_any);
  const int64_t length = index.size(1), prefixes = grad.size(1) - passed - length;
  SSLFAST_CHECK(
      prefixes >= 0 && kept >= 0 && kept <= length && (index.scalar_type() == ScalarType::Long || kept == length),
      "grad has an unexpected number of rows, ", grad.size(1));
  SSLFAST_CHECK(batch * grad.size(1) < (int64_t{1} << 31), "grad must have fewer than 2^31 rows");
  SSLFAST_CHECK(positions == 0 || positions == length || positions == grad.size(1), "positions must be 0, ", length,
                " or ", grad.size(1), ", got ", positions);
  auto made = [&](std::initializer_list<int64_t> shape, int which) {
    return needs[which] != 0 ? allocate(grad, shape) : allocate(grad, {0});
  };
  ScatterGradients g{grad,
                     index,
                     batch,
                     length,
                     kept,
                     passed,
                     prefixes,
                     positions,
                     features,
                     {needs[0] != 0, needs[1] != 0, needs[2] != 0, needs[3] != 0},
                     made({batch, passed + kept, features}, 0),
                     made({features}, 1),
                     made({positions, features}, 2),
                     made({prefixes, features}, 3),
                     current_stream(grad)};
  if (features > 0) {
    dispatch_float(grad, "grad", [&](auto element) {
      with_index(index, length, kept, [&](auto which) { gradients<decltype(element)>(g, which); });
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {g.dx, g.dtoken, g.dposition, g.dprefix};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, scatter_tokens, scatter_tokens_backward)
