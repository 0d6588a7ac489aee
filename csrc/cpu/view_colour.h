// Colour operations on rows of a view that lies in planes, a vector of pixels at a time.
#pragma once
#include "view_resample.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

// What is to be done with the colours of one view, in two stretches: contrast needs the mean of the whole grey image,
// so what stands before it is done as the rows come out of the resampling, and the rest when they all have.
struct Colours {
  int order[4];
  int before, after;  // order[0 … before), order[before … after)
  float factor[4];    // by the operation's number
  bool grey;
  bool needs_mean;  // contrast is among them, at order[before]
};

static Colours colours_of(const float* row, int channels) {
  Colours c{};
  for (int f = 0; f < 4; ++f) {
    c.factor[f] = row[kBrightness + f];
    const float wanted = row[kOrder0 + f];
    const int operation = wanted >= 0 && wanted <= 3 ? static_cast<int>(wanted) : kNoJitter;
    const bool none = operation == kNoJitter || (channels == 1 && operation >= kJitterSaturation);
    if (!none && !(operation == kJitterContrast && c.needs_mean)) {
      if (operation == kJitterContrast) c.needs_mean = true, c.before = c.after;
      c.order[c.after++] = operation;
    }
  }
  if (!c.needs_mean) c.before = c.after;
  c.grey = channels == 3 && row[kGrey] != 0;
  return c;
}

template <bool kPil, int kOperation, typename V>
static void jitter_row(float* r, float* g, float* b, int64_t size, float factor, float mean) {
  for (int64_t x = 0; x < size; x += kLanes<float>) {
    const Rgb<V> p = jittered<kPil>(Rgb<V>{load(r + x), load(g + x), load(b + x)}, kOperation, factor, mean);
    store(r + x, p.r);
    store(g + x, p.g);
    store(b + x, p.b);
  }
}

// order[begin … end) on one row, in place. A single channel stands for all three: what is left to it treats each alike.
template <bool kPil>
static void jitter_row(const Colours& colours, int begin, int end, float* row, int channels, int64_t plane,
                       int64_t pitch, float mean) {
  using V = vec<float>;
  float *r = row, *g = row + (channels == 3 ? plane : 0), *b = row + (channels == 3 ? 2 * plane : 0);
  for (int i = begin; i < end; ++i) {
    const int operation = colours.order[i];
    const float f = colours.factor[operation];
    switch (operation) {
      case kJitterBrightness: jitter_row<kPil, kJitterBrightness, V>(r, g, b, pitch, f, mean); break;
      case kJitterContrast: jitter_row<kPil, kJitterContrast, V>(r, g, b, pitch, f, mean); break;
      case kJitterSaturation: jitter_row<kPil, kJitterSaturation, V>(r, g, b, pitch, f, mean); break;
      default: jitter_row<kPil, kJitterHue, V>(r, g, b, pitch, f, mean); break;
    }
  }
}

template <bool kPil>
static void grey_row(float* row, int64_t plane, int64_t pitch) {
  using V = vec<float>;
  for (int64_t x = 0; x < pitch; x += kLanes<float>) {
    const V grey = grey_of<kPil>(Rgb<V>{load(row + x), load(row + plane + x), load(row + 2 * plane + x)});
    for (int c = 0; c < 3; ++c) store(row + c * plane + x, grey);
  }
}

// Σ of the grey values of one row.
template <bool kPil>
static double grey_sum(const float* row, int channels, int64_t plane, int64_t width) {
  using V = vec<float>;
  constexpr int L = kLanes<float>;
  V sum{};
  float rest = 0;
  const float *g = row + (channels == 3 ? plane : 0), *b = row + (channels == 3 ? 2 * plane : 0);
  int64_t x = 0;
  for (; x + L <= width; x += L) {
    const Rgb<V> p{load(row + x), load(g + x), load(b + x)};
    sum += channels == 3 ? grey_of<kPil>(p) : p.r;
  }
  for (; x < width; ++x) rest += channels == 3 ? grey_of<kPil>(Rgb<float>{row[x], g[x], b[x]}) : row[x];
  return static_cast<double>(sum_lanes<float>(sum)) + rest;
}

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
