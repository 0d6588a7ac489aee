// Cross entropy of students' logits against teachers' on the GPU: a block of threads a row. Memory traffic is the
// bound: forward, teachers' rows are read for their log-sum-exp and again, from the cache, beside each student's;
// backward, a block has a stretch of columns of one sample, reads all its views once and writes the students'
// gradients.
#include "checks/distillation_cross_entropy.h"

#include <tuple>

#include "logit_rows.h"

namespace sslfast {
namespace {

constexpr int kMostViews = 64;
constexpr int64_t kStretch = 4 * kRowBlock;  // columns of a block, backward

// Views of B samples, each a matrix [B, K] without gaps; row b of a student meets row teacher_rows[b] of the teachers,
// which have R rows, or row b. In units of log 2,
//     y = log2(e)·student/τs,   z = log2(e)·(teacher/τt + bias);
// `assigned`: the teacher's numbers are the target itself. A row's numbers are relative to a base, the largest of its
// first ones: a shift common to a row costs no digit.
template <typename T>
struct Views {
  using A = Accumulator<T>;
  const T* student[kMostViews];
  const T* teacher[kMostViews];
  T* dstudent[kMostViews];
  int students, teachers;
  int64_t batch, prototypes;
  const int64_t* counted;
  A student_factor, teacher_factor;
  const A* bias;
  int64_t bias_rows, bias_view;
  const int64_t* teacher_rows;
  int64_t teacher_count;  // R
  bool ignore_diagonal, assigned;

  __device__ bool counts(int64_t b) const { return b < rows_counted(counted, batch); }
  __device__ bool pair(int t, int s) const { return !(ignore_diagonal && t == s); }
  __device__ A y(int s, int64_t b, int64_t k, A base) const {
    return A(widen(student[s][b * prototypes + k])) * student_factor - base;
  }
  // What the teacher's view says; NaN where there is no such row.
  __device__ A given(int t, int64_t r, int64_t k) const {
    return r >= 0 && r < teacher_count ? A(widen(teacher[t][r * prototypes + k])) : A(bits_to_float(0x7fc00000u));
  }
  __device__ int64_t teacher_row(int64_t b) const { return teacher_rows ? teacher_rows[b] : b; }
  __device__ A z(int t, int64_t b, int64_t k, A base) const {
    const int64_t r = teacher_row(b);
    const A x = given(t, r, k) * teacher_factor;
    if (!bias || x != x) return x - base;
    return x + (bias[t * bias_view + r % bias_rows * prototypes + k] * A(kLog2E) - base);
  }
  // The target of teacher t, from the statistics {base, log2 Σ} of its row.
  __device__ A target(int t, int64_t b, int64_t k, const A* stats) const {
    if (assigned) return given(t, teacher_row(b), k);
    const A* own = stats + 2 * (t * batch + b);
    return power_of_two(z(t, b, k, own[0]) - own[1]);
  }
  // Σ_k of the targets that student s has.
  __device__ A mass(int s, int64_t b, const A* stats) const {
    A sum = 0;
    for (int t = 0; t < teachers; ++t) {
      if (pair(t, s)) sum += assigned ? stats[2 * (t * batch + b) + 1] : A(1);
    }
    return sum;
  }
};

// Blocks (b, t): {base, log2 Σ 2^(z − base)}, or {0, Σ q}.
template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    teacher_kernel(Views<T> x, Accumulator<T>* __restrict__ stats) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x;
  const int t = blockIdx.y;
  A* own = stats + 2 * (t * x.batch + b);
  A base = 0, result = 0;
  if (x.counts(b) && x.assigned) {
    for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) result += x.target(t, b, k, nullptr);
    result = block_sum(result);
  } else if (x.counts(b)) {
    base = base_of(threadIdx.x < x.prototypes ? x.z(t, b, threadIdx.x, A(0)) : A(-3.0e38));
    OnlineSum<A> sum = nothing_summed<A>();
    for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) sum = with_number(sum, x.z(t, b, k, base));
    sum = block_merged(sum);
    result = sum.largest + binary_logarithm(sum.sum);
  }
  if (threadIdx.x == 0) own[0] = base, own[1] = result;
}

// Blocks (b, s): the same of student s, and its cross entropies summed over its teachers.
template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce)
    student_kernel(Views<T> x, const Accumulator<T>* __restrict__ teacher_stats, Accumulator<T>* __restrict__ stats,
                   Accumulator<T>* __restrict__ of_view) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x;
  const int s = blockIdx.y;
  A base = 0, log_sum = 0, dot = 0, loss = 0;
  if (x.counts(b)) {
    base = base_of(threadIdx.x < x.prototypes ? x.y(s, b, threadIdx.x, A(0)) : A(-3.0e38));
    OnlineSum<A> sum = nothing_summed<A>();
    for (int64_t k = threadIdx.x; k < x.prototypes; k += kRowBlock) {
      const A y = x.y(s, b, k, base);
      sum = with_number(sum, y);
      A p = 0;
      for (int t = 0; t < x.teachers; ++t) {
        if (x.pair(t, s)) p += x.target(t, b, k, teacher_stats);
      }
      dot += p * y;
    }
    sum = block_merged(sum);
    log_sum = sum.largest + binary_logarithm(sum.sum);
    dot = block_sum(dot);
    loss = x.mass(s, b, teacher_stats) * log_sum - dot;
  }
  if (threadIdx.x != 0) return;
  A* own = stats + 2 * (s * x.batch + b);
  own[0] = base, own[1] = log_sum;
  of_view[s * x.batch + b] = loss;
}

template <typename A>
__global__ void sum_kernel(int64_t batch, int students, const A* __restrict__ of_view, A* __restrict__ of_row) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kRowBlock + threadIdx.x;
  if (b >= batch) return;
  A sum = 0;
  for (int s = 0; s < students; ++s) sum += of_view[s * batch + b];
  of_row[b] = sum * A(kLn2);
}

// Blocks (b, stretch of columns).
template <typename T>
__global__ void __launch_bounds__(kRowBlock, kBlocksAtOnce / 2)
    gradient_kernel(Views<T> x, const Accumulator<T>* __restrict__ grad,
                    const Accumulator<T>* __restrict__ student_stats,
                    const Accumulator<T>* __restrict__ teacher_stats) {
  using A = Accumulator<T>;
  const int64_t b = blockIdx.x, begin = blockIdx.y * kStretch;
  const int64_t end = begin + kStretch < x.prototypes ? begin + kStretch : x.prototypes;
  const bool counts = x.counts(b);
  const A scale = counts ? grad[b] * x.student_factor * A(kLn2) : A(0);
  for (int64_t k = begin + threadIdx.x; k < end; k += kRowBlock) {
    A all = 0;
    for (int t = 0; counts && t < x.teachers; ++t) all += x.target(t, b, k, teacher_stats);
    for (int s = 0; s < x.students; ++s) {
      A value = 0;
      if (counts) {
        A p = all;
        if (x.ignore_diagonal && s < x.teachers) {  // without its own: summed again, since a difference loses digits
          p = 0;
          for (int t = 0; t < x.teachers; ++t) {
            if (t != s) p += x.target(t, b, k, teacher_stats);
          }
        }
        const A* own = student_stats + 2 * (s * x.batch + b);
        value = scale * (x.mass(s, b, teacher_stats) * power_of_two(x.y(s, b, k, own[0]) - own[1]) - p);
      }
      narrow(value, &x.dstudent[s][b * x.prototypes + k]);
    }
  }
}

// Checked arguments, and memory that they point into.
struct Arguments {
  std::vector<Tensor> students, teachers;
  std::optional<Tensor> bias, teacher_rows;
  const std::optional<Tensor>& rows;
  Distilled how;

  Arguments(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher,
            const std::optional<Tensor>& bias_any, const Distilled& given, const std::optional<Tensor>& rows_any,
            const std::optional<Tensor>& teacher_rows_any)
      : rows(rows_any), how(given) {
    check_distillation(student, teacher, bias_any, given, rows_any, teacher_rows_any);
    for (const Tensor& x : student) students.push_back(as_contiguous(x));
    for (const Tensor& x : teacher) teachers.push_back(as_contiguous(x));
    if (bias_any) bias = as_contiguous(*bias_any);
    if (teacher_rows_any) teacher_rows = as_contiguous(*teacher_rows_any);
    const Tensor& like = students[0];
    SSLFAST_CHECK(count(students) <= kMostViews && count(teachers) <= kMostViews, "at most ", kMostViews,
                  " views of the student and of the teacher on a GPU");
    SSLFAST_CHECK(like.size(1) < (int64_t{1} << 31), "logits must have fewer than 2^31 rows");
    SSLFAST_CHECK(like.size(2) <= 65535 * kStretch, "logits must have at most ", 65535 * kStretch, " prototypes");
  }

  static int count(const std::vector<Tensor>& views) {
    int64_t sum = 0;
    for (const Tensor& x : views) sum += x.size(0);
    return static_cast<int>(sum);
  }

  template <typename T>
  Views<T> views() const {
    using A = Accumulator<T>;
    const Tensor& like = students[0];
    Views<T> x{};
    x.batch = like.size(1), x.prototypes = like.size(2);
    x.teacher_count = teachers[0].size(1);
    const int64_t view = x.batch * x.prototypes, teacher_view = x.teacher_count * x.prototypes;
    for (const Tensor& part : students) {
      for (int64_t v = 0; v < part.size(0); ++v) x.student[x.students++] = const_data<T>(part) + v * view;
    }
    for (const Tensor& part : teachers) {
      for (int64_t v = 0; v < part.size(0); ++v) x.teacher[x.teachers++] = const_data<T>(part) + v * teacher_view;
    }
    x.counted = rows ? const_data<int64_t>(*rows) : nullptr;
    x.teacher_rows = teacher_rows ? const_data<int64_t>(*teacher_rows) : nullptr;
    x.student_factor = A(kLog2E / how.student_temperature), x.teacher_factor = A(kLog2E / how.teacher_temperature);
    x.bias_rows = 1;
    if (bias) {
      x.bias = const_data<A>(*bias);
      x.bias_rows = bias->size(1);
      x.bias_view = bias->size(0) > 1 ? bias->size(1) * x.prototypes : 0;
    }
    x.ignore_diagonal = how.ignore_diagonal, x.assigned = how.assigned;
    return x;
  }
};

std::tuple<Tensor, Tensor, Tensor> distillation_cross_entropy_cuda(std::vector<Tensor> student,
                                                                   std::vector<Tensor> teacher,
                                                                   const std::optional<Tensor>& bias,
                                                                   double student_temperature,
                                                                   double teacher_temperature, bool ignore_diagonal,
                                                                   bool assigned, const std::optional<Tensor>& rows,
                                                                   const std::optional<Tensor>& teacher_rows) {
  const Arguments arguments(student, teacher, bias,
                            {student_temperature, teacher_temperature, ignore_diagonal, assigned}, rows, teacher_rows);
  const Tensor& like = arguments.students[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int students = Arguments::count(student), teachers = Arguments::count(teacher);
  const int64_t batch = like.size(1);
  const ScalarType type = accumulator_type(like);
  Tensor of_row = allocate(like, {batch}, type), of_view = allocate(like, {students, batch}, type);
  Tensor student_stats = allocate(like, {students, batch, 2}, type);
  Tensor teacher_stats = allocate(like, {teachers, batch, 2}, type);
  if (batch == 0) return {of_row, student_stats, teacher_stats};
  const cudaStream_t stream = current_stream(like);
  dispatch_float(like, "student", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    const Views<T> x = arguments.views<T>();
    const auto rows_of = static_cast<unsigned>(batch);
    teacher_kernel<T>
        <<<dim3(rows_of, static_cast<unsigned>(teachers)), kRowBlock, 0, stream>>>(x, mutable_data<A>(teacher_stats));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    student_kernel<T><<<dim3(rows_of, static_cast<unsigned>(students)), kRowBlock, 0, stream>>>(
        x, const_data<A>(teacher_stats), mutable_data<A>(student_stats), mutable_data<A>(of_view));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    sum_kernel<A><<<static_cast<unsigned>((batch + kRowBlock - 1) / kRowBlock), kRowBlock, 0, stream>>>(
        batch, students, const_data<A>(of_view), mutable_data<A>(of_row));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {of_row, student_stats, teacher_stats};
}

std::vector<Tensor> distillation_cross_entropy_backward_cuda(
    const Tensor& grad_any, std::vector<Tensor> student, std::vector<Tensor> teacher, const std::optional<Tensor>& bias,
    const Tensor& student_stats_any, const Tensor& teacher_stats_any, double student_temperature,
    double teacher_temperature, bool ignore_diagonal, bool assigned, const std::optional<Tensor>& rows,
    const std::optional<Tensor>& teacher_rows) {
  const Arguments arguments(student, teacher, bias,
                            {student_temperature, teacher_temperature, ignore_diagonal, assigned}, rows, teacher_rows);
  const Tensor& like = arguments.students[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int students = Arguments::count(student), teachers = Arguments::count(teacher);
  const int64_t batch = like.size(1), prototypes = like.size(2);
  const ScalarType type = accumulator_type(like);
  check_tensor(grad_any, "grad", {batch}, type, like);
  check_tensor(student_stats_any, "student_stats", {students, batch, 2}, type, like);
  check_tensor(teacher_stats_any, "teacher_stats", {teachers, batch, 2}, type, like);
  const Tensor grad = as_contiguous(grad_any);
  const Tensor student_stats = as_contiguous(student_stats_any), teacher_stats = as_contiguous(teacher_stats_any);
  std::vector<Tensor> out;
  for (const Tensor& part : arguments.students) out.push_back(allocate(part, {part.size(0), batch, prototypes}));
  if (batch == 0) return out;
  const cudaStream_t stream = current_stream(like);
  dispatch_float(like, "student", [&](auto element) {
    using T = decltype(element);
    using A = Accumulator<T>;
    Views<T> x = arguments.views<T>();
    int s = 0;
    for (Tensor& part : out) {
      for (int64_t v = 0; v < part.size(0); ++v) x.dstudent[s++] = mutable_data<T>(part) + v * batch * prototypes;
    }
    const auto stretches = static_cast<unsigned>((prototypes + kStretch - 1) / kStretch);
    gradient_kernel<T><<<dim3(static_cast<unsigned>(batch), stretches), kRowBlock, 0, stream>>>(
        x, const_data<A>(grad), const_data<A>(student_stats), const_data<A>(teacher_stats));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CUDA, distillation_cross_entropy, distillation_cross_entropy_backward)
