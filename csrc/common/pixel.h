// The arithmetic of one pixel, for the host and the device. `V` is float, or a vector of floats (GCC's extension):
// what is written here holds for both, so there is no branch on a pixel's value, only choices.
//
// Two semantics. `torchvision`: values in [0, 1], as its functional operations on float tensors. `pil`: whole numbers
// from 0 to 255, as PIL's operations on uint8 images, which round or truncate after each step. Comparisons are written
// so that a NaN stays a NaN.
//
// In CUDA files (USE_CUDA) some functions of a float have another form, for the instructions that a GPU has: equal but
// for the rounding of the hue.
#pragma once
#include "half.h"

namespace sslfast {

template <typename V>
struct Rgb {
  V r, g, b;
};

template <typename V>
SSLFAST_INLINE V splat(float x) {
  return V{} + x;
}

#ifdef USE_CUDA
// The smaller and the larger of two numbers; NaN where one of them is.
#ifdef __CUDA_ARCH__
SSLFAST_INLINE float smaller_of(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
SSLFAST_INLINE float larger_of(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
#else
SSLFAST_INLINE float smaller_of(float a, float b) { return a < b || a != a ? a : b; }
SSLFAST_INLINE float larger_of(float a, float b) { return a > b || a != a ? a : b; }
#endif

SSLFAST_INLINE float magnitude(float x) { return SSLFAST_DEVICE_OR_HOST(fabsf(x), __builtin_fabsf(x)); }

// x held to 0 … 1, NaN as 0.
SSLFAST_INLINE float saturate(float x) {
#ifdef __CUDA_ARCH__
  return __saturatef(x);
#else
  x = x > 0.0f ? x : 0.0f;
  return x < 1.0f ? x : 1.0f;
#endif
}

// 1/x to two units in the last place, for |x| from 2^-126 to 2^126.
SSLFAST_INLINE float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

SSLFAST_INLINE float clamp(float x, float low, float high) { return smaller_of(larger_of(x, low), high); }
#endif

template <typename V>
SSLFAST_INLINE V clamp(V x, float low, float high) {
  const V lowest = splat<V>(low), highest = splat<V>(high);
  x = x < lowest ? lowest : x;
  return x > highest ? highest : x;
}

// ⌊x⌋ for |x| < 2^22: adding 1.5·2^23 rounds to a whole number.
template <typename V>
SSLFAST_INLINE V floor_of(V x) {
  const V rounded = (x + splat<V>(12582912.0f)) - splat<V>(12582912.0f);
  return rounded > x ? rounded - splat<V>(1.0f) : rounded;
}

template <bool kPil>
inline constexpr float kWhite = kPil ? 255.0f : 1.0f;

// A number on the scale 0 … 1 as a byte, to the nearest; NaN, which no byte is, as 0.
SSLFAST_INLINE float byte_of_unit(float x) {
  x = x > 0.0f ? x : 0.0f;
  return floor_of((x < 1.0f ? x : 1.0f) * 255.0f + 0.5f);
}

template <bool kPil, typename V>
SSLFAST_INLINE V grey_of(const Rgb<V>& p) {
  if constexpr (kPil) {  // 16-bit fixed point; below 2^24, so exact in float
    const V sum = p.r * splat<V>(19595.0f) + p.g * splat<V>(38470.0f) + p.b * splat<V>(7471.0f) + splat<V>(32768.0f);
    return floor_of(sum * splat<V>(1.0f / 65536.0f));
  } else {
    return p.r * splat<V>(0.2989f) + p.g * splat<V>(0.587f) + p.b * splat<V>(0.114f);
  }
}

// f·x + (1 − f)·y, held to the range.
template <bool kPil, typename V>
SSLFAST_INLINE V blend(V x, V y, float f) {
  if constexpr (kPil) {
    return floor_of(clamp(y + splat<V>(f) * (x - y), 0.0f, 255.0f));
  } else {
    return clamp(splat<V>(f) * x + splat<V>(1.0f - f) * y, 0.0f, 1.0f);
  }
}

template <bool kPil, typename V>
SSLFAST_INLINE Rgb<V> blend(const Rgb<V>& p, V other, float f) {
  return {blend<kPil>(p.r, other, f), blend<kPil>(p.g, other, f), blend<kPil>(p.b, other, f)};
}

template <bool kPil, typename V>
SSLFAST_INLINE Rgb<V> saturated(const Rgb<V>& p, float f) {
  return blend<kPil>(p, grey_of<kPil>(p), f);
}

// Hue as 6·H (red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5; negative between magenta and red), of a pixel with
// this maximum and this range > 0. In PIL's order of operations where bytes are cut from it.
template <bool kPil, typename V>
SSLFAST_INLINE V hue_of(const Rgb<V>& p, V top, V range) {
  const V zero = splat<V>(0.0f), two = splat<V>(2.0f), four = splat<V>(4.0f);
  const V first = p.r == top ? p.g : (p.g == top ? p.b : p.r), second = p.r == top ? p.b : (p.g == top ? p.r : p.g);
  const V base = p.r == top ? zero : (p.g == top ? two : four);
  if constexpr (kPil) {
    return base + ((top - second) / range - (top - first) / range);
  } else {
    return (first - second) / range + base;
  }
}

// ⌊255 x⌋ for x in [0, 1], of the exact product: 256 x and the difference from a whole number beside it are exact.
template <typename V>
SSLFAST_INLINE V byte_of(V x) {
  const V whole = floor_of(x * splat<V>(255.0f));
  return x * splat<V>(256.0f) - whole < x ? whole - splat<V>(1.0f) : whole;
}

// How far a channel is from the maximum, as a share of the range: channel n (5 red, 3 green, 1 blue) at hue h in
// [0, 6): max(0, min(k, 4 − k, 1)), k = (n + h) mod 6.
template <typename V>
SSLFAST_INLINE V falloff(float n, V h) {
  V k = h + splat<V>(n);
  k = k >= splat<V>(6.0f) ? k - splat<V>(6.0f) : k;
  const V rest = splat<V>(4.0f) - k;
  return clamp(k < rest ? k : rest, 0.0f, 1.0f);
}

#ifdef USE_CUDA
// hue_turned below, in torchvision's semantics: one reciprocal; as distances from the hue at which a channel is least
// (red cyan's, 3) or largest, its falloff is 2 − |h − 3|, |h − 2| − 1 (green) or |h − 4| − 1 (blue), held to 0 … 1.
SSLFAST_INLINE Rgb<float> hue_turned_on_gpu(const Rgb<float>& p, float f) {
  const float top = larger_of(larger_of(p.r, p.g), p.b), low = smaller_of(smaller_of(p.r, p.g), p.b);
  const float range = top - low;
  const bool red = p.r == top, green = p.g == top;
  const float first = red ? p.g : (green ? p.b : p.r), second = red ? p.b : (green ? p.r : p.g);
  // Of a range that small the hue has no influence.
  float h = (first - second) * reciprocal(range < 1e-30f ? 1.0f : range) + (red ? 0.0f : (green ? 2.0f : 4.0f));
  h += 6 * f;  // −4 … 8
  h = h < 0.0f ? h + 6.0f : h;
  h = h >= 6.0f ? h - 6.0f : h;
  const auto distance = [&](float from) { return magnitude(h - from); };
  const auto channel = [&](float falloff) { return falloff <= 0.0f ? top : clamp(top - range * falloff, 0.0f, 1.0f); };
  return {channel(saturate(2.0f - distance(3.0f))), channel(saturate(distance(2.0f) - 1.0f)),
          channel(saturate(distance(4.0f) - 1.0f))};
}
#endif

// The hue turned by `f` of a full turn, which is held to −1/2 … 1/2.
template <bool kPil, typename V>
SSLFAST_INLINE Rgb<V> hue_turned(const Rgb<V>& p, float f) {
  f = f > -0.5f ? f : -0.5f;
  f = f < 0.5f ? f : 0.5f;
#ifdef USE_CUDA
  if constexpr (!kPil) return hue_turned_on_gpu(p, f);
#endif
  const V zero = splat<V>(0.0f), six = splat<V>(6.0f);
  V top = p.r > p.g ? p.r : p.g, low = p.r < p.g ? p.r : p.g;
  top = top > p.b ? top : p.b;
  low = low < p.b ? low : p.b;
  const V range = top - low;
  V h = hue_of<kPil>(p, top, range == zero ? splat<V>(1.0f) : range);
  if constexpr (kPil) {
    // H, S and V are bytes: truncated, the hue turned modulo 256.
    h = h / six;
    const V turn = splat<V>(static_cast<float>(static_cast<int>(f * 255.0f)));
    V hue = range == zero ? turn : byte_of(h < zero ? h + splat<V>(1.0f) : h) + turn;
    hue = hue < zero ? hue + splat<V>(256.0f) : hue;
    hue = hue > splat<V>(255.0f) ? hue - splat<V>(256.0f) : hue;
    const V share = byte_of(range / (top > zero ? top : splat<V>(1.0f)));
    h = hue * splat<V>(6.0f / 255.0f);  // from here on everything is continuous, so rounding does no harm
    h = h >= six ? h - six : h;
    const V scale = top * share * splat<V>(1.0f / 255.0f), half = splat<V>(0.5f);
    return {floor_of(top - scale * falloff(5.0f, h) + half), floor_of(top - scale * falloff(3.0f, h) + half),
            floor_of(top - scale * falloff(1.0f, h) + half)};
  } else {
    h = h < zero ? h + six : h;
    h = h + splat<V>(f < 0 ? 6 * f + 6 : 6 * f);
    h = h >= six ? h - six : h;
    // The channel that is the maximum is left as it is; what lies below it is held to [0, 1], as torchvision does.
    const V red = falloff(5.0f, h), green = falloff(3.0f, h), blue = falloff(1.0f, h);
    return {red <= zero ? top : clamp(top - range * red, 0.0f, 1.0f),
            green <= zero ? top : clamp(top - range * green, 0.0f, 1.0f),
            blue <= zero ? top : clamp(top - range * blue, 0.0f, 1.0f)};
  }
}

// What is at least the threshold (on the scale 0 … 1) is inverted. PIL compares whole numbers: x ≥ 128 for 1/2.
template <bool kPil, typename V>
SSLFAST_INLINE V solarized(V x, float threshold) {
  const V white = splat<V>(kWhite<kPil>), limit = splat<V>(kPil ? threshold * 256.0f : threshold);
  return x >= limit ? white - x : x;
}

// Jitter operations, by the numbers that stand in the columns kOrder0 … kOrder3.
enum Jitter : int { kNoJitter = -1, kJitterBrightness, kJitterContrast, kJitterSaturation, kJitterHue };

// One operation on one pixel; `mean` is the mean of the grey image, which contrast needs (in pil semantics rounded).
template <bool kPil, typename V>
SSLFAST_INLINE Rgb<V> jittered(const Rgb<V>& p, int operation, float f, float mean) {
  switch (operation) {
    case kJitterBrightness: return blend<kPil>(p, splat<V>(0.0f), f);
    case kJitterContrast: return blend<kPil>(p, splat<V>(mean), f);
    case kJitterSaturation: return saturated<kPil>(p, f);
    case kJitterHue: return hue_turned<kPil>(p, f);
    default: return p;
  }
}

}  // namespace sslfast
