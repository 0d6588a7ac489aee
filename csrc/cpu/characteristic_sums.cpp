// Sums of the empirical characteristic function on slices, on the CPU: of every view and slice, over its rows,
//
//   C_k = Σ_i cos(k θ_i),   S_k = Σ_i sin(k θ_i),   θ_i = step·z_i·a,   k = 1 … K
//
// One cosine and one sine are computed for a row and a slice. As only sums over the rows are wanted, no cos kθ_i is: of
// a group of knots around a pivot P the products cos Pθ cos bθ, sin Pθ sin bθ, sin Pθ cos bθ and cos Pθ sin bθ are
// summed, one multiply-add each, and their sums combined. Beyond the pivot P + 4 the sums are those of Chebyshev:
// cos((P + 4)θ) = 2 cos Pθ cos 4θ − cos((P − 4)θ). So 16 multiply-adds and additions serve 16 numbers.

#include "cpu/engine/slice_tiles.h"

SSLFAST_DECLARE(int64_t characteristic_sums_workspace(const SliceInput& input, int64_t threads))
SSLFAST_DECLARE(void characteristic_sums(const SliceInput& input, void* sums, void* workspace,
                                         const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// What is summed for a group: cos P, sin P; for b = 1, 2, 3 cos P cos b, sin P sin b, sin P cos b, cos P sin b; and
// cos P cos 4, sin P cos 4.
constexpr int64_t kProducts = 16;

template <typename T>
inline __attribute__((always_inline)) void add_products(const Angle<T>& pivot, const Angle<T> (&multiple)[4],
                                                        vec<T> (&sum)[kProducts]) {
  sum[0] += pivot.cos;
  sum[1] += pivot.sin;
#pragma GCC unroll 3
  for (int b = 0; b < 3; ++b) {
    sum[2 + 4 * b] += pivot.cos * multiple[b].cos;
    sum[3 + 4 * b] += pivot.sin * multiple[b].sin;
    sum[4 + 4 * b] += pivot.sin * multiple[b].cos;
    sum[5 + 4 * b] += pivot.cos * multiple[b].sin;
  }
  sum[14] += pivot.cos * multiple[3].cos;
  sum[15] += pivot.sin * multiple[3].cos;
}

// total[product][lane] += the sums of one stripe.
template <typename T>
inline void add_to(double* total, int64_t stride, const vec<T> (&sum)[kProducts]) {
  for (int64_t product = 0; product < kProducts; ++product) {
    T lanes[kLanes<T>];
    store(lanes, sum[product]);
    for (int l = 0; l < kLanes<T>; ++l) total[product * stride + l] += static_cast<double>(lanes[l]);
  }
}

// The sums of a stripe of `rows` ≤ kStripe vectors of angles into total [groups][kProducts][stride]. `kept`: for each
// row the four multiples and the pivot, of which the groups after the first are made.
template <typename T>
void sum_stripe(T* x, int64_t rows, int64_t groups, Angle<T>* kept, double* total, int64_t stride) {
  tame(x, rows);
  vec<T> sum[kProducts] = {};
  for (int64_t r = 0; r < rows; ++r) {
    Angle<T> multiple[4];
    multiples_of<T>(load(x + r * kTile), multiple);
    add_products(multiple[3], multiple, sum);
    if (groups > 1) {
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) kept[r * 5 + b] = multiple[b];
      kept[r * 5 + 4] = sum_of(multiple[3], twice(multiple[3]));
    }
  }
  add_to<T>(total, stride, sum);
  for (int64_t group = 1; group < groups; ++group) {
    for (vec<T>& s : sum) s = vec<T>{};
    for (int64_t r = 0; r < rows; ++r) {
      const Angle<T> multiple[4] = {kept[r * 5], kept[r * 5 + 1], kept[r * 5 + 2], kept[r * 5 + 3]};
      const Angle<T> pivot = kept[r * 5 + 4];
      add_products(pivot, multiple, sum);
      if (group + 1 < groups) kept[r * 5 + 4] = sum_of(pivot, twice(multiple[3]));
    }
    add_to<T>(total + group * kProducts * stride, stride, sum);
  }
}

template <typename T>
struct Sums {
  const SliceTiles<T> tiles;
  const int64_t groups, splits;  // few views and slices: the rows of each are shared by so many tasks
  double* totals;                // [workers, or tasks where rows are shared][groups][kProducts][height]
  T* scratch_tiles;              // [workers][height·kTile]
  Angle<T>* kept;                // [workers][kStripe][5]
  int64_t* next;

  Sums(const SliceInput& in, int64_t threads, Arena& arena)
      : tiles(in, false, arena), groups(group_count(in.knots)), splits(split_count(threads)) {
    const int64_t workers = threads < tasks() ? threads : tasks();
    totals = arena.take<double>((splits == 1 ? workers : tasks()) * total_size());
    next = arena.take<int64_t>(1);
    scratch_tiles = arena.take<T>(workers * tiles.of_view.height * kTile);
    kept = arena.take<Angle<T>>(workers * kStripe * 5);
  }

  int64_t pairs() const { return tiles.input.views * tiles.of_slices.count; }
  int64_t tasks() const { return pairs() * splits; }
  int64_t total_size() const { return groups * kProducts * tiles.of_slices.height; }
  int64_t split_count(int64_t threads) const {
    const int64_t wanted = threads == 1 ? 1 : (2 * threads + pairs() - 1) / pairs(), most = tiles.of_view.count;
    return wanted < most ? wanted : most;
  }

  // The sums of a view, a block of slices and a part of the view's row blocks; all of them go straight to the output.
  void work(int64_t worker, int64_t task, T* sums) const {
    const int64_t pair = task % pairs(), split = task / pairs();
    const int64_t view = pair / tiles.of_slices.count, j = pair % tiles.of_slices.count;
    T* x = scratch_tiles + worker * tiles.of_view.height * kTile;
    double* total = totals + (splits == 1 ? worker : task) * total_size();
    for (int64_t i = 0; i < total_size(); ++i) total[i] = 0;
    for (int64_t i = split; i < tiles.of_view.count; i += splits) {
      tiles.angles(view * tiles.of_view.count + i, j, x);
      const int64_t rows = tiles.of_view.length(i);
      for (int64_t c = 0; c < tiles.of_slices.length(j); c += kLanes<T>)
        for (int64_t r = 0; r < rows; r += kStripe)
          sum_stripe(x + r * kTile + c, rows - r < kStripe ? rows - r : kStripe, groups, kept + worker * kStripe * 5,
                     total + c, tiles.of_slices.height);
    }
    if (splits == 1) write_knots(pair, total, sums);
  }

  // The totals of a view and a block of slices, of all splits in their order, go to the output.
  void merge(int64_t pair, T* sums) const {
    double* total = totals + pair * total_size();
    for (int64_t split = 1; split < splits; ++split)
      for (int64_t i = 0; i < total_size(); ++i) total[i] += total[split * pairs() * total_size() + i];
    write_knots(pair, total, sums);
  }

  // The knots of a block of slices from its sums of products, which it overwrites.
  void write_knots(int64_t pair, double* total, T* sums) const {
    const SliceInput& in = tiles.input;
    const int64_t view = pair / tiles.of_slices.count, j = pair % tiles.of_slices.count;
    const int64_t plane = in.views * in.knots * in.count, height = tiles.of_slices.height;
    const int64_t length = tiles.of_slices.length(j);
    T* out = sums + view * in.knots * in.count + tiles.of_slices.first(j);
    const auto write = [&](int64_t knot, const double* cos, const double* sin) {
      T* at = out + (knot - 1) * in.count;
      for (int64_t s = 0; knot <= in.knots && s < length; ++s) {
        at[s] = static_cast<T>(cos[s]);
        at[plane + s] = static_cast<T>(sin[s]);
      }
    };
    for (int64_t group = 0; group < groups; ++group, total += kProducts * height) {
      const int64_t pivot = group * kGroup + kPivot;
      for (int64_t b = 1; b < kPivot; ++b) {
        double *cc = total + (4 * b - 2) * height, *ss = cc + height, *sc = ss + height, *cs = sc + height;
        for (int64_t s = 0; s < length; ++s) {
          const double cos = cc[s], sin = sc[s];
          cc[s] = cos + ss[s];
          ss[s] = cos - ss[s];
          sc[s] = sin - cs[s];
          cs[s] = sin + cs[s];
        }
        write(pivot - b, cc, sc);
        write(pivot + b, ss, cs);
      }
      write(pivot, total, total + height);
      double *cos = total + 14 * height, *sin = cos + height;
      for (int64_t s = 0; s < length; ++s) {
        cos[s] = 2 * cos[s] - (group == 0 ? static_cast<double>(in.rows) : cos[s - kProducts * height]);
        sin[s] = 2 * sin[s] - (group == 0 ? 0 : sin[s - kProducts * height]);
      }
      write(pivot + kPivot, cos, sin);
    }
  }
};

template <typename T>
void run(const SliceInput& input, void* sums, void* memory, const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  const Sums<T> all(input, parallel.threads, arena);
  all.tiles.pack(parallel);
  T* out = static_cast<T*>(sums);
  each_task(parallel, all.tasks(), all.next, [&](int64_t worker, int64_t task) { all.work(worker, task, out); });
  auto merge = [&](int64_t pair) { all.merge(pair, out); };
  if (all.splits > 1) parallel_each(parallel, all.pairs(), merge);
}

}  // namespace

int64_t characteristic_sums_workspace(const SliceInput& input, int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.z.type, [&](auto t) { Sums<decltype(t)>(input, threads, arena); });
  return arena.bytes;
}

void characteristic_sums(const SliceInput& input, void* sums, void* memory, const Parallel& parallel) {
  with_accumulator(input.z.type, [&](auto t) { run<decltype(t)>(input, sums, memory, parallel); });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include "cpu/engine/slice_operator.h"

namespace sslfast {
namespace {

Tensor characteristic_sums_cpu(const Tensor& z, const Tensor& slices, int64_t knots, double step) {
  const SliceArguments given(z, slices, knots, step);
  const SliceInput& input = given.input;
  Tensor sums = allocate(given.z, {2, input.views, knots, input.count}, given.kind);
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(given.z, SSLFAST_CALL(characteristic_sums_workspace, input, parallel.threads));
  SSLFAST_CALL(characteristic_sums, input, sums.mutable_data_ptr(), aligned(memory), parallel);
  return sums;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, characteristic_sums)
#endif  // SSLFAST_CPU_DISPATCH
