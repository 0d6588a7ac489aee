// Gram anchoring on the CPU, without a P × P matrix: with x, y the rows of one image of the student and of the teacher,
// divided by their norms if asked, and f, h the identity or max(·, 0),
//
//   loss = 1/(B P²) Σ_images Σ_ij D_ij²,   D_ij = f(x_i·x_j) − h(y_i·y_j)
//   W_ij = D_ij f'(x_i·x_j),   dx = 4/(B P²) W x,   and through the norm
//
// D is symmetric: a tile above the diagonal is computed once and counts twice. The gradient does not need the loss, so
// it is made in the same pass, from the tile of D while it is in the cache: with U = 2 P² D operations an image, ½U for
// each of the two products and 1U for W x, 2U in all, where storing both matrices takes 4U and plain autograd 2U more.
#include "gram_anchor.h"

#include "common/l2_normalize.h"
#include "cpu/engine/gram_tiles.h"
#include "cpu/engine/pair_schedule.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

constexpr double kEps = 1e-12;    // of the norms
constexpr int64_t kAlone = 1024;  // the most rows of an image that a thread has alone

void run_serially(int64_t count, void (*body)(void*, int64_t), void* data) {
  for (int64_t i = 0; i < count; ++i) body(data, i);
}

template <typename T>
struct GramAnchor {
  static constexpr int C = kColumns<T>;

  // What the image at work needs: of one thread that has it alone, or of all together.
  struct Team {
    T *student, *teacher;  // [blocks][height/C][D][C]
    T *panels, *grad;      // [blocks][D/C][height][C], for the gradient
    T* inv_norm;           // [P]
    int64_t* done;         // [blocks + 1]
    double* sums;          // [pairs of blocks]
  };

  const GramInput& input;
  const bool with_gradient;
  Blocks<T> blocks;
  const int64_t pairs, teams;
  Team* team;
  T *strips, *tiles;  // of each thread: [C][padded], and two tiles
  double* of_image;
  int64_t* next;

  // Images are dealt to the threads where there are as many: then no thread waits for another. Large ones are shared,
  // as each thread's own would be much memory. The sizes of blocks depend on the matrices alone, and so does the order
  // of every sum.
  GramAnchor(const GramInput& in, bool gradient, int64_t threads, Arena& arena)
      : input(in),
        with_gradient(gradient),
        blocks(blocks_of(in)),
        pairs(blocks.count * (blocks.count + 1) / 2),
        teams(in.images >= threads && in.rows <= kAlone ? threads : 1) {
    team = arena.take<Team>(teams);
    const int64_t all = blocks.count * blocks.size, own = with_gradient ? all : 0;
    for (int64_t t = 0; t < teams; ++t) {
      const Team made{arena.take<T>(all),       arena.take<T>(all),     arena.take<T>(own),
                      arena.take<T>(own),       arena.take<T>(in.rows), arena.take<int64_t>(blocks.count + 1),
                      arena.take<double>(pairs)};
      if (arena.memory != nullptr) team[t] = made;
    }
    strips = arena.take<T>(threads * strip_size());
    tiles = arena.take<T>(threads * 2 * tile_size());
    of_image = arena.take<double>(in.images);
    next = arena.take<int64_t>(1);
  }

  // Few images: enough blocks for several threads; else as few as they can be, for less is then loaded.
  static Blocks<T> blocks_of(const GramInput& in) {
    Blocks<T> found(in.rows, in.d);
    if (in.images >= 8) {
      const int64_t fewest = (in.rows + kTile - 1) / kTile;
      found.height = round_up((in.rows + fewest - 1) / fewest, C);
      found.count = (in.rows + found.height - 1) / found.height;
      found.size = block_size<T>(found.height, in.d);
    }
    return found;
  }

  int64_t strip_size() const { return C * blocks.padded; }
  int64_t tile_size() const { return blocks.height * kTile; }
  int64_t in_panel() const { return blocks.padded * C; }  // numbers in C transposed rows

  // C rows of one side at a time: read, divided by their norms, and packed in the layouts that are wanted.
  void pack(const Rows& rows, int64_t image, int64_t block, T* transposed, T* panels, T* inv_norm, T* strip) const {
    for (int64_t k = 0; k < C * blocks.padded; ++k) strip[k] = 0;
    for (int64_t first = 0; first < blocks.length(block); first += C, transposed += in_panel()) {
      const int64_t left = blocks.length(block) - first, count = left < C ? left : C;
      for (int64_t r = 0; r < count; ++r) {
        T* row = strip + r * blocks.padded;
        const int64_t index = blocks.first(block) + first + r;
        read_row(rows, image * input.rows + index, blocks.d, row);
        T factor = 1;
        if (input.normalize) factor = inverse_norm(dot(row, row, blocks.padded), static_cast<T>(kEps));
        if (inv_norm != nullptr) inv_norm[index] = factor;
        for (int64_t k = 0; k < blocks.padded; k += kLanes<T>) store(row + k, load(row + k) * factor);
        if (panels != nullptr) to_panels(row, T(1), blocks.padded, blocks.height, panels + (first + r) * C);
      }
      for (int64_t k = count * blocks.padded; k < C * blocks.padded; ++k) strip[k] = 0;
      transpose(strip, blocks.padded, C, blocks.d, transposed, C);
    }
  }

  // A side's products of blocks i ≤ j.
  void products(const T* transposed, int64_t i, int64_t j, T* out) const {
    for (int64_t k = 0; k < blocks.length(i) * kTile; ++k) out[k] = 0;
    tile_gram(transposed + i * blocks.size, transposed + j * blocks.size, in_panel(), blocks.length(i),
              blocks.length(j), 0, blocks.d, i == j, out);
  }

  // From products x and y of a pair of rows: W over x; returns D².
  template <bool kStudent, bool kTeacher, typename V>
  static inline __attribute__((always_inline)) V difference(V& x, V y) {
    const V zero{};
    const V s = kStudent ? (x < zero ? zero : x) : x;
    const V d = s - (kTeacher ? (y < zero ? zero : y) : y);
    x = kStudent ? (x < zero ? zero : d) : d;
    return d * d;
  }

  // The sum of D² over a tile, and W in place of the student's products. Of a tile on the diagonal, what lies below it
  // is copied from above.
  template <bool kStudent, bool kTeacher>
  double differences(int64_t i, int64_t j, T* x, const T* y) const {
    const int64_t columns = blocks.length(j), whole = columns / kLanes<T> * kLanes<T>;
    double apart = 0, own = 0;  // pairs of different rows, which count twice, and rows with themselves
    for (int64_t r = 0; r < blocks.length(i); ++r) {
      T* xs = x + r * kTile;
      const T* ys = y + r * kTile;
      int64_t c = 0;
      if (i == j) {
        for (; c < r; ++c) xs[c] = x[c * kTile + r];
        own += difference<kStudent, kTeacher>(xs[c], ys[c]);
        for (++c; c < columns && c % kLanes<T> != 0; ++c) apart += difference<kStudent, kTeacher>(xs[c], ys[c]);
      }
      vec<T> sum{};
      for (; c < whole; c += kLanes<T>) {
        vec<T> v = load(xs + c);
        sum += difference<kStudent, kTeacher>(v, load(ys + c));
        store(xs + c, v);
      }
      T rest = sum_lanes<T>(sum);
      for (; c < columns; ++c) rest += difference<kStudent, kTeacher>(xs[c], ys[c]);
      apart += rest;
    }
    return 2 * apart + own;
  }

  double differences(int64_t i, int64_t j, T* x, const T* y) const {
    switch (input.negatives) {
      case Negatives::clamp: return differences<true, true>(i, j, x, y);
      case Negatives::clamp_teacher: return differences<false, true>(i, j, x, y);
      default: return differences<false, false>(i, j, x, y);
    }
  }

  void tile(const Team& t, int64_t i, int64_t j, T* x, T* y) const {
    products(t.student, i, j, x);
    products(t.teacher, i, j, y);
    t.sums[j * (j + 1) / 2 + i] = differences(i, j, x, y);
    if (!with_gradient) return;
    const int64_t height = blocks.height, size = blocks.size, rows = blocks.length(i), columns = blocks.length(j);
    tile_product<T, false>(x, t.panels + j * size, height, rows, columns, blocks.d, t.grad + i * size, height);
    if (i != j)
      tile_product<T, true>(x, t.panels + i * size, height, columns, rows, blocks.d, t.grad + j * size, height);
  }

  // Writes the gradient of block i.
  void finish(const Team& t, int64_t image, int64_t i, T* row, T* out) const {
    const double count = static_cast<double>(input.images) * static_cast<double>(input.rows);
    const T factor = static_cast<T>(4 / (count * static_cast<double>(input.rows)));
    const T *x = t.panels + i * blocks.size, *g = t.grad + i * blocks.size;
    for (int64_t r = 0; r < blocks.length(i); ++r) {
      const int64_t index = blocks.first(i) + r;
      from_panels(g, r, blocks, T(1), row);
      T scale = factor;
      if (input.normalize) {
        const T inv = t.inv_norm[index];
        const T removed = projection_weight(dot_in_panels(x, g, r, blocks), inv, static_cast<T>(kEps));
        const T* at = x + r * C;
        for (int64_t k = 0; k < blocks.padded; k += C, at += blocks.height * C)
          for (int c = 0; c < C; ++c) row[k + c] -= removed * at[c];
        scale *= inv;
      }
      T* to = out + (image * input.rows + index) * blocks.d;
      for (int64_t k = 0; k < blocks.d; ++k) to[k] = row[k] * scale;
    }
  }

  // The sum of one image's D², by the threads of `parallel`, whose strips and tiles begin at number `worker`.
  double one_image(const Parallel& parallel, const Team& t, int64_t image, int64_t worker, T* out) const {
    const int64_t threads = parallel.threads < blocks.count ? parallel.threads : blocks.count;
    int64_t* ticket = t.done + blocks.count;
    each_task(parallel, 2 * blocks.count, ticket, [&](int64_t w, int64_t task) {
      const int64_t i = task / 2;
      T* strip = strips + (worker + w) * strip_size();
      if (task % 2 == 1) return pack(input.teacher, image, i, t.teacher + i * blocks.size, nullptr, nullptr, strip);
      T* panels = with_gradient ? t.panels + i * blocks.size : nullptr;
      pack(input.student, image, i, t.student + i * blocks.size, panels, t.inv_norm, strip);
      for (int64_t k = 0; with_gradient && k < blocks.size; ++k) t.grad[i * blocks.size + k] = 0;
    });
    for (int64_t b = 0; b <= blocks.count; ++b) t.done[b] = 0;
    const PairSchedule schedule{blocks.count, 1, t.done};
    auto body = [&](int64_t w) {
      T* x = tiles + (worker + w) * 2 * tile_size();
      schedule.work([&](int64_t i, int64_t j) { tile(t, i, j, x, x + tile_size()); });
    };
    parallel_each(parallel, threads, body);
    if (with_gradient)
      each_task(parallel, blocks.count, ticket,
                [&](int64_t w, int64_t i) { finish(t, image, i, strips + (worker + w) * strip_size(), out); });
    double sum = 0;
    for (int64_t p = 0; p < pairs; ++p) sum += t.sums[p];
    return sum;
  }

  double run(const Parallel& parallel, T* out) {
    if (teams == 1) {
      for (int64_t image = 0; image < input.images; ++image)
        of_image[image] = one_image(parallel, team[0], image, 0, out);
    } else {
      const Parallel alone{run_serially, 1};
      each_task(parallel, input.images, next, [&](int64_t worker, int64_t image) {
        of_image[image] = one_image(alone, team[worker], image, worker, out);
      });
    }
    double sum = 0;
    for (int64_t image = 0; image < input.images; ++image) sum += of_image[image];
    return sum / (static_cast<double>(input.images) * static_cast<double>(input.rows)) /
           static_cast<double>(input.rows);
  }
};

}  // namespace

int64_t gram_anchor_workspace(const GramInput& input, bool with_gradient, int64_t threads) {
  return with_accumulator(input.student.type, [&](auto t) {
    Arena arena{nullptr};
    const GramAnchor<decltype(t)> task(input, with_gradient, threads, arena);
    return arena.bytes;
  });
}

double gram_anchor(const GramInput& input, void* gradient, void* memory, const Parallel& parallel) {
  return with_accumulator(input.student.type, [&](auto t) {
    using T = decltype(t);
    Arena arena{static_cast<char*>(memory)};
    return GramAnchor<T>(input, gradient != nullptr, parallel.threads, arena).run(parallel, static_cast<T*>(gradient));
  });
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor> gram_anchor_cpu(const Tensor& student_any, const Tensor& teacher_any, bool normalize,
                                           int64_t negatives, bool with_gradient) {
  SSLFAST_CHECK(student_any.dim() == 3 && student_any.numel() > 0,
                "student must be [images, rows, features] with at least one of each");
  const int64_t images = student_any.size(0), rows = student_any.size(1), d = student_any.size(2);
  check_tensor(teacher_any, "teacher", {images, rows, d}, student_any.scalar_type(), student_any);
  SSLFAST_CHECK(negatives >= 0 && negatives <= 2, "negatives must be 0, 1 or 2, got ", negatives);
  const Tensor student = as_contiguous(student_any), teacher = as_contiguous(teacher_any);
  const ElementType type = element_type(student, "student");
  const GramInput input{{student.const_data_ptr(), type}, {teacher.const_data_ptr(), type}, images, rows, d, normalize,
                        static_cast<Negatives>(negatives)};
  const ScalarType kind = accumulator_type(student);
  Tensor loss = allocate(student, {}, kind);
  Tensor gradient = with_gradient ? allocate(student, {images, rows, d}, kind) : allocate(student, {0, rows, d}, kind);
  const Parallel parallel = torch_parallel();
  Tensor memory = scratch(student, SSLFAST_CALL(gram_anchor_workspace, input, with_gradient, parallel.threads));
  set_scalar(loss, SSLFAST_CALL(gram_anchor, input, data_or_null(gradient), aligned(memory), parallel));
  return {loss, gradient};
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) { m.impl("gram_anchor", TORCH_BOX(&sslfast::gram_anchor_cpu)); }
#endif  // SSLFAST_CPU_DISPATCH
