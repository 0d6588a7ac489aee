// The gradient of characteristic_sums on the CPU, from g = d/dC_k and h = d/dS_k of every view and slice:
//
//   d/dp_i = Σ_k t_k (h_k cos kθ_i − g_k sin kθ_i),   dz_i = Σ_a (d/dp_ia) a
//
// Projections are computed again, tile by tile. The sum over a group of knots around a pivot P is
// cos Pθ·E + sin Pθ·F with E and F sums over cos bθ and sin bθ, b = 1 … 4: 18 multiply-adds for 8 knots, whose
// coefficients are prepared for each slice.

#include "cpu/engine/slice_tiles.h"

namespace sslfast {

struct SliceGradient {
  const void* sums;  // [2, views, knots, slices]: of the cosines and sines, in the accumulator's type
  void* z;           // [views, rows, d] in z's type
};

}  // namespace sslfast

SSLFAST_DECLARE(int64_t characteristic_sums_backward_workspace(const SliceInput& input, int64_t threads))
SSLFAST_DECLARE(void characteristic_sums_backward(const SliceInput& input, const SliceGradient& gradient,
                                                  void* workspace, const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// Of a group: the pivot's in E and F; for b = 1 … 4 those of cos b and sin b in E, then in F.
constexpr int64_t kCoefficients = 2 + 4 * kPivot;

// Writes d/dp in place of the angles of `rows` vectors kTile numbers apart; coefficients [groups][kCoefficients] are
// vectors one after another.
template <typename T>
void differentiate(T* x, int64_t rows, int64_t groups, const T* coefficients) {
  constexpr int L = kLanes<T>;
  tame(x, rows);
  for (int64_t r = 0; r < rows; ++r) {
    Angle<T> multiple[4];
    multiples_of<T>(load(x + r * kTile), multiple);
    Angle<T> pivot = multiple[3];
    vec<T> total = {};
    const T* c = coefficients;
    for (int64_t group = 0; group < groups; ++group, c += kCoefficients * L) {
      if (group > 0) pivot = sum_of(pivot, twice(multiple[3]));
      vec<T> e = load(c), f = load(c + L), e_sin = {}, f_sin = {};  // two chains each: half the latency
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        e += load(c + (2 + 4 * b) * L) * multiple[b].cos;
        e_sin += load(c + (3 + 4 * b) * L) * multiple[b].sin;
        f += load(c + (4 + 4 * b) * L) * multiple[b].cos;
        f_sin += load(c + (5 + 4 * b) * L) * multiple[b].sin;
      }
      total += pivot.cos * (e + e_sin) + pivot.sin * (f + f_sin);
    }
    store(x + r * kTile, total);
  }
}

template <typename T>
struct Gradients {
  const SliceTiles<T> tiles;
  const int64_t groups;
  T* coefficients;   // [views][vectors of slices][groups][kCoefficients][lanes]
  T* scratch_tiles;  // [workers][height·kTile]
  T* dz;             // [workers]: a block in panels
  int64_t* next;

  Gradients(const SliceInput& in, int64_t threads, Arena& arena)
      : tiles(in, true, arena), groups(group_count(in.knots)) {
    coefficients = arena.take<T>(in.views * groups * kCoefficients * tiles.width());
    next = arena.take<int64_t>(1);
    const int64_t workers = threads < tiles.blocks() ? threads : tiles.blocks();
    scratch_tiles = arena.take<T>(workers * tiles.of_view.height * kTile);
    dz = arena.take<T>(workers * tiles.of_view.size);
  }

  // The coefficients of a view and a vector of slices.
  void prepare(int64_t task, const T* grads) const {
    const SliceInput& in = tiles.input;
    const int64_t vectors = tiles.width() / kLanes<T>, view = task / vectors, first = task % vectors * kLanes<T>;
    const T *of_cos = grads + view * in.knots * in.count, *of_sin = of_cos + in.views * in.knots * in.count;
    T* out = coefficients + task * groups * kCoefficients * kLanes<T>;
    for (int64_t group = 0; group < groups; ++group, out += kCoefficients * kLanes<T>) {
      vec<T> a[kGroup + 1] = {}, b[kGroup + 1] = {};  // of cos and sin of knots 8·group + 0 … 8; none of knot 0, 8, …
      for (int64_t k = 1; k <= kGroup && group * kGroup + k <= in.knots; ++k) {
        const int64_t at = (group * kGroup + k - 1) * in.count + first;
        const T t = static_cast<T>(static_cast<double>(group * kGroup + k) * in.step);
        for (int l = 0; l < kLanes<T> && first + l < in.count; ++l) {
          a[k][l] = t * of_sin[at + l];
          b[k][l] = -t * of_cos[at + l];
        }
      }
      store(out, a[kPivot]);
      store(out + kLanes<T>, b[kPivot]);
      for (int64_t k = 1; k <= kPivot; ++k) {
        T* c = out + (4 * k - 2) * kLanes<T>;
        store(c, a[kPivot + k] + a[kPivot - k]);
        store(c + kLanes<T>, b[kPivot + k] - b[kPivot - k]);
        store(c + 2 * kLanes<T>, b[kPivot + k] + b[kPivot - k]);
        store(c + 3 * kLanes<T>, a[kPivot - k] - a[kPivot + k]);
      }
    }
  }

  void work(int64_t worker, int64_t block, void* out) const {
    const SliceInput& in = tiles.input;
    const int64_t view = block / tiles.of_view.count, i = block % tiles.of_view.count;
    const int64_t rows = tiles.of_view.length(i);
    T *x = scratch_tiles + worker * tiles.of_view.height * kTile, *sum = dz + worker * tiles.of_view.size;
    for (int64_t k = 0; k < tiles.of_view.size; ++k) sum[k] = 0;
    const T* of_view = coefficients + view * groups * kCoefficients * tiles.width();
    for (int64_t j = 0; j < tiles.of_slices.count; ++j) {
      tiles.angles(block, j, x);
      for (int64_t c = 0; c < tiles.of_slices.length(j); c += kLanes<T>)
        differentiate(x + c, rows, groups, of_view + (tiles.of_slices.first(j) + c) * groups * kCoefficients);
      tile_product<T, false>(x, tiles.panels + j * tiles.of_slices.size, tiles.of_slices.height, rows,
                             tiles.of_slices.length(j), in.d, sum, tiles.of_view.height);
    }
    T* row = tiles.row_scratch + block * tiles.of_view.padded;
    for (int64_t r = 0; r < rows; ++r) {
      from_panels(sum, r, tiles.of_view, T(1), row);
      write_row(row, out, in.z.type, view * in.rows + tiles.of_view.first(i) + r, in.d);
    }
  }
};

template <typename T>
void run(const SliceInput& input, const SliceGradient& gradient, void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  const Gradients<T> all(input, parallel.threads, arena);
  all.tiles.pack(parallel);
  auto prepare = [&](int64_t task) { all.prepare(task, static_cast<const T*>(gradient.sums)); };
  parallel_each(parallel, input.views * all.tiles.width() / kLanes<T>, prepare);
  each_task(parallel, all.tiles.blocks(), all.next,
            [&](int64_t worker, int64_t block) { all.work(worker, block, gradient.z); });
}

}  // namespace

int64_t characteristic_sums_backward_workspace(const SliceInput& input, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.z.type, [&](auto t) { Gradients<decltype(t)>(input, threads, arena); });
  return arena.bytes;
}

void characteristic_sums_backward(const SliceInput& input, const SliceGradient& gradient, void* memory,
                                  const Parallel& parallel) {
  with_accumulator(input.z.type, [&](auto t) { run<decltype(t)>(input, gradient, memory, parallel); });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include "cpu/engine/slice_operator.h"

namespace sslfast {
namespace {

Tensor characteristic_sums_backward_cpu(const Tensor& grad_any, const Tensor& z, const Tensor& slices, int64_t knots,
                                        double step) {
  const SliceArguments given(z, slices, knots, step);
  const SliceInput& input = given.input;
  check_tensor(grad_any, "grad_sums", {2, input.views, knots, input.count}, given.kind, given.z);
  const Tensor grad = as_contiguous(grad_any);
  Tensor dz = allocate(given.z, {input.views, input.rows, input.d});
  const SliceGradient gradient{grad.const_data_ptr(), dz.mutable_data_ptr()};
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(given.z, SSLFAST_CALL(characteristic_sums_backward_workspace, input, parallel.threads));
  SSLFAST_CALL(characteristic_sums_backward, input, gradient, aligned(memory), parallel);
  return dz;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, characteristic_sums_backward)
#endif  // SSLFAST_CPU_DISPATCH
