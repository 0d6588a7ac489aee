// Exponential moving averages of many tensors on the CPU, in one pass: an average and a student's number are read, the
// average is written, and its rounded copy where there is one. Tasks are equal shares of all elements, whatever tensors
// they lie in, so that hundreds of small ones cost as little as one large.
#include "common/ema_update.h"

#include "cpu/engine/levels.h"

namespace sslfast {

enum class Element { none, f32, f64, b16, f16 };

// Of all tensors: `size[i]` elements of tensor i.
struct EmaUpdate {
  int64_t tensors;
  void* const* average;
  const void* const* student;
  void* const* rounded;
  const int64_t* size;
  Element average_type, student_type, rounded_type;  // `none` of the last: there is no copy
  double momentum;
  int64_t tasks, task_elements;
  const int64_t* task_tensor;  // where a task begins: in this tensor, at this element
  const int64_t* task_offset;
};

}  // namespace sslfast

SSLFAST_DECLARE(void ema_update(const ::sslfast::Parallel&, const ::sslfast::EmaUpdate&))

namespace sslfast::SSLFAST_CPU_LEVEL {
namespace {

struct None {};
template <typename R>
constexpr bool kIsCopy = true;
template <>
constexpr bool kIsCopy<None> = false;

// Numbers that are read before the first of them is written: several vectors on their way from memory at once.
constexpr int64_t kBlock = 64;

template <typename T, typename S, typename R>
inline void blend_some(int64_t n, T* __restrict__ average, const S* __restrict__ student, R* __restrict__ rounded,
                       Momentum<Accumulator<T>> m) {
  using A = Accumulator<T>;
  A value[kBlock];
  for (int64_t i = 0; i < n; ++i) value[i] = moved(A(widen(average[i])), A(widen(student[i])), m);
  for (int64_t i = 0; i < n; ++i) narrow(value[i], &average[i]);
  if constexpr (kIsCopy<R>) {
    for (int64_t i = 0; i < n; ++i) narrow(value[i], &rounded[i]);
  }
}

template <typename T, typename S, typename R>
void blend(int64_t n, T* average, const S* student, R* rounded, Momentum<Accumulator<T>> m) {
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    blend_some(kBlock, average + i, student + i, kIsCopy<R> ? rounded + i : rounded, m);
  }
  if (i < n) blend_some(n - i, average + i, student + i, kIsCopy<R> ? rounded + i : rounded, m);
}

template <typename T, typename S, typename R>
void update(const Parallel& parallel, const EmaUpdate& u) {
  const auto m = momentum_of<Accumulator<T>>(u.momentum);
  auto task = [&](int64_t k) {
    int64_t tensor = u.task_tensor[k], offset = u.task_offset[k], left = u.task_elements;
    while (left > 0 && tensor < u.tensors) {
      const int64_t here = u.size[tensor] - offset;
      const int64_t n = here < left ? here : left;
      R* rounded = nullptr;
      if constexpr (kIsCopy<R>) rounded = static_cast<R*>(u.rounded[tensor]) + offset;
      blend(n, static_cast<T*>(u.average[tensor]) + offset, static_cast<const S*>(u.student[tensor]) + offset, rounded,
            m);
      left -= n;
      offset = 0;
      ++tensor;
    }
  };
  parallel_each(parallel, u.tasks, task);
}

template <typename T, typename S>
void with_copy(const Parallel& parallel, const EmaUpdate& u) {
  if constexpr (sizeof(T) == sizeof(float) && sizeof(S) <= sizeof(float)) {
    switch (u.rounded_type) {
      case Element::f32: return update<T, S, float>(parallel, u);
      case Element::b16: return update<T, S, bf16>(parallel, u);
      case Element::f16: return update<T, S, fp16>(parallel, u);
      default: break;
    }
  }
  update<T, S, None>(parallel, u);
}

template <typename T>
void of_student(const Parallel& parallel, const EmaUpdate& u) {
  switch (u.student_type) {
    case Element::f64: return with_copy<T, double>(parallel, u);
    case Element::b16: return with_copy<T, bf16>(parallel, u);
    case Element::f16: return with_copy<T, fp16>(parallel, u);
    default: return with_copy<T, float>(parallel, u);
  }
}

}  // namespace

void ema_update(const Parallel& parallel, const EmaUpdate& u) {
  switch (u.average_type) {
    case Element::f64: return of_student<double>(parallel, u);
    case Element::b16: return of_student<bf16>(parallel, u);
    case Element::f16: return of_student<fp16>(parallel, u);
    default: return of_student<float>(parallel, u);
  }
}

}  // namespace sslfast::SSLFAST_CPU_LEVEL

#ifdef SSLFAST_CPU_DISPATCH
#include <type_traits>
#include <utility>

#include "checks/ema_update.h"

namespace sslfast {
namespace {

constexpr int64_t kTaskElements = 65536;

Element element_of(const Tensor& x, const char* name) {
  return dispatch_float(x, name, [](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, double>) return Element::f64;
    if constexpr (std::is_same_v<T, bf16>) return Element::b16;
    if constexpr (std::is_same_v<T, fp16>) return Element::f16;
    return Element::f32;
  });
}

// Where each task begins, in the order of the tensors.
struct Tasks {
  std::vector<int64_t> tensor, offset;

  explicit Tasks(const std::vector<int64_t>& sizes) {
    int64_t skip = 0;  // elements of the last task that lie in the tensors to come
    for (size_t i = 0; i < sizes.size(); ++i) {
      for (; skip < sizes[i]; skip += kTaskElements) {
        tensor.push_back(static_cast<int64_t>(i));
        offset.push_back(skip);
      }
      skip -= sizes[i];
    }
  }
};

void ema_update_cpu(std::vector<Tensor> averages, std::vector<Tensor> students, std::vector<Tensor> rounded,
                    double momentum, std::optional<Tensor> moving) {
  EmaArguments given{std::move(averages), std::move(students), std::move(rounded), momentum, std::move(moving)};
  given.check();
  std::vector<void*> average, copy;
  std::vector<const void*> student;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < given.averages.size(); ++i) {
    average.push_back(given.averages[i].mutable_data_ptr());
    student.push_back(given.students[i].const_data_ptr());
    if (!given.rounded.empty()) copy.push_back(given.rounded[i].mutable_data_ptr());
    sizes.push_back(given.averages[i].numel());
  }
  const Tasks tasks(sizes);
  EmaUpdate u{};
  u.tensors = static_cast<int64_t>(sizes.size());
  u.average = average.data();
  u.student = student.data();
  u.rounded = copy.data();
  u.size = sizes.data();
  u.average_type = element_of(given.averages[0], "averages");
  u.student_type = element_of(given.students[0], "students");
  u.rounded_type = copy.empty() ? Element::none : element_of(given.rounded[0], "rounded");
  u.momentum = given.moving ? *const_data<double>(*given.moving) : momentum;
  u.tasks = static_cast<int64_t>(tasks.tensor.size());
  u.task_elements = kTaskElements;
  u.task_tensor = tasks.tensor.data();
  u.task_offset = tasks.offset.data();
  SSLFAST_CALL(ema_update, torch_parallel(), u);
}

}  // namespace
}  // namespace sslfast

STABLE_TORCH_LIBRARY_IMPL(sslfast, CPU, m) { m.impl("ema_update_", TORCH_BOX(&sslfast::ema_update_cpu)); }
#endif  // SSLFAST_CPU_DISPATCH
