// NT-Xent on the CPU, without the 2N × 2N matrix. The mathematics is in docs/nt_xent.md; in short, with ẑ the
// normalised rows of [z0; z1] and x_ij = ẑ_i·ẑ_j·log2(e)/τ:
//
//   forward   loss = (ln 2 / 2N) Σ_i ( max_i + log2 sum_i − x_ip ),   sum_i = Σ_{j≠i} 2^(x_ij − max_i)
//   backward  W_ij = (g/2N)( P_ij + P_ji − 2·[j = p(i)] ),  P_ij = 2^(x_ij − max_i)/sum_i,   dẑ = W ẑ / τ
//             dτ = −(1/2τ) Σ_i ẑ_i·dẑ_i   (the loss depends on ẑ ẑᵀ/τ alone: Euler's relation for degree 2)
//
// x is symmetric, so a tile x_IJ serves rows I and, transposed, rows J: half the products forward (½U of U =
// 2·(2N)²·D), half of them again backward, and W ẑ in full: 2U in all. Tiles that fit the cache from the forward are
// not recomputed.
#include "nt_xent.h"

#include <cmath>
#include <type_traits>

#include "../common/l2_normalize.h"
#include "pair_schedule.h"
#include "tile_softmax.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942, kEps = 1e-12;
constexpr double kBoundedLimit = 60;  // 2^±60 and sums of 2^66 of them are far from float's limits

// Block height and memory layout for one problem: from the problem alone, so that forward and backward agree. At least
// eight blocks (where there are rows for it) leave work for several threads.
template <typename T>
struct Plan {
  int64_t n, d, rows, height, blocks, block, padded;  // rows = 2n; block: numbers in a block; padded: d in whole panels
  int64_t slots;  // tiles that the cache holds: the first ones in the order of slot()

  Plan(const NtXentInput& input, int64_t tiles_size) : n(input.n), d(input.d), rows(2 * input.n) {
    const int64_t eighth = round_up((rows + 7) / 8, kColumns<T>);
    height = rows < 16 * kTile && eighth < kTile ? eighth : kTile;
    blocks = (rows + height - 1) / height;
    block = block_size<T>(height, d);
    padded = round_up(d, kColumns<T>);
    slots = tiles_size / (height * kTile);
  }
  // A number for the pair i ≤ j that does not depend on the schedule, so that forward and backward agree on it.
  static int64_t slot(int64_t i, int64_t j) { return j * (j + 1) / 2 + i; }
  bool kept(int64_t i, int64_t j) const { return slot(i, j) < slots; }
  bool all_kept() const { return kept(blocks - 1, blocks - 1); }
  int64_t first(int64_t i) const { return i * height; }
  int64_t count(int64_t i) const { return rows - first(i) < height ? rows - first(i) : height; }
  int64_t other_view(int64_t row) const { return row < n ? row + n : row - n; }
};

// Where everything lies in the scratch memory.
template <typename T>
struct Workspace {
  T *panels, *transposed, *grad_panels;  // [blocks][block]
  T *positive, *max, *a;                 // [rows, rounded up to whole vectors]
  double* per_block;                     // [blocks]
  int64_t* done;                         // [blocks + 1]
  int64_t bytes;

  Workspace(const Plan<T>& plan, bool backward, void* memory) {
    char* at = static_cast<char*>(memory);
    bytes = 0;
    auto take = [&](auto** pointer, int64_t count) {
      *pointer = reinterpret_cast<std::remove_reference_t<decltype(**pointer)>*>(at + bytes);
      bytes += round_up(count * static_cast<int64_t>(sizeof(**pointer)), 64);
    };
    const int64_t all = plan.blocks * plan.block, vectors = plan.rows + kTile;
    take(&panels, all);
    take(&transposed, backward && plan.all_kept() ? 0 : all);
    take(&grad_panels, backward ? all : 0);
    take(&positive, vectors);
    take(&max, vectors);
    take(&a, vectors);
    take(&per_block, plan.blocks);
    take(&done, plan.blocks + 1);
  }
};

// Packs block i, normalising its rows on the way; without a place for it, not in the transposed layout.
// Returns the largest squared norm of a packed row, NaN if one is NaN.
template <typename T>
double pack_block(const NtXentInput& input, const Plan<T>& plan, int64_t i, T* inv_norm, bool known, T* panels,
                  T* transposed, T* row) {
  double largest = 0;
  for (int64_t r = 0; r < plan.count(i); ++r) {
    const int64_t index = plan.first(i) + r;
    read_row(index < plan.n ? input.z0 : input.z1, index % plan.n, plan.d, row);
    const T square = dot(row, row, plan.padded);
    T factor = 1;
    if (input.normalize) {
      if (!known) inv_norm[index] = inverse_norm(square, static_cast<T>(kEps));
      factor = inv_norm[index];
    } else if (!known) {
      inv_norm[index] = 1;
    }
    const double packed = static_cast<double>(square) * factor * factor;
    if (largest == largest && !(packed <= largest)) largest = packed;
    to_panels(row, factor, plan.padded, plan.height, panels + r * kColumns<T>);
  }
  if (transposed != nullptr) transpose_panels(panels, plan.height, plan.count(i), plan.d, transposed);
  return largest;
}

template <typename T>
struct Task {
  const NtXentInput& input;
  const Plan<T> plan;
  const Workspace<T> work;
  T *inv_norm, *row_max, *row_sum, *tiles;
  T high, low;  // log2(e)/τ in two parts
  bool bounded;

  Task(const NtXentInput& in, const NtXentSaved& saved, bool backward, void* memory)
      : input(in),
        plan(in, saved.tiles_size),
        work(plan, backward, memory),
        inv_norm(static_cast<T*>(saved.inv_norm)),
        row_max(static_cast<T*>(saved.row_max)),
        row_sum(static_cast<T*>(saved.row_sum)),
        tiles(static_cast<T*>(saved.tiles)) {
    const double scale = kLog2e / in.temperature;
    high = static_cast<T>(scale);
    low = static_cast<T>(scale - static_cast<double>(high));
    for (int64_t b = 0; b <= plan.blocks; ++b) work.done[b] = 0;
  }

  PairSchedule schedule(const Parallel& parallel) const {
    return {plan.blocks, PairSchedule::group_size(plan.blocks, parallel.threads), work.done};
  }
  T* kept_tile(int64_t i, int64_t j) const { return tiles + plan.slot(i, j) * plan.height * kTile; }

  // Backward: the norms are known, and no transposed rows are needed if every tile was kept.
  // `also(i)` is done for each block in the same parallel region.
  template <typename F>
  void pack(const Parallel& parallel, bool backward, T* rows_scratch, F&& also) {
    auto body = [&](int64_t i) {
      T* row = rows_scratch + i * plan.padded;
      for (int64_t k = 0; k < plan.padded; ++k) row[k] = 0;
      T* transposed = backward && plan.all_kept() ? nullptr : work.transposed + i * plan.block;
      work.per_block[i] = pack_block(input, plan, i, inv_norm, backward, work.panels + i * plan.block, transposed, row);
      also(i);
    };
    parallel_each(parallel, plan.blocks, body);
    double largest = 0;
    for (int64_t i = 0; i < plan.blocks; ++i)
      if (largest == largest && !(work.per_block[i] <= largest)) largest = work.per_block[i];
    bounded = std::fabs(static_cast<double>(high)) * largest <= kBoundedLimit;
  }

  // x_IJ, masked, in `x`.
  void similarity(int64_t i, int64_t j, T* x) const {
    tile_similarity(work.panels + i * plan.block, work.transposed + j * plan.block, plan.height, plan.count(i),
                    plan.count(j), plan.d, high, low, x);
    if (i == j || plan.count(j) % kLanes<T> != 0) {
      if (bounded)
        mask_tile<T, true>(x, plan.count(i), plan.count(j), i == j);
      else
        mask_tile<T, false>(x, plan.count(i), plan.count(j), i == j);
    }
  }

  // Calls f(row, other view's row, place in the tile) for every positive pair with its first row in I and second in J.
  template <typename F>
  void each_positive(int64_t i, int64_t j, F&& f) const {
    for (int64_t r = 0; r < plan.count(i); ++r) {
      const int64_t row = plan.first(i) + r, other = plan.other_view(row), c = other - plan.first(j);
      if (c >= 0 && c < plan.count(j)) f(row, other, r * kTile + c);
    }
  }

  void forward_tile(int64_t i, int64_t j, T* scratch) const {
    T* x = plan.kept(i, j) ? kept_tile(i, j) : scratch;
    similarity(i, j, x);
    each_positive(i, j,
                  [&](int64_t row, int64_t other, int64_t at) { work.positive[row] = work.positive[other] = x[at]; });
    const RowStatistics<T> of_rows{row_max + plan.first(i), row_sum + plan.first(i)};
    const RowStatistics<T> of_columns{row_max + plan.first(j), row_sum + plan.first(j)};
    if (bounded)
      accumulate_bounded(x, plan.count(i), plan.count(j), i == j, of_rows, of_columns);
    else
      accumulate_any(x, plan.count(i), plan.count(j), i == j, of_rows, of_columns);
  }

  void backward_tile(int64_t i, int64_t j, T weight, T* w) const {
    const T* x = plan.kept(i, j) ? kept_tile(i, j) : w;
    if (x == w) similarity(i, j, w);
    const RowWeights<T> of_rows{work.max + plan.first(i), work.a + plan.first(i)};
    const RowWeights<T> of_columns{work.max + plan.first(j), work.a + plan.first(j)};
    if (bounded)
      weights<T, true>(x, plan.count(i), plan.count(j), of_rows, of_columns, w);
    else
      weights<T, false>(x, plan.count(i), plan.count(j), of_rows, of_columns, w);
    each_positive(i, j, [&](int64_t, int64_t, int64_t at) { w[at] -= 2 * weight; });
    tile_product<T, false>(w, work.panels + j * plan.block, plan.height, plan.count(i), plan.count(j), plan.d,
                           work.grad_panels + i * plan.block);
    if (i != j)
      tile_product<T, true>(w, work.panels + i * plan.block, plan.height, plan.count(j), plan.count(i), plan.d,
                            work.grad_panels + j * plan.block);
  }

  // dz of block i from dẑ·τ = Wẑ in its panels: dz = inv_norm·(dẑ − (dẑ·ẑ)ẑ), dz = inv_norm·dẑ where the norm was below
  // eps. Returns Σ ẑ·dẑ.
  double finish_block(int64_t i, NtXentGradient& gradient, T* row) const {
    double along = 0;
    for (int64_t r = 0; r < plan.count(i); ++r) {
      const int64_t index = plan.first(i) + r;
      const T* z = work.panels + i * plan.block + r * kColumns<T>;
      const T* g = work.grad_panels + i * plan.block + r * kColumns<T>;
      T radial = 0;
      for (int64_t p = 0; p < plan.padded / kColumns<T>; ++p)
        radial += dot(z + p * plan.height * kColumns<T>, g + p * plan.height * kColumns<T>, kColumns<T>);
      along += radial;
      const T factor = inv_norm[index] / static_cast<T>(input.temperature);
      const T removed = input.normalize ? projection_weight(radial, inv_norm[index], static_cast<T>(kEps)) : T(0);
      for (int64_t k = 0; k < plan.d; ++k) {
        const int64_t at = k / kColumns<T> * plan.height * kColumns<T> + k % kColumns<T>;
        row[k] = factor * (g[at] - removed * z[at]);
      }
      write_row(row, index < plan.n ? gradient.dz0 : gradient.dz1, input.z0.type, index % plan.n, plan.d);
    }
    return along;
  }
};

template <typename T>
double forward(const NtXentInput& input, const NtXentSaved& saved, void* memory, const Parallel& parallel) {
  Task<T> task(input, saved, false, memory);
  const Plan<T>& plan = task.plan;
  task.pack(parallel, false, reinterpret_cast<T*>(static_cast<char*>(memory) + task.work.bytes), [](int64_t) {});
  for (int64_t row = 0; row < plan.rows; ++row) {
    task.row_max[row] = task.bounded ? T(0) : -static_cast<T>(__builtin_inf());
    task.row_sum[row] = 0;
  }
  const PairSchedule schedule = task.schedule(parallel);
  auto body = [&](int64_t) {
    alignas(64) T scratch[kTile * kTile];
    schedule.work([&](int64_t i, int64_t j) { task.forward_tile(i, j, scratch); });
  };
  parallel_each(parallel, plan.blocks, body);
  double total = 0;
  for (int64_t row = 0; row < plan.rows; ++row)
    total += (static_cast<double>(task.row_max[row]) - static_cast<double>(task.work.positive[row])) +
             std::log2(static_cast<double>(task.row_sum[row]));
  return kLn2 * total / static_cast<double>(plan.rows);
}

template <typename T>
void backward(const NtXentInput& input, const NtXentSaved& saved, NtXentGradient& gradient, void* memory,
              const Parallel& parallel) {
  Task<T> task(input, saved, true, memory);
  const Plan<T>& plan = task.plan;
  T* rows_scratch = reinterpret_cast<T*>(static_cast<char*>(memory) + task.work.bytes);
  const T weight = static_cast<T>(gradient.grad_loss / static_cast<double>(plan.rows));
  auto prepare = [&](int64_t i) {
    T* grad = task.work.grad_panels + i * plan.block;
    for (int64_t k = 0; k < plan.block; ++k) grad[k] = 0;
    for (int64_t row = plan.first(i); row < plan.first(i) + plan.count(i); ++row) {
      task.work.max[row] = task.row_max[row];
      task.work.a[row] = weight / task.row_sum[row];
    }
  };
  task.pack(parallel, true, rows_scratch, prepare);
  const PairSchedule schedule = task.schedule(parallel);
  auto body = [&](int64_t) {
    alignas(64) T scratch[kTile * kTile];
    schedule.work([&](int64_t i, int64_t j) { task.backward_tile(i, j, weight, scratch); });
  };
  parallel_each(parallel, plan.blocks, body);
  auto finish = [&](int64_t i) {
    task.work.per_block[i] = task.finish_block(i, gradient, rows_scratch + i * plan.padded);
  };
  parallel_each(parallel, plan.blocks, finish);
  double along = 0;
  for (int64_t i = 0; i < plan.blocks; ++i) along += task.work.per_block[i];
  gradient.dtemperature = -along / (2 * input.temperature * input.temperature);
}

template <typename T>
int64_t workspace(const NtXentInput& input, int64_t tiles_size, bool backward) {
  const Plan<T> plan(input, tiles_size);
  const Workspace<T> work(plan, backward, nullptr);
  return work.bytes + plan.blocks * plan.padded * static_cast<int64_t>(sizeof(T));  // and one row a block
}

}  // namespace

int64_t nt_xent_workspace(const NtXentInput& input, int64_t tiles_size, bool backward) {
  return input.z0.type == ElementType::f64 ? workspace<double>(input, tiles_size, backward)
                                           : workspace<float>(input, tiles_size, backward);
}

double nt_xent_forward(const NtXentInput& input, const NtXentSaved& saved, void* memory, const Parallel& parallel) {
  return input.z0.type == ElementType::f64 ? forward<double>(input, saved, memory, parallel)
                                           : forward<float>(input, saved, memory, parallel);
}

void nt_xent_backward(const NtXentInput& input, const NtXentSaved& saved, NtXentGradient& gradient, void* memory,
                      const Parallel& parallel) {
  return input.z0.type == ElementType::f64 ? backward<double>(input, saved, gradient, memory, parallel)
                                           : backward<float>(input, saved, gradient, memory, parallel);
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "../torch_api.h"
#include "huge_pages.h"

namespace sslfast {
namespace {

ElementType element_type(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::f32;
    case ScalarType::Double: return ElementType::f64;
    case ScalarType::BFloat16: return ElementType::bf16;
    case ScalarType::Half: return ElementType::f16;
    default: SSLFAST_CHECK(false, "z0 must be float32, float64, bfloat16 or float16");
  }
}

double scalar(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? *const_data<double>(x) : *const_data<float>(x);
}

void set_scalar(Tensor& x, double value) {
  if (x.scalar_type() == ScalarType::Double)
    *mutable_data<double>(x) = value;
  else
    *mutable_data<float>(x) = static_cast<float>(value);
}

NtXentInput input_of(const Tensor& z0, const Tensor& z1, const Tensor& temperature, bool normalize) {
  SSLFAST_CHECK(z0.dim() == 2 && z1.dim() == 2 && z0.size(0) == z1.size(0) && z0.size(1) == z1.size(1) &&
                    z0.scalar_type() == z1.scalar_type(),
                "z0 and z1 must be two-dimensional with the same shape and dtype");
  SSLFAST_CHECK(z0.size(0) > 0 && z0.size(1) > 0, "z0 must have at least one row and one feature");
  SSLFAST_CHECK(temperature.numel() == 1 && temperature.scalar_type() == accumulator_type(z0),
                "temperature must be one number in the accumulator's dtype");
  const ElementType type = element_type(z0);
  return {
      {z0.const_data_ptr(), type}, {z1.const_data_ptr(), type}, z0.size(0), z0.size(1), scalar(temperature), normalize};
}

// Scratch memory with 64 bytes to spare for alignment.
Tensor scratch(const Tensor& like, int64_t bytes) {
  Tensor memory = torch::stable::new_empty(like, {bytes + 64}, ScalarType::Byte);
  advise_huge_pages(memory.mutable_data_ptr(), bytes);
  return memory;
}
void* aligned(Tensor& memory) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.mutable_data_ptr()) + 63) / 64 * 64);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nt_xent(const Tensor& z0_any, const Tensor& z1_any,
                                                           const Tensor& temperature, bool normalize,
                                                           int64_t tile_cache) {
  const Tensor z0 = ::sslfast::contiguous(z0_any), z1 = ::sslfast::contiguous(z1_any);
  const NtXentInput input = input_of(z0, z1, temperature, normalize);
  const ScalarType kind = accumulator_type(z0);
  Tensor loss = torch::stable::new_empty(z0, {}, kind);
  Tensor inv_norm = torch::stable::new_empty(z0, {2 * input.n}, kind);
  Tensor row_max = torch::stable::new_empty(z0, {2 * input.n}, kind);
  Tensor row_sum = torch::stable::new_empty(z0, {2 * input.n}, kind);
  Tensor tiles = torch::stable::new_empty(z0, {tile_cache}, kind);
  advise_huge_pages(tiles.mutable_data_ptr(), tile_cache * static_cast<int64_t>(tiles.element_size()));
  const NtXentSaved saved{inv_norm.mutable_data_ptr(), row_max.mutable_data_ptr(), row_sum.mutable_data_ptr(),
                          tiles.mutable_data_ptr(), tile_cache};
  Tensor memory = scratch(z0, SSLFAST_CALL(nt_xent_workspace, input, tile_cache, false));
  set_scalar(loss, SSLFAST_CALL(nt_xent_forward, input, saved, aligned(memory), torch_parallel()));
  return {loss, inv_norm, row_max, row_sum, tiles};
}

std::tuple<Tensor, Tensor, Tensor> nt_xent_backward(const Tensor& grad_loss, const Tensor& z0_any, const Tensor& z1_any,
                                                    const Tensor& temperature, const Tensor& inv_norm,
                                                    const Tensor& row_max, const Tensor& row_sum, const Tensor& tiles,
                                                    bool normalize) {
  const Tensor z0 = ::sslfast::contiguous(z0_any), z1 = ::sslfast::contiguous(z1_any);
  const NtXentInput input = input_of(z0, z1, temperature, normalize);
  const ScalarType kind = accumulator_type(z0);
  check_tensor(grad_loss, "grad_loss", {}, kind, z0);
  check_tensor(inv_norm, "inv_norm", {2 * input.n}, kind, z0);
  check_tensor(row_max, "row_max", {2 * input.n}, kind, z0);
  check_tensor(row_sum, "row_sum", {2 * input.n}, kind, z0);
  check_tensor(tiles, "tiles", {tiles.numel()}, kind, z0);
  SSLFAST_CHECK(inv_norm.is_contiguous() && row_max.is_contiguous() && row_sum.is_contiguous() && tiles.is_contiguous(),
                "inv_norm, row_max, row_sum and tiles must be as nt_xent returned them");
  Tensor dz0 = torch::stable::empty_like(z0), dz1 = torch::stable::empty_like(z1);
  Tensor dtemperature = torch::stable::empty_like(temperature);
  // The backward only reads what the forward saved.
  const NtXentSaved saved{const_cast<void*>(inv_norm.const_data_ptr()), const_cast<void*>(row_max.const_data_ptr()),
                          const_cast<void*>(row_sum.const_data_ptr()), const_cast<void*>(tiles.const_data_ptr()),
                          tiles.numel()};
  NtXentGradient gradient{scalar(grad_loss), dz0.mutable_data_ptr(), dz1.mutable_data_ptr(), 0};
  Tensor memory = scratch(z0, SSLFAST_CALL(nt_xent_workspace, input, tiles.numel(), true));
  SSLFAST_CALL(nt_xent_backward, input, saved, gradient, aligned(memory), torch_parallel());
  set_scalar(dtemperature, gradient.dtemperature);
  return {dz0, dz1, dtemperature};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&sslfast::nt_xent));
  m.impl("nt_xent_backward", TORCH_BOX(&sslfast::nt_xent_backward));
}
#endif  // SSLFAST_CPU_DISPATCH
