// Kept tokens with their positions and a prefix on the GPU. Forward: a group of lanes a row of the result, which is
// written once. Backward: ids of a row are distinct, so a small inverse map turns the scatter into a walk over rows of
// x, each written once and without atomics (NaN where an id is repeated); sums over the batch come from the same walk
// (token_rows.h).
#include <tuple>
#include <vector>

#include "inverse_ids.h"
#include "token_rows.h"

namespace sslfast {
namespace {

struct Gather {
  int64_t images;    // S·B
  int64_t batch;     // B
  int64_t kept;      // K
  int64_t length;    // L, ids below it are valid; the largest number where no tensor has L rows
  int64_t prefixes;  // P
  int64_t features;  // D
  bool packed;
  Lanes lanes;
};

template <typename T, int kPack>
__global__ void __launch_bounds__(kBlock, 6)
    gather_kernel(const Gather size, const RowsOf<T> x, const int64_t* __restrict__ ids, const T* __restrict__ position,
                  const T* __restrict__ prefix, const T* __restrict__ token, T* __restrict__ out) {
  const int64_t row = size.lanes.group(), rows = size.prefixes + size.kept;
  if (row >= size.images * rows) return;
  // Fewer than 2^31 rows, and a division of 64 bits is a long one.
  const uint32_t image = static_cast<uint32_t>(row) / static_cast<uint32_t>(rows);
  const uint32_t r = static_cast<uint32_t>(row) - image * static_cast<uint32_t>(rows);
  T* to = out + row * size.features;
  if (r < size.prefixes) return write_row<T, kPack>(size.lanes, prefix + r * size.features, nullptr, 0.0f, to);
  const int64_t k = r - size.prefixes, id = ids[image * size.kept + k];
  // The id −1 is a row of zeros; one that is not allowed gives NaN, never another token.
  if (id < 0 || id >= size.length) {
    return write_row<T, kPack>(size.lanes, nullptr, nullptr, id == -1 ? 0.0f : bits_to_float(0x7fc00000u), to);
  }
  const int64_t b = image % static_cast<uint32_t>(size.batch);
  const T* from = x.data != nullptr ? x.at(b, size.packed ? k : id) : token;
  write_row<T, kPack>(size.lanes, from, position != nullptr ? position + id * size.features : nullptr, 0.0f, to);
}

// Rows P … P + L − 1 of the walk are tokens of x, read from the gradient's row P + inverse[l]; rows before are prefix.
struct InverseMap {
  static constexpr bool kSpoils = true;  // where an id is repeated
  int64_t batch, length, prefixes, features;
  int64_t image, row;      // strides of the gradient
  const int32_t* inverse;  // [S, B, L]

  __device__ int64_t from(int64_t s, int64_t b, int64_t r, bool) const {
    const int64_t i = s * batch + b;
    if (r < prefixes) return i * image + r * row;
    const int64_t k = inverse[i * length + r - prefixes];
    return k < 0 ? k : i * image + (prefixes + k) * row;  // kNowhere and kRepeated as they are
  }
  __device__ int64_t to(int64_t b, int64_t r) const {
    return r < prefixes ? -1 : (b * length + r - prefixes) * features;
  }
  __device__ bool carried(int64_t, int64_t) const { return true; }
};

// Row by row as they stand, zeros for the id −1: x was packed; and what holds the token, where there was no x.
struct PackedMap {
  static constexpr bool kSpoils = false;
  int64_t kept, prefixes, features;
  int64_t image, row;
  const int64_t* ids;  // [B, K]

  __device__ int64_t from(int64_t, int64_t b, int64_t r, bool) const {
    const bool there = r < prefixes || ids[b * kept + r - prefixes] >= 0;
    return there ? b * image + r * row : -1;
  }
  __device__ int64_t to(int64_t b, int64_t r) const { return r < prefixes ? -1 : (b * kept + r - prefixes) * features; }
  __device__ bool carried(int64_t, int64_t) const { return true; }
  __device__ int64_t token(int64_t n) const {
    const uint32_t i = static_cast<uint32_t>(n) / static_cast<uint32_t>(kept);
    return ids[n] >= 0 ? i * image + (prefixes + n - i * kept) * row : -1;
  }
};

void check_ids(const Tensor& ids, bool packed) {
  SSLFAST_CHECK(ids.dim() == 2 || (ids.dim() == 3 && !packed), "ids must be [B, K]", packed ? "" : " or [S, B, K]",
                ", got ", ids.dim(), " dimensions");
  SSLFAST_CHECK(ids.scalar_type() == ScalarType::Long, "ids must be int64, got ",
                torch::headeronly::toString(ids.scalar_type()));
}

// [S,] B, rows, D
Tensor new_rows(const Tensor& like, const Tensor& ids, int64_t rows, int64_t features) {
  if (ids.dim() == 2) return allocate(like, {ids.size(0), rows, features});
  return allocate(like, {ids.size(0), ids.size(1), rows, features});
}

Tensor gather_tokens_cuda(std::optional<Tensor> x_any, const Tensor& ids_any, std::optional<Tensor> position_any,
                          std::optional<Tensor> prefix_any, std::optional<Tensor> token_any, bool packed) {
  check_ids(ids_any, packed);
  SSLFAST_CHECK(x_any.has_value() != token_any.has_value(), "gather_tokens takes either x or token");
  const Tensor& like = x_any.has_value() ? *x_any : *token_any;
  const torch::stable::accelerator::DeviceGuard guard(ids_any.get_device_index());
  const int64_t d = ids_any.dim(), features = like.size(like.dim() - 1);
  SSLFAST_CHECK(ids_any.device() == like.device(), "ids must be on the device of the tokens");
  const Tensor ids = as_contiguous(ids_any);
  const std::optional<Tensor> position = table_of(position_any, "position", features, like);
  const std::optional<Tensor> prefix = table_of(prefix_any, "prefix", features, like);
  std::optional<Tensor> x, token;
  Gather size{(d == 3 ? ids.size(0) : 1) * ids.size(d - 2), ids.size(d - 2), ids.size(d - 1), int64_t{1} << 62,
              prefix.has_value() ? prefix->size(0) : 0,     features,        packed,          {}};
  if (x_any.has_value()) {
    SSLFAST_CHECK(x_any->dim() == 3, "x must be [B, L, D], got ", x_any->dim(), " dimensions");
    check_tensor(*x_any, "x", {size.batch, packed ? size.kept : x_any->size(1), features}, like.scalar_type(), ids);
    if (!packed) size.length = x_any->size(1);
    x = rows_tensor(*x_any);
  } else {
    check_tensor(*token_any, "token", {features}, like.scalar_type(), ids);
    token = as_contiguous(*token_any);
  }
  if (position.has_value()) {
    SSLFAST_CHECK(packed || !x.has_value() || position->size(0) == size.length,
                  "position must have a row for each of the ", size.length, " tokens, got ", position->size(0));
    size.length = position->size(0);
  }
  const int64_t rows = size.prefixes + size.kept;
  Tensor out = new_rows(like, ids, rows, features);
  if (out.numel() == 0) return out;
  SSLFAST_CHECK(size.images * rows < (int64_t{1} << 31), "the result must have fewer than 2^31 rows, got ",
                size.images * rows);
  const cudaStream_t stream = current_stream(ids);
  dispatch_float(like, "x", [&](auto element) {
    using T = decltype(element);
    const RowsOf<T> from = x.has_value() ? rows_of<T>(*x) : RowsOf<T>{nullptr, 0, 0};
    const T *at = data_or_null<T>(position), *first = data_or_null<T>(prefix), *same = data_or_null<T>(token);
    T* to = mutable_data<T>(out);
    with_pack<T>(on_packs(features, sizeof(T), {from.data, at, first, same, to}, {from.image, from.row}),
                 [&](auto pack) {
                   size.lanes = lanes_for(features, decltype(pack)::value);
                   gather_kernel<T, decltype(pack)::value>
                       <<<grid_size(size.lanes.blocks(size.images * rows)), kBlock, 0, stream>>>(
                           size, from, const_data<int64_t>(ids), at, first, same, to);
                 });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

// What one backward reads, and its results.
struct GatherGradients {
  Tensor grad, ids;
  int64_t masks, batch, kept, length, prefixes, features;
  bool needs[4];  // of x, position, prefix, token
  Tensor dx, dposition, dprefix, dtoken;
  cudaStream_t stream;
};

template <typename T>
void gradients(GatherGradients& g, bool packed) {
  using A = Accumulator<T>;
  const bool has_x = g.needs[0], has_position = g.needs[1], has_prefix = g.needs[2];
  const RowsOf<T> grad = rows_of<T>(g.grad);
  const T* dx = has_x ? const_data<T>(g.dx) : nullptr;
  const bool on = on_packs(g.features, sizeof(T), {grad.data, dx}, {grad.image, grad.row});
  const PackedMap as_they_stand{g.kept, g.prefixes, g.features, grad.image, grad.row, const_data<int64_t>(g.ids)};
  const int64_t P = g.prefixes, first = has_prefix ? 0 : P;
  Walk walk{g.masks, g.batch, 0, 0, 0, 0, g.features, P + g.length, {}, {}};
  auto keep_sum = [&](const Tensor& partial, int64_t begin, Tensor& sum) {
    add_pieces<T>(partial.size(0), partial.size(1) * g.features, const_data<A>(partial) + begin * g.features, sum,
                  g.stream);
  };
  if (packed && has_x) {
    walk.first = P;
    walk.rows = g.kept;
    walk_rows<T>(walk, as_they_stand, on, g.grad, &g.dx, g.stream);
  }
  const bool by_token = has_position || (has_x && !packed);
  if (by_token || has_prefix) {
    Tensor inverse = g.ids;  // not looked at where the walk is over the prefix alone
    if (by_token) inverse = inverse_ids(g.ids, g.masks * g.batch, g.kept, g.length, g.stream);
    const InverseMap map{
        g.batch, g.length, P, g.features, grad.image, grad.row, by_token ? const_data<int32_t>(inverse) : nullptr};
    walk.first = first;
    walk.rows = P - first + (by_token ? g.length : 0);
    walk.sum_begin = first;
    walk.sum_end = has_position ? P + g.length : P;
    const Tensor partial = walk_rows<T>(walk, map, on, g.grad, has_x && !packed ? &g.dx : nullptr, g.stream);
    if (has_prefix) keep_sum(partial, 0, g.dprefix);
    if (has_position) keep_sum(partial, P - first, g.dposition);
  }
  if (g.needs[3]) sum_token<T>(g.masks * g.batch * g.kept, as_they_stand, on, g.grad, g.dtoken, g.stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gather_tokens_backward_cuda(const Tensor& grad_any, const Tensor& ids_any,
                                                                       int64_t length, bool packed,
                                                                       std::vector<int64_t> needs) {
  check_ids(ids_any, packed);
  SSLFAST_CHECK(needs.size() == 4, "needs must have four numbers, got ", needs.size());
  const int64_t d = ids_any.dim(), kept = ids_any.size(d - 1), batch = ids_any.size(d - 2);
  SSLFAST_CHECK(grad_any.dim() == d + 1 && grad_any.size(d - 1) >= kept && grad_any.size(d - 2) == batch &&
                    grad_any.size(0) == ids_any.size(0),
                "grad has an unexpected shape");
  const torch::stable::accelerator::DeviceGuard guard(ids_any.get_device_index());
  const Tensor grad = rows_tensor(grad_any);
  const int64_t features = grad.size(d), prefixes = grad.size(d - 1) - kept, masks = d == 3 ? ids_any.size(0) : 1;
  SSLFAST_CHECK(masks * batch * (prefixes + kept) < (int64_t{1} << 31), "grad must have fewer than 2^31 rows");
  auto made = [&](std::initializer_list<int64_t> shape, int which) {
    return needs[which] != 0 ? allocate(grad, shape) : allocate(grad, {0});
  };
  GatherGradients g{grad,
                    as_contiguous(ids_any),
                    masks,
                    batch,
                    kept,
                    length,
                    prefixes,
                    features,
                    {needs[0] != 0, needs[1] != 0, needs[2] != 0, needs[3] != 0},
                    made({batch, packed ? kept : length, features}, 0),
                    made({length, features}, 1),
                    made({prefixes, features}, 2),
                    made({features}, 3),
                    current_stream(grad)};
  if (features > 0) {
    dispatch_float(grad, "grad", [&](auto element) { gradients<decltype(element)>(g, packed); });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {g.dx, g.dposition, g.dprefix, g.dtoken};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, gather_tokens, gather_tokens_backward)
