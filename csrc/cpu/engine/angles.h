// Cosines and sines of angles and of their multiples, a vector at a time.
//
// Angles are in quarter turns: the nearest whole number of them is then exact to subtract, whatever the angle.
#pragma once
#include "vec.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

template <typename T>
struct Angle {
  vec<T> cos, sin;
};

template <typename T>
struct AngleLimits;
template <>
struct AngleLimits<float> {
  static constexpr float kShifter = 0x1.8p23f;        // adding it rounds to a whole number, up to 2^22
  static constexpr float kSmall = 0x1p21f;            // angles below it need no more than that
  static constexpr float kLarge = 0x1p37f;            // a multiple of four, as all floats from 2^26 on are
  static constexpr float kShifterOfMany = 0x1.8p39f;  // rounds to a multiple of 2^16, up to 2^38
};
template <>
struct AngleLimits<double> {
  static constexpr double kShifter = 0x1.8p52;
  static constexpr double kSmall = 0x1p40;
  static constexpr double kLarge = 0x1p70;
  static constexpr double kShifterOfMany = 0x1.8p72;  // rounds to a multiple of 2^20, up to 2^71
};

// sin(π/2·f)/f and (cos(π/2·f) − 1)/f² for |f| ≤ ½ as polynomials in f²: to 1.2e-9 and 2e-10 in float, by Taylor's
// series to 5e-17 and 2e-18 in double.
static inline constexpr float kSinFloat[] = {1.570796304905852f, -0.6459629309952697f, 0.0796758344315887f,
                                             -0.00459210708991183f};
static inline constexpr float kCosFloat[] = {-1.2337005432964971f, 0.25366924233510324f, -0.020860274838110617f,
                                             0.0009039892448719617f};
static inline constexpr double kSinDouble[] = {
    1.570796326794896619231,     -0.6459640975062462536558,    0.07969262624616704512051,
    -0.004681754135318688100685, 0.0001604411847873598218727,  -0.000003598843235212085340459,
    5.692172921967926811775e-8,  -6.688035109811467232478e-10,
};
static inline constexpr double kCosDouble[] = {
    -1.233700550136169827354,      0.2536695079010480136366,  -0.02086348076335296087305, 0.0009192602748394265802417,
    -0.00002520204237306060548105, 4.71087477881817150367e-7, -6.38660308379185224109e-9, 6.56596311497947236221e-11,
};

template <typename T, int N>
static inline __attribute__((always_inline)) vec<T> polynomial(const T (&c)[N], vec<T> g) {
  vec<T> sum = broadcast(c[N - 1]);
#pragma GCC unroll 8
  for (int k = N - 2; k >= 0; --k) sum = sum * g + c[k];
  return sum;
}

// Of x quarter turns, |x| ≤ kSmall. The error is that of a rounded x and one unit in the last place.
template <typename T>
static inline __attribute__((always_inline)) Angle<T> angle_of(vec<T> x) {
  using I = typename Vec<T>::mask;
  constexpr int kSignBit = sizeof(T) * 8 - 2;  // moves bit 1 to the sign
  const vec<T> shifted = x + broadcast(AngleLimits<T>::kShifter);
  const vec<T> f = x - (shifted - broadcast(AngleLimits<T>::kShifter)), g = f * f;
  const I quarter = reinterpret_cast<I>(shifted);
  vec<T> s, c;
  if constexpr (sizeof(T) == 4) {
    s = f * polynomial<T>(kSinFloat, g);
    c = g * polynomial<T>(kCosFloat, g) + T(1);
  } else {
    s = f * polynomial<T>(kSinDouble, g);
    c = g * polynomial<T>(kCosDouble, g) + T(1);
  }
  const I odd = (quarter & 1) != 0;
  const vec<T> cos = odd ? s : c, sin = odd ? c : s;
  const I of_cos = ((quarter + 1) & 2) << kSignBit, of_sin = (quarter & 2) << kSignBit;
  return {reinterpret_cast<vec<T>>(reinterpret_cast<I>(cos) ^ of_cos),
          reinterpret_cast<vec<T>>(reinterpret_cast<I>(sin) ^ of_sin)};
}

// The same angle within ±kSmall, exactly: whole turns are left out. Infinity becomes NaN, as its cosine is.
template <typename T>
static inline vec<T> within_few_turns(vec<T> x) {
  using Limits = AngleLimits<T>;
  const vec<T> y = at_most<T>(at_least<T>(x, broadcast(-Limits::kLarge)), broadcast(Limits::kLarge));
  const vec<T> many = broadcast(Limits::kShifterOfMany);
  return (y - ((y + many) - many)) + (x - x);
}

template <typename T>
static inline __attribute__((always_inline)) Angle<T> sum_of(const Angle<T>& a, const Angle<T>& b) {
  return {a.cos * b.cos - a.sin * b.sin, a.sin * b.cos + a.cos * b.sin};
}
template <typename T>
static inline __attribute__((always_inline)) Angle<T> twice(const Angle<T>& a) {
  const vec<T> two_sin = a.sin + a.sin;
  return {T(1) - two_sin * a.sin, two_sin * a.cos};
}

// One, two, three and four times the angle of x quarter turns.
template <typename T>
static inline __attribute__((always_inline)) void multiples_of(vec<T> x, Angle<T> (&multiple)[4]) {
  multiple[0] = angle_of<T>(x);
  multiple[1] = twice(multiple[0]);
  multiple[2] = sum_of(multiple[0], multiple[1]);
  multiple[3] = twice(multiple[1]);
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
