// Cross-entropy of student against teacher over K prototypes on the CPU, with its gradient, without a matrix of rows ×
// K; docs/prototype_cross_entropy.md. Samples are taken a chunk at a time, all views of a sample together. In base 2,
//
//   x_kn = (w_k·h_n)·log2(e)/τ_s,   y_km = (u_k·g_m)·log2(e)/τ_t + β_k·log2(e)      of the student and of the teacher
//   visit 1   every block of prototypes: x, y, 2^(x − max), 2^(y − max), their sums and Σ_k 2^(y − max) x, and where
//             there is a gradient the exponentials are kept
//   merge     Z_n, Z_m from the blocks' sums;  ℓ = ln 2·(log2 Z_n − Σ_k p_km x_kn)
//   visit 2   G_kn = weight/τ_s·(2^x_kn/Z_n − 2^y_km/Z_m), summed over the teachers m that n meets
//             dW_k += Σ_n G_kn h_n,   dh_n += Σ_k G_kn w_k
//
// Four products of N·K·D and one exponential for each logit. A block of prototypes belongs to one thread, so no sum
// depends on the order of the threads.
#include "cpu/prototype_cross_entropy.h"

#include "cpu/engine/prototype_softmax.h"
#include "cpu/engine/prototype_tiling.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

template <typename T>
struct CrossEntropy {
  static constexpr int64_t kSlack = kLanes<T>;  // a view's last vector may reach beyond the last column

  const PrototypeInput& in;
  const PrototypeGradient& out;
  const bool learns;
  const Blocks<T> of_k;
  const Tiling<T> tiling;
  const FeaturePlan<T> student, teacher;
  const int64_t lent, most_tiles;         // tiles that dW has room for, and of the first chunk
  const int64_t splits, workers, stride;  // stride: numbers that a block and a tile leave: max and sum, and crosses
  const SplitFactor<T> student_factor, teacher_factor;  // log2(e)/τ
  SamplePairs<T> pairs;
  int64_t* next;
  T *student_panels, *student_transposed, *teacher_panels, *teacher_transposed, *rows;
  T *merged, *statistics, *exponentials, *dstudent, *scratch;
  double* losses;  // [tiles of a chunk]
  int64_t scratch_size = 0;

  CrossEntropy(const PrototypeInput& input, const PrototypeGradient& gradient, int64_t threads, Arena& arena)
      : in(input),
        out(gradient),
        learns(gradient.student != nullptr || gradient.prototypes != nullptr),
        of_k(input.prototypes, input.d),
        tiling(input, of_k, learns),
        student(input.student.count, input.samples, tiling.in_tile, input.d),
        teacher(input.teacher.count, input.samples, tiling.in_tile, input.d),
        lent(gradient.prototypes != nullptr && tiling.lds + tiling.ldt <= input.d ? 1 : 0),
        most_tiles(tiling.in_chunk + lent),
        splits(split_count(of_k.count, threads)),
        workers(threads < splits ? threads : splits),
        stride(2 * (tiling.lds + tiling.ldt) + input.pairs * tiling.ldb),
        student_factor(kLog2e / input.student_temperature),
        teacher_factor(kLog2e / input.teacher_temperature),
        pairs(input, arena) {
    const int64_t tiles = most_tiles;
    next = arena.take<int64_t>(1);
    student_panels = arena.take<T>(tiles * student.size);
    student_transposed = arena.take<T>(tiles * student.size);
    teacher_panels = arena.take<T>(tiles * teacher.size);
    teacher_transposed = arena.take<T>(tiles * teacher.size);
    rows = arena.take<T>(2 * tiles * of_k.padded);
    losses = arena.take<double>(tiles);
    merged = arena.take<T>(tiles * 2 * (kTile + kSlack));
    statistics = arena.take<T>(tiles * of_k.count * stride);
    exponentials = arena.take<T>(tiling.kept * tiling.in_chunk * of_k.height * (tiling.lds + tiling.ldt));
    dstudent = out.student != nullptr ? arena.take<T>(splits * tiles * student.size) : nullptr;
    const int64_t before = arena.bytes;
    Scratch(*this, arena);
    scratch_size = (arena.bytes - before) / static_cast<int64_t>(sizeof(T));
    arena.bytes = before;
    scratch = arena.take<T>(workers * scratch_size);
  }

  // Of a worker: logits and exponentials of two tiles, a block of prototypes for each side, what a block leaves where
  // it is visited again, a row, and the edge of a product.
  struct Scratch {
    T *x, *y, *exponentials, *student_block, *teacher_block, *statistics, *row, *edge;

    Scratch(const CrossEntropy& of, Arena& arena) {
      const int64_t tile = of.of_k.height * kTile + kSlack;
      x = arena.template take<T>(tile);
      y = arena.template take<T>(tile);
      exponentials = arena.template take<T>(of.of_k.height * (of.tiling.lds + of.tiling.ldt) + kSlack);
      student_block = arena.template take<T>(of.of_k.size);
      teacher_block = arena.template take<T>(of.of_k.size);
      statistics = arena.template take<T>(of.stride);
      row = arena.template take<T>(of.of_k.padded + kTile + kSlack);
      edge = arena.template take<T>(of.of_k.height * kColumns<T>);
    }
  };
  Scratch scratch_of(int64_t worker) const {
    Arena arena{reinterpret_cast<char*>(scratch + worker * scratch_size)};
    Scratch mine(*this, arena);
    for (int64_t k = 0; k < of_k.padded; ++k) mine.row[k] = 0;
    return mine;
  }

  // What block b leaves of a tile of the chunk.
  struct Statistics {
    T *student_max, *student_sum, *teacher_max, *teacher_sum, *cross;  // [lds], [lds], [ldt], [ldt], [pairs][ldb]
  };
  Statistics statistics_of(int64_t tile, int64_t b) const {
    return statistics_at(statistics + (tile * of_k.count + b) * stride);
  }
  Statistics statistics_at(T* at) const {
    return {at, at + tiling.lds, at + 2 * tiling.lds, at + 2 * tiling.lds + tiling.ldt,
            at + 2 * (tiling.lds + tiling.ldt)};
  }
  // Where the exponentials of a tile and block b are kept, the student's and then the teacher's; null for nowhere. In
  // the first chunk dW is not in use yet, and has room for its first tile.
  T* exponentials_of(int64_t tile, int64_t b, bool fresh) const {
    const int64_t columns = tiling.lds + tiling.ldt, slot = b * tiling.kept / of_k.count;
    if (fresh && lent != 0) {
      if (tile == 0) return static_cast<T*>(out.prototypes) + of_k.first(b) * in.d;
      --tile;
    }
    if ((b + 1) * tiling.kept / of_k.count == slot) return nullptr;
    return exponentials + (slot * tiling.in_chunk + tile) * of_k.height * columns;
  }
  T* dstudent_of(int64_t split, int64_t tile) const { return dstudent + (split * most_tiles + tile) * student.size; }
  void pack_features(const Parallel& parallel, const int64_t* samples, int64_t count, int64_t tiles) {
    auto body = [&](int64_t task) {
      const int64_t tile = task / 2, first = tile * tiling.in_tile, some = tiling.samples_of(tile, count);
      T* row = rows + task * of_k.padded;
      if (task % 2 == 0)
        student.pack(in.student.rows, samples + first, some, student_panels + tile * student.size,
                     student_transposed + tile * student.size, row);
      else
        teacher.pack(in.teacher.rows, samples + first, some, teacher_panels + tile * teacher.size,
                     teacher_transposed + tile * teacher.size, row);
    };
    parallel_each(parallel, 2 * tiles, body);
  }

  // Visit 1 of block b.
  void observe(int64_t b, int64_t count, int64_t tiles, bool fresh, const Scratch& mine) const {
    pack_prototypes(in.of_student, of_k, b, mine.student_block, mine.row);
    pack_prototypes(in.of_teacher, of_k, b, mine.teacher_block, mine.row);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      T* e = exponentials_of(tile, b, fresh);
      observe_tile(b, tile, tiling.samples_of(tile, count), e == nullptr ? mine.exponentials : e,
                   statistics_of(tile, b), mine);
    }
  }

  // Logits of a tile and block b, whose prototypes are packed: their exponentials into e and what they leave.
  void observe_tile(int64_t b, int64_t tile, int64_t some, T* e, const Statistics& found, const Scratch& mine) const {
    const int64_t rows_k = of_k.length(b), of_teachers = teacher.views * some;
    T* p = e + rows_k * tiling.lds;
    tile_similarity(mine.teacher_block, teacher_transposed + tile * teacher.size, of_k.height, rows_k, of_teachers,
                    in.d, teacher_factor, mine.y);
    if (in.teacher_bias != nullptr)
      add_row_bias(mine.y, rows_k, of_teachers, static_cast<const T*>(in.teacher_bias) + of_k.first(b));
    for (int64_t j = 0; j < of_teachers; j += kLanes<T>) {
      const vec<T> top = column_maximum(mine.y + j, rows_k);
      vec<T> sum;
      observe_columns<T, 0>(mine.y + j, rows_k, shifts_of<T>(top), p + j, tiling.ldt, &sum, nullptr, 0, nullptr);
      store(found.teacher_max + j, references_of<T>(top));
      store(found.teacher_sum + j, sum);
    }
    tile_similarity(mine.student_block, student_transposed + tile * student.size, of_k.height, rows_k,
                    student.views * some, in.d, student_factor, mine.x);
    for (int64_t v = 0; v < student.views; ++v)
      for (int64_t i = 0; i < some; i += kLanes<T>)
        observe_view(mine.x, rows_k, some, v, i, learns ? e : nullptr, p, found);
  }

  // One vector of samples of view v, from sample i of the tile on. Beyond the tile's last sample a vector holds the
  // next view's first ones: what is stored for them is stored again, from all of their own, when their turn comes.
  void observe_view(const T* x, int64_t rows_k, int64_t some, int64_t v, int64_t i, T* e, const T* p,
                    const Statistics& found) const {
    const int64_t j = v * some + i, first = pairs.starts[v], met = pairs.starts[v + 1] - first;
    const vec<T> top = column_maximum(x + j, rows_k), shift = shifts_of<T>(top);
    const T* of[2] = {};
    vec<T> sum, cross[2];
    for (int64_t t = 0; t < met && t < 2; ++t) of[t] = p + pairs.teachers[first + t] * some + i;
    T* to = e == nullptr ? nullptr : e + j;
    if (met == 0)
      observe_columns<T, 0>(x + j, rows_k, shift, to, tiling.lds, &sum, of, tiling.ldt, cross);
    else if (met == 1)
      observe_columns<T, 1>(x + j, rows_k, shift, to, tiling.lds, &sum, of, tiling.ldt, cross);
    else
      observe_columns<T, 2>(x + j, rows_k, shift, to, tiling.lds, &sum, of, tiling.ldt, cross);
    store(found.student_max + j, references_of<T>(top));
    store(found.student_sum + j, sum);
    for (int64_t t = 0; t < met; ++t)
      store(found.cross + (first + t) * tiling.ldb + i,
            t < 2 ? cross[t] : cross_columns(x + j, rows_k, p + pairs.teachers[first + t] * some + i, tiling.ldt));
  }

  // The loss of a tile; and in place of each block's sums what its exponentials are multiplied by in G.
  double merge(int64_t tile, const int64_t* samples, int64_t some, T* max, T* total) const {
    const Statistics first = statistics_of(tile, 0);
    const int64_t of_teachers = teacher.views * some, of_students = student.views * some;
    double loss = 0;
    merge_blocks(first.teacher_max, first.teacher_sum, stride, of_k.count, of_teachers, max, total);
    for (int64_t b = 0; b < of_k.count; ++b) {
      const Statistics at = statistics_of(tile, b);
      for (int64_t j = 0; j < of_teachers; ++j) at.teacher_sum[j] /= total[j];
      for (int64_t v = 0; v < student.views; ++v)
        for (int64_t p = pairs.starts[v]; p < pairs.starts[v + 1]; ++p)
          for (int64_t i = 0; i < some; ++i)
            loss -= pairs.weight_of(samples[i]) * static_cast<double>(at.cross[p * tiling.ldb + i]) *
                    static_cast<double>(at.teacher_sum[pairs.teachers[p] * some + i]);
    }
    merge_blocks(first.student_max, first.student_sum, stride, of_k.count, of_students, max, total);
    for (int64_t v = 0; v < student.views; ++v)
      for (int64_t i = 0, j = v * some; i < some && pairs.starts[v + 1] > pairs.starts[v]; ++i, ++j)
        loss += pairs.weight_of(samples[i]) * static_cast<double>(pairs.starts[v + 1] - pairs.starts[v]) *
                (static_cast<double>(max[j]) + __builtin_log2(static_cast<double>(total[j])));
    const double scale = 1 / (static_cast<double>(in.pairs) * in.student_temperature);
    for (int64_t b = 0; learns && b < of_k.count; ++b) {
      const Statistics at = statistics_of(tile, b);
      for (int64_t t = 0, j = 0; t < teacher.views; ++t)
        for (int64_t i = 0; i < some; ++i, ++j)
          at.teacher_sum[j] *= static_cast<T>(scale * pairs.weight_of(samples[i]));
      for (int64_t v = 0, j = 0; v < student.views; ++v)
        for (int64_t i = 0; i < some; ++i, ++j)
          at.student_sum[j] *= static_cast<T>(scale * pairs.weight_of(samples[i]) *
                                              static_cast<double>(pairs.starts[v + 1] - pairs.starts[v])) /
                               total[j];
    }
    return kLn2 / static_cast<double>(in.pairs) * loss;
  }

  // G of a tile and block b, [prototypes][kTile], from its exponentials. `p`: scratch of a row.
  void weights(int64_t b, int64_t tile, int64_t some, const T* e, T* g, T* p) const {
    const Statistics factor = statistics_of(tile, b);
    const T* q = e + of_k.length(b) * tiling.lds;
    for (int64_t k = 0; k < of_k.length(b); ++k, e += tiling.lds, q += tiling.ldt, g += kTile) {
      for (int64_t j = 0; j < teacher.views * some; j += kLanes<T>)
        store(p + j, load(q + j) * load(factor.teacher_sum + j));
      for (int64_t v = 0; v < student.views; ++v)
        for (int64_t i = 0, j = v * some; i < some; i += kLanes<T>, j += kLanes<T>) {
          vec<T> w = load(e + j) * load(factor.student_sum + j);
          for (int64_t t = pairs.starts[v]; t < pairs.starts[v + 1]; ++t) w -= load(p + pairs.teachers[t] * some + i);
          store(g + j, w);
        }
    }
  }

  // Visit 2 of block b in a split; `fresh`: the first chunk, whose products are the first in dW.
  void descend(int64_t split, int64_t b, int64_t count, int64_t tiles, bool fresh, const Scratch& mine) const {
    const int64_t rows_k = of_k.length(b);
    const bool again = exponentials_of(tiles - 1, b, fresh) == nullptr;
    if (again || dstudent != nullptr) pack_prototypes(in.of_student, of_k, b, mine.student_block, mine.row);
    if (again) pack_prototypes(in.of_teacher, of_k, b, mine.teacher_block, mine.row);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t some = tiling.samples_of(tile, count), columns = student.views * some;
      T* e = exponentials_of(tile, b, fresh);
      if (e == nullptr) {
        e = mine.exponentials;
        observe_tile(b, tile, some, e, statistics_at(mine.statistics), mine);
      }
      weights(b, tile, some, e, mine.x, mine.row + of_k.padded);
      if (out.prototypes != nullptr) {
        T* dw = static_cast<T*>(out.prototypes) + of_k.first(b) * in.d;
        const T* panels = student_panels + tile * student.size;
        if (fresh && tile == 0)
          product_into_rows<T, Store::replace>(mine.x, panels, student.height, rows_k, columns, in.d, dw, mine.edge);
        else
          product_into_rows<T, Store::add>(mine.x, panels, student.height, rows_k, columns, in.d, dw, mine.edge);
      }
      if (dstudent != nullptr)
        tile_product<T, true>(mine.x, mine.student_block, of_k.height, columns, rows_k, in.d, dstudent_of(split, tile),
                              student.height);
    }
  }

  void finish_prototypes(int64_t b, const Scratch& mine) const {
    if (out.prototypes == nullptr || !in.of_student.normalize) return;
    T *dw = static_cast<T*>(out.prototypes) + of_k.first(b) * in.d, *dgain = static_cast<T*>(out.gain);
    through_normalization(in.of_student, of_k.first(b), of_k.length(b), in.d, dw,
                          dgain == nullptr ? nullptr : dgain + of_k.first(b), mine.row);
  }

  // dh of a tile: the sum over the splits, in their order.
  void finish_student(int64_t tile, const int64_t* samples, int64_t some) const {
    T* row = rows + tile * of_k.padded;
    for (int64_t v = 0; v < student.views; ++v)
      for (int64_t i = 0; i < some; ++i) {
        const int64_t at = (v * some + i) * kColumns<T>;
        for (int64_t k = 0; k < of_k.padded; k += kColumns<T>)
          for (int c = 0; c < kColumns<T>; c += kLanes<T>) {
            vec<T> sum = {};
            for (int64_t s = 0; s < splits; ++s) sum += load(dstudent_of(s, tile) + k * student.height + at + c);
            store(row + k + c, sum);
          }
        narrow_row<T>(row, out.student, v * in.samples + samples[i], in.d);
      }
  }

  // One chunk: `count` samples; `fresh`, `last`: the first and the last chunk. Returns its loss.
  double chunk(const int64_t* samples, int64_t count, bool fresh, bool last, const Parallel& parallel) {
    const int64_t tiles = (count + tiling.in_tile - 1) / tiling.in_tile;
    pack_features(parallel, samples, count, tiles);
    const auto scratch_at = [&](int64_t worker) { return scratch_of(worker); };
    each_block(parallel, splits, of_k.count, next, scratch_at,
               [&](int64_t, int64_t b, const Scratch& mine) { observe(b, count, tiles, fresh, mine); });
    auto merge_one = [&](int64_t tile) {
      T* max = merged + tile * 2 * (kTile + kSlack);
      losses[tile] =
          merge(tile, samples + tile * tiling.in_tile, tiling.samples_of(tile, count), max, max + kTile + kSlack);
    };
    parallel_each(parallel, tiles, merge_one);
    double loss = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) loss += losses[tile];
    if (!learns) return loss;
    if (dstudent != nullptr) {
      auto clear = [&](int64_t s) { clear_numbers<T>(dstudent_of(s, 0), tiles * student.size); };
      parallel_each(parallel, splits, clear);
    }
    each_block(parallel, splits, of_k.count, next, scratch_at, [&](int64_t split, int64_t b, const Scratch& mine) {
      descend(split, b, count, tiles, fresh, mine);
      if (last) finish_prototypes(b, mine);
    });
    auto finish = [&](int64_t tile) {
      finish_student(tile, samples + tile * tiling.in_tile, tiling.samples_of(tile, count));
    };
    if (dstudent != nullptr) parallel_each(parallel, tiles, finish);
    return loss;
  }

  double run(const Parallel& parallel) {
    const int64_t count = pairs.prepare();
    if (count < in.samples)
      clear_numbers<T>(out.student, in.student.count * in.samples * in.d);  // rows that take no part
    if (count == 0) {
      clear_numbers<T>(out.prototypes, in.prototypes * in.d);
      clear_numbers<T>(out.gain, in.prototypes);
    }
    double loss = 0;
    int64_t at_once = most_tiles * tiling.in_tile;
    for (int64_t first = 0; first < count; first += at_once, at_once = tiling.in_chunk * tiling.in_tile) {
      const int64_t left = count - first;
      loss += chunk(pairs.order + first, left < at_once ? left : at_once, first == 0, left <= at_once, parallel);
    }
    return loss;
  }
};

}  // namespace

int64_t prototype_cross_entropy_workspace(const PrototypeInput& input, const PrototypeGradient& gradient,
                                          int64_t threads) {
  Arena arena{nullptr};
  with_accumulator(input.student.rows.type,
                   [&](auto t) { CrossEntropy<decltype(t)>(input, gradient, threads, arena); });
  return arena.bytes;
}

double prototype_cross_entropy(const PrototypeInput& input, const PrototypeGradient& gradient, void* memory,
                               const Parallel& parallel) {
  Arena arena{static_cast<char*>(memory)};
  return with_accumulator(input.student.rows.type, [&](auto t) {
    return CrossEntropy<decltype(t)>(input, gradient, parallel.threads, arena).run(parallel);
  });
}
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include <tuple>

#include "cpu/engine/prototype_operator.h"

namespace sslfast {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> prototype_cross_entropy_cpu(
    const Tensor& student, const Tensor& teacher, const Tensor& prototypes, const MaybeTensor& gain,
    const Tensor& teacher_prototypes, const MaybeTensor& teacher_gain, const MaybeTensor& teacher_bias,
    const MaybeTensor& row_weights, std::vector<int64_t> teacher_views, std::vector<int64_t> student_views,
    double student_temperature, double teacher_temperature, bool normalize, bool normalize_teacher, bool need_student,
    bool need_prototypes) {
  const PrototypeArguments given(student, teacher, {prototypes, gain, normalize},
                                 {teacher_prototypes, teacher_gain, normalize_teacher}, teacher_bias, row_weights,
                                 teacher_views, student_views, {student_temperature, teacher_temperature});
  const PrototypeInput& input = given.input;
  const int64_t k = need_prototypes ? input.prototypes : 0;
  Tensor loss = given.empty({}), dgain = given.empty({normalize ? k : 0}), dprototypes = given.empty({k, input.d});
  Tensor dstudent = given.empty({need_student ? input.student.count : 0, input.samples, input.d});
  advise_huge_pages(data_or_null(dprototypes), k * input.d * static_cast<int64_t>(dprototypes.element_size()));
  const PrototypeGradient gradient{data_or_null(dstudent), data_or_null(dprototypes), data_or_null(dgain)};
  const Parallel parallel = torch_parallel();
  Tensor memory =
      scratch(given.student, SSLFAST_CALL(prototype_cross_entropy_workspace, input, gradient, parallel.threads));
  set_scalar(loss, SSLFAST_CALL(prototype_cross_entropy, input, gradient, aligned(memory), parallel));
  return {loss, dstudent, dprototypes, dgain};
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, prototype_cross_entropy)
#endif  // SSLFAST_CPU_DISPATCH
