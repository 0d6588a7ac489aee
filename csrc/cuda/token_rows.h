// What gathers and scatters of tokens share on the GPU: copying a row of features, the walk that gives every gradient
// but the token's, and ordered sums. Memory traffic is the bound of all of it.
//
// Sums over the batch are made in two stages without atomics: a fixed number of pieces of the batch, each summed in
// order, then the pieces in order. How many there are follows from the shapes alone, so the bits do too.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <optional>
#include <type_traits>

#include "torch_api.h"

namespace sslfast {
namespace {

constexpr int kWarp = 32;
constexpr int kBlock = 256;
constexpr int kWalkers = kBlock / kWarp;  // warps of a block, each at a row of its own
constexpr int kPackBytes = 16;            // the widest load
constexpr int kTogether = 4;              // rows that a thread loads before it adds the first of them

template <typename T, int kPack>
struct alignas(sizeof(T) * kPack) Pack {
  T element[kPack];
};

// Features of a row in packs, and the lanes at work on a row: a warp, or as few (a power of two) as there are packs.
struct Lanes {
  int log;         // of the lanes
  int64_t packs;   // of a row
  int64_t chunks;  // of as many packs as lanes

  __device__ int lane() const { return threadIdx.x & ((1 << log) - 1); }
  __device__ int64_t group() const { return (static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x) >> log; }
  int64_t blocks(int64_t groups) const { return ((groups << log) + kBlock - 1) / kBlock; }
};

inline Lanes lanes_for(int64_t features, int pack) {
  const int64_t packs = features / pack;
  int log = 0;
  while (log < 5 && (int64_t{1} << log) < packs) ++log;
  return {log, packs, (packs + (int64_t{1} << log) - 1) >> log};
}

inline unsigned grid_size(int64_t blocks) {
  SSLFAST_CHECK(blocks < (int64_t{1} << 31), "too many rows for one launch");
  return static_cast<unsigned>(blocks);
}

// Rows of features [images, rows, D]: the features lie side by side, the rest has any strides.
template <typename T>
struct RowsOf {
  const T* data;
  int64_t image, row;  // strides, in elements

  __device__ const T* at(int64_t i, int64_t r) const { return data + i * image + r * row; }
};

// The tensor itself if its features lie side by side, else a contiguous copy. A fourth, leading dimension (of masks)
// is one with the images, which needs it contiguous.
inline Tensor rows_tensor(const Tensor& x) {
  const int64_t d = x.dim();
  return d == 3 && (x.stride(2) == 1 || x.size(2) == 1) ? x : as_contiguous(x);
}

template <typename T>
RowsOf<T> rows_of(const Tensor& x) {
  if (x.dim() == 3) return {const_data<T>(x), x.stride(0), x.stride(1)};
  return {const_data<T>(x), x.size(2) * x.size(3), x.size(3)};
}

// `rows` [n, D], contiguous, of the dtype and on the device of `like`; nothing stays nothing.
inline std::optional<Tensor> table_of(const std::optional<Tensor>& rows, const char* name, int64_t features,
                                      const Tensor& like) {
  if (!rows.has_value()) return std::nullopt;
  SSLFAST_CHECK(rows->dim() == 2, name, " must be two-dimensional [rows, features], got ", rows->dim(), " dimensions");
  check_tensor(*rows, name, {rows->size(0), features}, like.scalar_type(), like);
  return as_contiguous(*rows);
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? const_data<T>(*x) : nullptr;
}

// Whether 16-byte loads serve: pointers and strides are multiples of them.
inline bool on_packs(int64_t features, int64_t bytes, std::initializer_list<const void*> pointers,
                     std::initializer_list<int64_t> strides = {}) {
  bool all = features * bytes % kPackBytes == 0;
  for (const void* p : pointers) all = all && reinterpret_cast<uintptr_t>(p) % kPackBytes == 0;
  for (int64_t stride : strides) all = all && stride * bytes % kPackBytes == 0;
  return all;
}

// Calls launch(elements of a pack as a compile-time constant): 16 bytes, or one element.
template <typename T, typename F>
void with_pack(bool packed, F launch) {
  constexpr int kFull = kPackBytes / static_cast<int>(sizeof(T));
  if (packed) return launch(std::integral_constant<int, kFull>{});
  launch(std::integral_constant<int, 1>{});
}

template <typename T, typename A, int kPack>
__device__ void add_pack(const Pack<T, kPack>& pack, A* sum) {
#pragma unroll
  for (int e = 0; e < kPack; ++e) sum[e] += A(widen(pack.element[e]));
}

template <typename T, typename A, int kPack>
__device__ Pack<T, kPack> rounded(const A* sum) {
  Pack<T, kPack> pack;
#pragma unroll
  for (int e = 0; e < kPack; ++e) narrow(sum[e], &pack.element[e]);
  return pack;
}

template <typename T, int kPack>
__device__ Pack<T, kPack> filled(Accumulator<T> value) {
  Pack<T, kPack> pack;
#pragma unroll
  for (int e = 0; e < kPack; ++e) narrow(value, &pack.element[e]);
  return pack;
}

// out = from + position, either of which may be absent (null): a row whose `from` is absent is `fill` throughout.
template <typename T, int kPack>
__device__ void write_row(const Lanes& lanes, const T* __restrict__ from, const T* __restrict__ position, float fill,
                          T* __restrict__ out) {
  using A = Accumulator<T>;
  using P = Pack<T, kPack>;
  const auto *in = reinterpret_cast<const P*>(from), *at = reinterpret_cast<const P*>(position);
  auto* to = reinterpret_cast<P*>(out);
  const int step = 1 << lanes.log;
  if (from == nullptr) {
    const P pack = filled<T, kPack>(A(fill));
    for (int64_t p = lanes.lane(); p < lanes.packs; p += step) to[p] = pack;
  } else if (position == nullptr) {
#pragma unroll 4
    for (int64_t p = lanes.lane(); p < lanes.packs; p += step) to[p] = in[p];
  } else {
#pragma unroll 2
    for (int64_t p = lanes.lane(); p < lanes.packs; p += step) {
      const P a = in[p], b = at[p];
      A sum[kPack] = {};
      add_pack<T, A, kPack>(a, sum);
      add_pack<T, A, kPack>(b, sum);
      to[p] = rounded<T, A, kPack>(sum);
    }
  }
}

// -------------------------------------------------------------------------------------------- gradients, row by row

// Pieces of the batch in the first stage of a sum.
struct Pieces {
  int64_t count, length;  // pieces, and items in each (fewer in the last ones)
};

inline Pieces pieces_of(int64_t items, int64_t wanted) {
  const int64_t count = std::clamp<int64_t>(std::min(wanted, items), 1, 256);
  return {count, (items + count - 1) / count};
}

// Where the gradient of row r of image b comes from and goes to; a Map tells it:
//   from(s, b, r, summed) → offset of the row in the gradient (of mask s), or −1; below that, where kSpoils: NaN;
//   to(b, r)              → offset of the row of dx that it is, or −1;
//   carried(b, r)         → whether x was read there: if not, zeros are written.
struct Walk {
  int64_t masks, images;       // S, B
  int64_t first, rows;         // rows of the walk: first … first + rows − 1
  int64_t sum_begin, sum_end;  // of these, rows whose sums over the batch are wanted
  int64_t features;            // D
  int64_t all_rows;            // of the gradient and of what it belongs to, wanted or not
  Pieces pieces;               // of the images
  Lanes lanes;
};

// One thread walks a pack of features of one row through the images of a piece in order, writes dx as it goes, and
// leaves the sum for the second stage: the gradient is read once for both.
template <typename T, int kPack, typename Map>
__global__ void __launch_bounds__(kBlock, 1) walk_kernel(const Walk walk, const Map map, const T* __restrict__ grad,
                                                         T* __restrict__ dx, Accumulator<T>* __restrict__ partial) {
  using A = Accumulator<T>;
  using P = Pack<T, kPack>;
  const int64_t group = walk.lanes.group(), line = group / walk.lanes.chunks;
  const int64_t p = ((group - line * walk.lanes.chunks) << walk.lanes.log) + walk.lanes.lane();
  if (line >= walk.rows || p >= walk.lanes.packs) return;
  const int64_t r = walk.first + line, begin = blockIdx.y * walk.pieces.length;
  const int64_t end = begin + walk.pieces.length < walk.images ? begin + walk.pieces.length : walk.images;
  const bool summed = r >= walk.sum_begin && r < walk.sum_end;

  A sum[kPack] = {};
  for (int64_t b = begin; b < end; b += kTogether) {
    A value[kTogether][kPack] = {};
    for (int64_t s = 0; s < walk.masks; ++s) {
      int64_t from[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) from[j] = b + j < end ? map.from(s, b + j, r, summed) : -1;
      P in[kTogether] = {};
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (from[j] >= 0) in[j] = reinterpret_cast<const P*>(grad + from[j])[p];
        if (Map::kSpoils && from[j] < -1) in[j] = filled<T, kPack>(A(bits_to_float(0x7fc00000u)));
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) add_pack<T, A, kPack>(in[j], value[j]);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum[e] += value[j][e];
      const int64_t to = dx != nullptr && b + j < end ? map.to(b + j, r) : -1;
      if (to < 0) continue;
      if (!map.carried(b + j, r)) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) value[j][e] = A(0);
      }
      reinterpret_cast<P*>(dx + to)[p] = rounded<T, A, kPack>(value[j]);
    }
  }
  if (!summed) return;
  const int64_t row = blockIdx.y * (walk.sum_end - walk.sum_begin) + r - walk.sum_begin;
#pragma unroll
  for (int e = 0; e < kPack; ++e) partial[row * walk.features + p * kPack + e] = sum[e];
}

// ------------------------------------------------------------------------------------------- the gradient of a token

struct TokenSum {
  int64_t rows, features;  // all rows of all images, D
  Pieces pieces;           // of the rows
  Lanes lanes;
};

// Σ of the rows of the gradient that hold the token, one piece of the rows a block: its warps take turns, and their
// sums are added in order. A Map tells token(n): the offset of row n in the gradient, or −1 where another row stands.
template <typename T, int kPack, typename Map>
__global__ void __launch_bounds__(kBlock, 1)
    token_kernel(const TokenSum size, const Map map, const T* __restrict__ grad, Accumulator<T>* __restrict__ partial) {
  using A = Accumulator<T>;
  using P = Pack<T, kPack>;
  __shared__ A of_warp[kWalkers][kWarp * kPack];
  const int lane = threadIdx.x % kWarp, walker = threadIdx.x / kWarp;
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kWarp + lane, begin = blockIdx.y * size.pieces.length;
  const int64_t end = begin + size.pieces.length < size.rows ? begin + size.pieces.length : size.rows;

  A sum[kPack] = {};
  for (int64_t n = begin + walker; n < end; n += kTogether * kWalkers) {
    P in[kTogether] = {};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int64_t row = n + j * kWalkers, from = row < end && p < size.lanes.packs ? map.token(row) : -1;
      if (from >= 0) in[j] = reinterpret_cast<const P*>(grad + from)[p];
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) add_pack<T, A, kPack>(in[j], sum);
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) of_warp[walker][lane * kPack + e] = sum[e];
  __syncthreads();
  const int64_t feature = static_cast<int64_t>(blockIdx.x) * kWarp * kPack + threadIdx.x;
  if (threadIdx.x >= kWarp * kPack || feature >= size.features) return;
  A total = 0;
  for (int w = 0; w < kWalkers; ++w) total += of_warp[w][threadIdx.x];
  partial[blockIdx.y * size.features + feature] = total;
}

// The second stage: out[i] = Σ over pieces of partial[piece · stride + i], 32 sums a block, whose warps take turns.
template <typename T>
__global__ void __launch_bounds__(kBlock, 1)
    add_pieces_kernel(int64_t pieces, int64_t stride, int64_t count, const Accumulator<T>* __restrict__ partial,
                      T* __restrict__ out) {
  using A = Accumulator<T>;
  __shared__ A of_warp[kWalkers][kWarp];
  const int lane = threadIdx.x % kWarp, walker = threadIdx.x / kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  A sum = 0;
  if (i < count) {
#pragma unroll 4
    for (int64_t n = walker; n < pieces; n += kWalkers) sum += partial[n * stride + i];
  }
  of_warp[walker][lane] = sum;
  __syncthreads();
  if (walker != 0 || i >= count) return;
  for (int w = 1; w < kWalkers; ++w) sum += of_warp[w][lane];
  narrow(sum, &out[i]);
}

template <typename T>
void add_pieces(int64_t pieces, int64_t stride, const Accumulator<T>* partial, Tensor& out, cudaStream_t stream) {
  const int64_t count = out.numel();
  if (count == 0) return;
  add_pieces_kernel<T><<<grid_size((count + kWarp - 1) / kWarp), kBlock, 0, stream>>>(pieces, stride, count, partial,
                                                                                      mutable_data<T>(out));
}

// --------------------------------------------------------------------------------------------------------- launches

// Enough threads to keep the memory busy, few enough that the sums of the pieces stay within a few MiB.
constexpr int64_t kWalkThreads = int64_t{1} << 17;
constexpr int64_t kTokenRows = 128;  // rows of a piece, at least

// Runs `walk` (whose images, rows and sums are set): dx where it is not empty, and the partial sums [pieces, summed
// rows, D], which are returned. `packed`: 16-byte loads serve the gradient and dx.
template <typename T, typename Map>
Tensor walk_rows(Walk walk, const Map& map, bool packed, const Tensor& grad, Tensor* dx, cudaStream_t stream) {
  // Of elements, not of packs, and of all rows: the sums' order must depend neither on where a tensor lies nor on which
  // other gradients are wanted.
  const int64_t threads = walk.all_rows * walk.features / (kPackBytes / static_cast<int64_t>(sizeof(T))) + 1;
  walk.pieces = pieces_of(walk.images, (kWalkThreads + threads - 1) / threads);
  const int64_t summed = walk.sum_end - walk.sum_begin;
  Tensor partial = allocate(grad, {walk.pieces.count, summed, walk.features}, accumulator_type(grad));
  with_pack<T>(packed, [&](auto pack) {
    constexpr int kPack = decltype(pack)::value;
    walk.lanes = lanes_for(walk.features, kPack);
    const int64_t blocks = walk.lanes.blocks(walk.rows * walk.lanes.chunks);
    if (blocks == 0) return;
    walk_kernel<T, kPack><<<dim3(grid_size(blocks), static_cast<unsigned>(walk.pieces.count)), kBlock, 0, stream>>>(
        walk, map, const_data<T>(grad), dx != nullptr ? mutable_data<T>(*dx) : nullptr,
        mutable_data<Accumulator<T>>(partial));
  });
  return partial;
}

// dtoken [D]: the sum of the gradient's rows that hold the token, of `rows` rows in all.
template <typename T, typename Map>
void sum_token(int64_t rows, const Map& map, bool packed, const Tensor& grad, Tensor& dtoken, cudaStream_t stream) {
  const int64_t features = dtoken.numel();
  const Pieces pieces = pieces_of(rows, (rows + kTokenRows - 1) / kTokenRows);
  Tensor partial = allocate(grad, {pieces.count, features}, accumulator_type(grad));
  with_pack<T>(packed, [&](auto pack) {
    constexpr int kPack = decltype(pack)::value;
    const TokenSum size{rows, features, pieces, lanes_for(features, kPack)};
    const int64_t chunks = (size.lanes.packs + kWarp - 1) / kWarp;
    token_kernel<T, kPack><<<dim3(grid_size(chunks), static_cast<unsigned>(pieces.count)), kBlock, 0, stream>>>(
        size, map, const_data<T>(grad), mutable_data<Accumulator<T>>(partial));
  });
  add_pieces<T>(pieces.count, features, const_data<Accumulator<T>>(partial), dtoken, stream);
}

}  // namespace
}  // namespace sslfast
