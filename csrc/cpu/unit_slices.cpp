// Random directions on the CPU: columns of independent Gaussian numbers, divided by their length. Philox keyed by seed
// and step; of a column's block of four words each pair gives two numbers (Box and Muller, 1958):
//
//   u = (⌊w₀/2⁹⌋ + ½)·2⁻²³,   φ = ⌊w₁/2⁸⌋·2⁻²⁴ turns,   √(−2 ln u)·(cos φ, sin φ)
//
// u and φ are exact in float32, so they are the same numbers on every device.
#include "common/streams.h"

#include "common/philox.h"
#include "cpu/engine/angles.h"
#include "cpu/engine/levels.h"

namespace sslfast {

struct SliceDraw {
  int64_t features, count;
  uint64_t seed;
  uint32_t step;
};

}  // namespace sslfast

SSLFAST_DECLARE(void unit_slices(const SliceDraw& draw, float* slices, const Parallel& parallel))

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

constexpr int kL = kLanes<float>;

// ln(1 + f) = f − f²/2 + f³·P(f) for 1/√2 ≤ 1 + f ≤ √2, to 1e-9 of it.
constexpr float kLog[] = {0.3333331048488617f,   -0.24999986588954926f, 0.20002226531505585f,
                          -0.16669248044490814f, 0.14218653738498688f,  -0.12384390085935593f,
                          0.11873048543930054f,  -0.1178959310054779f,  0.06914953887462616f};

// Of normal numbers.
inline vec<float> log_of(vec<float> u) {
  using I = Vec<float>::mask;
  const I bits = reinterpret_cast<I>(u), shifted = bits - 0x3f3504f3;  // 1/√2
  const vec<float> exponent = __builtin_convertvector(shifted >> 23, vec<float>);
  const vec<float> f = reinterpret_cast<vec<float>>(bits - (shifted & ~0x7fffff)) - 1.0f, g = f * f;
  return exponent * 0.693147180559945f + (f - (0.5f * g - g * f * polynomial<float>(kLog, f)));
}

// Four numbers for each of kL columns from `column` on.
inline void draw_block(const SliceDraw& draw, int64_t column, uint32_t block, vec<float> (&normal)[4]) {
  uint32_t words[4][kL];
  for (int l = 0; l < kL; ++l) {
    const uint64_t sample = static_cast<uint64_t>(column + l);
    const Philox4 drawn = sslfast::draw({draw.seed, sample, draw.step, kSlicesStream}, block);
    for (int w = 0; w < 4; ++w) words[w][l] = drawn.word[w];
  }
  for (int pair = 0; pair < 2; ++pair) {
    const auto integers = [&](const uint32_t* word, int shift) {
      return __builtin_convertvector(reinterpret_cast<vec<int32_t>>(load(word) >> shift), vec<float>);
    };
    vec<float> radius = log_of((integers(words[2 * pair], 9) + 0.5f) * 0x1p-23f) * -2.0f;
    for (int l = 0; l < kL; ++l) radius[l] = __builtin_sqrtf(radius[l]);
    const Angle<float> angle = angle_of<float>(integers(words[2 * pair + 1], 8) * 0x1p-22f);
    normal[2 * pair] = radius * angle.cos;
    normal[2 * pair + 1] = radius * angle.sin;
  }
}

// `lanes` ≤ kL columns from `column` on, normalised.
void draw_columns(const SliceDraw& draw, int64_t column, int64_t lanes, float* slices) {
  vec<float> squares = {}, part = {};  // in two steps: a sum of many would lose digits
  for (int64_t first = 0; first < draw.features; first += 4) {
    vec<float> normal[4], sum = {};
    draw_block(draw, column, static_cast<uint32_t>(first / 4), normal);
    for (int64_t k = 0; k < 4 && first + k < draw.features; ++k) {
      sum += normal[k] * normal[k];
      float* row = slices + (first + k) * draw.count + column;
      for (int64_t l = 0; l < lanes; ++l) row[l] = normal[k][l];
    }
    part += sum;
    if (first % 256 == 252 || first + 4 >= draw.features) {
      squares += part;
      part = vec<float>{};
    }
  }
  float length[kL];
  store(length, squares);
  for (int l = 0; l < kL; ++l) length[l] = __builtin_sqrtf(length[l]);
  for (int64_t k = 0; k < draw.features; ++k) {
    float* row = slices + k * draw.count + column;
    for (int64_t l = 0; l < lanes; ++l) row[l] /= length[l];
  }
}

}  // namespace

void unit_slices(const SliceDraw& draw, float* slices, const Parallel& parallel) {
  constexpr int64_t kColumnsOfTask = 64;  // whole cache lines of every row, at any level
  auto body = [&](int64_t task) {
    const int64_t end = (task + 1) * kColumnsOfTask < draw.count ? (task + 1) * kColumnsOfTask : draw.count;
    for (int64_t column = task * kColumnsOfTask; column < end; column += kL)
      draw_columns(draw, column, end - column < kL ? end - column : kL, slices);
  };
  parallel_each(parallel, (draw.count + kColumnsOfTask - 1) / kColumnsOfTask, body);
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast

#ifdef SSLFAST_CPU_DISPATCH
#include "torch_api.h"

namespace sslfast {
namespace {

Tensor unit_slices_cpu(const Tensor& step, int64_t seed, int64_t features, int64_t count) {
  check_tensor(step, "step", {}, ScalarType::Long, step);
  SSLFAST_CHECK(features > 0 && features <= int64_t{1} << 18 && count > 0, "features must be 1 to 2^18 and count ",
                "positive, got ", features, " and ", count);
  Tensor slices = allocate(step, {features, count}, ScalarType::Float);
  const SliceDraw draw{features, count, static_cast<uint64_t>(seed), static_cast<uint32_t>(*const_data<int64_t>(step))};
  SSLFAST_CALL(unit_slices, draw, mutable_data<float>(slices), torch_parallel());
  return slices;
}

}  // namespace
}  // namespace sslfast

SSLFAST_REGISTER(CPU, unit_slices)
#endif  // SSLFAST_CPU_DISPATCH
