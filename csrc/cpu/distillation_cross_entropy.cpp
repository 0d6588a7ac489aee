// Cross entropy of students' logits against teachers' on the CPU: all views of a sample are read chunk by chunk, once
// each way. Forward, for every view an online maximum and Σ 2^(y − max), and for every pair Σ 2^(z − max)·y:
//     CE_ts = ln 2·(log2 Σ 2^(y_s) − Σ p_t·y_s)
// Numbers of a row are relative to a base, the largest of its first chunk: a shift common to a row costs no digit.
// Backward, with n_s the teachers of student s:   dstudent_s = g_b/τs·(n_s softmax(y_s) − Σ_t p_t).
#include "cpu/distillation_cross_entropy.h"

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

// The running values of one view's row.
template <typename A>
struct Running {
  A base, top, sum;
};

template <typename T>
const T* row_of(const void* view, const DistillationRows& x, int64_t b) {
  return static_cast<const T*>(view) + b * x.prototypes;
}

// scaled_chunk of teacher t, of the row that row b of a student meets, with its bias.
template <typename T, typename A>
int64_t teacher_chunk(const DistillationRows& x, int t, int64_t b, int64_t begin, int64_t count, A base, A* buffer,
                      A* __restrict__ out) {
  const int64_t r = x.teacher_row(b);
  const T* row = row_of<T>(x.teacher[t], x, r) + begin;
  if (!x.bias) return scaled_chunk(row, count, A(x.teacher_factor), base, buffer, out);
  const A* bias = static_cast<const A*>(x.bias) + t * x.bias_view + r % x.bias_rows * x.prototypes + begin;
  const A* in = chunk_of(row, count, buffer);
  int64_t k = 0;
  for (; k + kLanes<A> <= count; k += kLanes<A>) {
    store(out + k, load(in + k) * A(x.teacher_factor) + (load(bias + k) * A(kLog2E) - base));
  }
  if (k == count) return k;
  for (int64_t i = k; i < count; ++i) out[i] = in[i] * A(x.teacher_factor) + (bias[i] * A(kLog2E) - base);
  for (k = count; k % kLanes<A> != 0; ++k) out[k] = A(-__builtin_inf());
  return k;
}

// The target as it is given, 0 beyond its end.
template <typename T, typename A>
int64_t assigned_chunk(const T* row, int64_t count, A* __restrict__ out) {
  for (int64_t k = 0; k < count; ++k) out[k] = A(widen(row[k]));
  int64_t k = count;
  for (; k % kLanes<A> != 0; ++k) out[k] = 0;
  return k;
}

// Takes a chunk into the maximum and the sum, and leaves its exponentials; what the sum so far was multiplied by.
template <typename A>
A take(Running<A>& running, A* chunk, int64_t n) {
  const A top = largest_of(chunk, n);
  A factor = 1;
  if (top > running.top) {
    factor = exp2_of(running.top - top);
    running.sum *= factor;
    running.top = top;
  }
  running.sum += exponentials_of(chunk, n, running.top);
  return factor;
}

// The sum alone; `chunk` stays.
template <typename A>
void take_kept(Running<A>& running, const A* chunk, int64_t n) {
  const A top = largest_of(chunk, n);
  if (top > running.top) {
    running.sum *= exp2_of(running.top - top);
    running.top = top;
  }
  vec<A> sum[2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes<A> <= n; k += 2 * kLanes<A>) {
    for (int u = 0; u < 2; ++u) sum[u] += exp2v<true>(load(chunk + k + u * kLanes<A>) - running.top);
  }
  if (k < n) sum[0] += exp2v<true>(load(chunk + k) - running.top);
  running.sum += sum_lanes<A>(sum[0] + sum[1]);
}

// Scratch memory of one worker, by its parts.
template <typename A>
struct Parts {
  A *targets, *logits, *raw, *dots;
  Running<A>*student, *teacher;

  Parts(const DistillationRows& x, A* scratch) : targets(scratch), logits(targets + x.teachers * kLogitChunk) {
    raw = logits + kLogitChunk;
    student = reinterpret_cast<Running<A>*>(raw + 2 * kLogitChunk);
    teacher = student + x.students;
    dots = reinterpret_cast<A*>(teacher + x.teachers);
  }
};

// One chunk of all views of sample b.
template <typename T, typename A>
void forward_chunk(const DistillationRows& x, int64_t b, int64_t begin, const Parts<A>& parts) {
  const int64_t count = x.prototypes - begin < kLogitChunk ? x.prototypes - begin : kLogitChunk;
  for (int t = 0; t < x.teachers; ++t) {
    A* target = parts.targets + t * kLogitChunk;
    Running<A>& running = parts.teacher[t];
    if (x.assigned) {
      const int64_t n = assigned_chunk(row_of<T>(x.teacher[t], x, x.teacher_row(b)) + begin, count, target);
      running.sum += sum_of(target, n);
      continue;
    }
    const int64_t n = teacher_chunk<T>(x, t, b, begin, count, running.base, parts.raw, target);
    if (begin == 0) {  // again, in the steps of all other chunks and of the backward
      running.base = base_of(target, n);
      teacher_chunk<T>(x, t, b, begin, count, running.base, parts.raw, target);
    }
    const A factor = take(running, target, n);
    for (int s = 0; s < x.students; ++s) parts.dots[t * x.students + s] *= factor;
  }
  for (int s = 0; s < x.students; ++s) {
    A* y = parts.logits;
    Running<A>& running = parts.student[s];
    const T* row = row_of<T>(x.student[s], x, b) + begin;
    const int64_t n = scaled_chunk(row, count, A(x.student_factor), running.base, parts.raw, y);
    if (begin == 0) {
      running.base = base_of(y, n);
      scaled_chunk(row, count, A(x.student_factor), running.base, parts.raw, y);
    }
    take_kept(running, y, n);
    for (int64_t k = count; k < n; ++k) y[k] = 0;  // no 0·∞ beyond the end
    for (int t = 0; t < x.teachers; ++t) {
      if (x.pair(t, s)) parts.dots[t * x.students + s] += dot_of(parts.targets + t * kLogitChunk, y, n);
    }
  }
}

template <typename T>
void forward(const Parallel& parallel, const DistillationRows& x, Accumulator<T>* scratch, Accumulator<T>* of_row,
             Accumulator<T>* student_stats, Accumulator<T>* teacher_stats) {
  using A = Accumulator<T>;
  int64_t next;
  each_task(parallel, x.rows, &next, [&](int64_t worker, int64_t b) {
    const Parts<A> parts(x, scratch + worker * distillation_scratch(x));
    for (int s = 0; s < x.students; ++s) parts.student[s] = {0, kLeast<A>, 0};
    for (int t = 0; t < x.teachers; ++t) parts.teacher[t] = {0, kLeast<A>, 0};
    for (int i = 0; i < x.students * x.teachers; ++i) parts.dots[i] = 0;
    for (int64_t k = 0; k < x.prototypes; k += kLogitChunk) forward_chunk<T>(x, b, k, parts);

    A sum = 0;
    for (int s = 0; s < x.students; ++s) {
      const Running<A>& running = parts.student[s];
      const A log_sum = running.top + A(__builtin_log2(running.sum));
      A* stats = student_stats + 2 * (s * x.batch + b);
      stats[0] = running.base, stats[1] = log_sum;
      for (int t = 0; t < x.teachers; ++t) {
        if (!x.pair(t, s)) continue;
        const A mass = parts.teacher[t].sum, dot = parts.dots[t * x.students + s];
        sum += x.assigned ? mass * log_sum - dot : log_sum - dot / mass;
      }
    }
    for (int t = 0; t < x.teachers; ++t) {
      const Running<A>& running = parts.teacher[t];
      A* stats = teacher_stats + 2 * (t * x.batch + b);
      stats[0] = running.base;
      stats[1] = x.assigned ? running.sum : running.top + A(__builtin_log2(running.sum));
    }
    of_row[b] = sum * A(kLn2);
  });
}

// p[k] ← the target of teacher t; returns the number of whole vectors' numbers.
template <typename T, typename A>
int64_t target_chunk(const DistillationRows& x, int t, int64_t b, int64_t begin, int64_t count, const A* stats, A* raw,
                     A* p) {
  if (x.assigned) return assigned_chunk(row_of<T>(x.teacher[t], x, x.teacher_row(b)) + begin, count, p);
  const A* of_view = stats + 2 * (t * x.batch + b);
  const int64_t n = teacher_chunk<T>(x, t, b, begin, count, of_view[0], raw, p);
  exponentials_of(p, n, of_view[1]);
  return n;
}

template <typename T>
void backward(const Parallel& parallel, const DistillationRows& x, Accumulator<T>* scratch,
              const Accumulator<T>* grad_of_row, const Accumulator<T>* student_stats,
              const Accumulator<T>* teacher_stats, T* const* dstudent) {
  using A = Accumulator<T>;
  int64_t next;
  each_task(parallel, x.rows, &next, [&](int64_t worker, int64_t b) {
    A* own = scratch + worker * distillation_scratch(x);
    A *y = own + x.teachers * kLogitChunk, *raw = y + kLogitChunk, *all = raw + kLogitChunk;
    const A scale = grad_of_row[b] * A(x.student_factor * kLn2);
    for (int64_t begin = 0; begin < x.prototypes; begin += kLogitChunk) {
      const int64_t count = x.prototypes - begin < kLogitChunk ? x.prototypes - begin : kLogitChunk;
      int64_t n = 0;
      for (int t = 0; t < x.teachers; ++t) {
        n = target_chunk<T>(x, t, b, begin, count, teacher_stats, raw, own + t * kLogitChunk);
      }
      for (int s = 0; s < x.students; ++s) {
        A mass = 0;
        if (s <= x.teachers) {  // from the first student that is no teacher's view on, all have the same target
          for (int64_t k = 0; k < n; ++k) all[k] = 0;
          for (int t = 0; t < x.teachers; ++t) {
            if (!x.pair(t, s)) continue;
            const A* p = own + t * kLogitChunk;
            for (int64_t k = 0; k < n; k += kLanes<A>) store(all + k, load(all + k) + load(p + k));
          }
        }
        for (int t = 0; t < x.teachers; ++t) {
          if (x.pair(t, s)) mass += x.assigned ? teacher_stats[2 * (t * x.batch + b) + 1] : A(1);
        }
        const A* stats = student_stats + 2 * (s * x.batch + b);
        const T* row = row_of<T>(x.student[s], x, b) + begin;
        scaled_chunk(row, count, A(x.student_factor), stats[0], raw, y);
        T* __restrict__ out = dstudent[s] + b * x.prototypes + begin;
        for (int64_t k = 0; k < n; k += kLanes<A>) {
          store(y + k, scale * (mass * exp2v<true>(load(y + k) - stats[1]) - load(all + k)));
        }
        for (int64_t k = 0; k < count; ++k) narrow(y[k], &out[k]);
      }
    }
  });
}

}  // namespace

#define SSLFAST_DISTILLATION_DEFINE(T)                                                                            \
  void distillation_forward(const Parallel& parallel, const DistillationRows& x, Accumulator<T>* scratch,         \
                            Accumulator<T>* of_row, Accumulator<T>* student_stats, Accumulator<T>* teacher_stats, \
                            const T*) {                                                                           \
    forward<T>(parallel, x, scratch, of_row, student_stats, teacher_stats);                                       \
  }                                                                                                               \
  void distillation_backward(const Parallel& parallel, const DistillationRows& x, Accumulator<T>* scratch,        \
                             const Accumulator<T>* grad_of_row, const Accumulator<T>* student_stats,              \
                             const Accumulator<T>* teacher_stats, T* const* dstudent) {                           \
    backward<T>(parallel, x, scratch, grad_of_row, student_stats, teacher_stats, dstudent);                       \
  }
SSLFAST_EACH(SSLFAST_DISTILLATION_DEFINE, float, double, bf16, fp16)

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <algorithm>
#include <cstring>
#include <tuple>

#include "checks/distillation_cross_entropy.h"
#include "cpu/engine/huge_pages.h"

namespace sslfast {
namespace {

// Checked arguments, and what they point into.
struct Arguments {
  std::vector<Tensor> tensors;
  std::vector<const void*> student, teacher;
  DistillationRows x;
  Tensor like, scratch;

  Arguments(const std::vector<Tensor>& students, const std::vector<Tensor>& teachers, const std::optional<Tensor>& bias,
            const Distilled& how, const std::optional<Tensor>& rows, const std::optional<Tensor>& teacher_rows)
      : like((check_distillation(students, teachers, bias, how, rows, teacher_rows), students[0])), scratch(like) {
    for (const Tensor& view : students) add(view, student);
    for (const Tensor& view : teachers) add(view, teacher);
    x = {like.size(1),
         like.size(1),
         like.size(2),
         static_cast<int>(student.size()),
         static_cast<int>(teacher.size()),
         student.data(),
         teacher.data(),
         kLog2E / how.student_temperature,
         kLog2E / how.teacher_temperature,
         nullptr,
         1,
         0,
         how.ignore_diagonal,
         how.assigned,
         nullptr};
    if (rows) x.rows = std::clamp<int64_t>(*const_data<int64_t>(*rows), 0, x.batch);
    if (teacher_rows) {
      tensors.push_back(as_contiguous(*teacher_rows));
      x.teacher_rows = const_data<int64_t>(tensors.back());
      const int64_t length = teachers[0].size(1);
      for (int64_t b = 0; b < x.rows; ++b) {
        SSLFAST_CHECK(x.teacher_rows[b] >= 0 && x.teacher_rows[b] < length, "teacher_rows must be from 0 to ",
                      length - 1, ", got ", x.teacher_rows[b]);
      }
    }
    if (bias) {
      tensors.push_back(as_contiguous(*bias));
      x.bias = tensors.back().const_data_ptr();
      x.bias_rows = bias->size(1);
      x.bias_view = bias->size(0) > 1 ? bias->size(1) * x.prototypes : 0;
    }
    const int64_t workers = std::max<int64_t>(1, std::min(torch_parallel().threads, x.rows));
    scratch = allocate(like, {workers, distillation_scratch(x)}, accumulator_type(like));
  }

  void add(const Tensor& views, std::vector<const void*>& to) {
    tensors.push_back(as_contiguous(views));
    const auto* data = static_cast<const char*>(tensors.back().const_data_ptr());
    const int64_t bytes = views.size(1) * views.size(2) * static_cast<int64_t>(views.element_size());
    for (int64_t v = 0; v < views.size(0); ++v) to.push_back(data + v * bytes);
  }
};

std::tuple<Tensor, Tensor, Tensor> distillation_cross_entropy_cpu(std::vector<Tensor> student,
                                                                  std::vector<Tensor> teacher,
                                                                  const std::optional<Tensor>& bias,
                                                                  double student_temperature,
                                                                  double teacher_temperature, bool ignore_diagonal,
                                                                  bool assigned, const std::optional<Tensor>& rows,
                                                                  const std::optional<Tensor>& teacher_rows) {
  Arguments arguments(student, teacher, bias, {student_temperature, teacher_temperature, ignore_diagonal, assigned},
                      rows, teacher_rows);
  const DistillationRows& x = arguments.x;
  const ScalarType type = accumulator_type(arguments.like);
  Tensor of_row = allocate(arguments.like, {x.batch}, type);
  Tensor student_stats = allocate(arguments.like, {x.students, x.batch, 2}, type);
  Tensor teacher_stats = allocate(arguments.like, {x.teachers, x.batch, 2}, type);
  dispatch_float(arguments.like, "student", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    A* sums = mutable_data<A>(of_row);
    std::memset(sums + x.rows, 0, sizeof(A) * (x.batch - x.rows));
    if (x.rows < x.batch) {
      std::memset(mutable_data<A>(student_stats), 0, sizeof(A) * student_stats.numel());
      std::memset(mutable_data<A>(teacher_stats), 0, sizeof(A) * teacher_stats.numel());
    }
    SSLFAST_CALL(distillation_forward, torch_parallel(), x, mutable_data<A>(arguments.scratch), sums,
                 mutable_data<A>(student_stats), mutable_data<A>(teacher_stats), static_cast<const T*>(nullptr));
  });
  return {of_row, student_stats, teacher_stats};
}

std::vector<Tensor> distillation_cross_entropy_backward_cpu(
    const Tensor& grad_any, std::vector<Tensor> student, std::vector<Tensor> teacher, const std::optional<Tensor>& bias,
    const Tensor& student_stats_any, const Tensor& teacher_stats_any, double student_temperature,
    double teacher_temperature, bool ignore_diagonal, bool assigned, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& teacher_rows) {
  Arguments arguments(student, teacher, bias, {student_temperature, teacher_temperature, ignore_diagonal, assigned},
                      rows, teacher_rows);
  const DistillationRows& x = arguments.x;
  const ScalarType type = accumulator_type(arguments.like);
  check_tensor(grad_any, "grad", {x.batch}, type, arguments.like);
  check_tensor(student_stats_any, "student_stats", {x.students, x.batch, 2}, type, arguments.like);
  check_tensor(teacher_stats_any, "teacher_stats", {x.teachers, x.batch, 2}, type, arguments.like);
  const Tensor grad = as_contiguous(grad_any);
  const Tensor student_stats = as_contiguous(student_stats_any), teacher_stats = as_contiguous(teacher_stats_any);
  std::vector<Tensor> out;
  dispatch_float(arguments.like, "student", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    std::vector<T*> to;
    for (const Tensor& views : student) {
      out.push_back(allocate(views, {views.size(0), x.batch, x.prototypes}));
      T* data = mutable_data<T>(out.back());
      const int64_t view = x.batch * x.prototypes, counted = x.rows * x.prototypes;
      advise_huge_pages(data, views.size(0) * view * static_cast<int64_t>(sizeof(T)));
      for (int64_t v = 0; v < views.size(0); ++v) {
        to.push_back(data + v * view);
        std::memset(to.back() + counted, 0, sizeof(T) * (view - counted));
      }
    }
    SSLFAST_CALL(distillation_backward, torch_parallel(), x, mutable_data<A>(arguments.scratch), const_data<A>(grad),
                 const_data<A>(student_stats), const_data<A>(teacher_stats), to.data());
  });
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, distillation_cross_entropy, distillation_cross_entropy_backward)
#endif  // SSLFAST_CPU_DISPATCH
