// Random masks of patches: what one image draws and what follows from it, for the host and the device: the same bits
// on both.
#pragma once
#include "exact.h"
#include "streams.h"

namespace sslfast {

// By comparison and not by index: on a GPU an array with a changing index would live in memory.
SSLFAST_INLINE uint32_t word_of(const Philox4& block, uint32_t i) {
  const uint32_t low = i & 1 ? block.word[1] : block.word[0], high = i & 1 ? block.word[3] : block.word[2];
  return i & 2 ? high : low;
}

// The key of an item, a unit or a patch: items of smaller (key, number) come first.
SSLFAST_INLINE uint32_t item_key(const Stream& stream, uint32_t first_block, int64_t item) {
  return word_of(draw(stream, first_block + static_cast<uint32_t>(item >> 2)), static_cast<uint32_t>(item & 3));
}

// Whole numbers in the order of the floats: −0 = +0, and all NaN alike behind +∞.
SSLFAST_INLINE uint32_t noise_key(float noise) {
  const uint32_t bits = float_to_bits(noise), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0xffffffffu;
  if (magnitude == 0) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// ------------------------------------------------------------------------------------------------------------- units

inline constexpr int64_t kMaxUnits = 1 << 18;  // four keys a block, 2^16 blocks a stream
inline constexpr int64_t kMaxCells = (int64_t{1} << 31) - 1;

// Cells (patches) of a grid (time, height, width), in units that are kept or masked whole. Both are numbered in raster
// order.
struct UnitGrid {
  int32_t grid[3], unit[3];
};

SSLFAST_INLINE int64_t cells_of_unit(const UnitGrid& g) { return int64_t{g.unit[0]} * g.unit[1] * g.unit[2]; }
SSLFAST_INLINE int64_t cells_of(const UnitGrid& g) { return int64_t{g.grid[0]} * g.grid[1] * g.grid[2]; }

SSLFAST_INLINE int32_t unit_of_cell(const UnitGrid& g, int32_t cell) {
  const int32_t w = cell % g.grid[2], h = cell / g.grid[2] % g.grid[1], t = cell / g.grid[2] / g.grid[1];
  return (t / g.unit[0] * (g.grid[1] / g.unit[1]) + h / g.unit[1]) * (g.grid[2] / g.unit[2]) + w / g.unit[2];
}

// The cell number `inside` of a unit.
SSLFAST_INLINE int32_t cell_of_unit(const UnitGrid& g, int32_t unit, int32_t inside) {
  const int32_t across = g.grid[2] / g.unit[2], down = g.grid[1] / g.unit[1];
  const int32_t w = unit % across * g.unit[2] + inside % g.unit[2];
  const int32_t h = unit / across % down * g.unit[1] + inside / g.unit[2] % g.unit[1];
  const int32_t t = unit / across / down * g.unit[0] + inside / g.unit[2] / g.unit[1];
  return (t * g.grid[1] + h) * g.grid[2] + w;
}

// ------------------------------------------------------------------------------------------------------------ blocks

inline constexpr int64_t kMaxSide = 1024;
inline constexpr int64_t kMaxPatches = 1 << 17;     // their keys take the upper half of a stream's blocks
inline constexpr uint32_t kMaxAttempts = 1u << 15;  // attempts take the lower half
inline constexpr uint32_t kCompletionBlock = 1 << 15;

// How blocks are drawn (MaskingGenerator of BEiT, iBOT and DINOv2).
struct BlockRule {
  int height, width;   // of the grid, in patches
  double least, most;  // area of a block
  Range log_aspect;    // log of height / width
  int64_t tries;       // in a row that may fail before the mask is left as it is
  bool complete;       // patches drawn one by one make up for what is missing
};

struct Block {
  int top, left, height, width;
};

// Attempt number `attempt` at a block of at most about `limit` patches; false: one that does not fit, or an empty one.
// A block is smaller than the grid in both directions, as in the generators named above.
SSLFAST_INLINE bool propose_block(const Stream& stream, const BlockRule& rule, double limit, uint32_t attempt,
                                  Block* block) {
  const Philox4 d = draw(stream, attempt);
  const double area = uniform({rule.least, limit}, d.word[0]);
  const double aspect = exponential(uniform(rule.log_aspect, d.word[1]));
  const double h = nearest(root(SSLFAST_MUL(area, aspect))), w = nearest(root(area / aspect));
  if (!(h >= 1 && h < rule.height && w >= 1 && w < rule.width)) return false;
  block->height = static_cast<int>(h);
  block->width = static_cast<int>(w);
  block->top = static_cast<int>(SSLFAST_MUL(rule.height - h + 1, unit(d.word[2])));
  block->left = static_cast<int>(SSLFAST_MUL(rule.width - w + 1, unit(d.word[3])));
  return true;
}

// Adds blocks to `mask` until `count` patches are masked or `tries` attempts in a row have failed; returns how many are
// masked. A block counts by what it adds, which may be at most what is missing. Mask: masked(block) and fill(block).
#ifdef __CUDACC__
#pragma nv_exec_check_disable  // a mask lives on the host or on the device
#endif
template <typename Mask>
SSLFAST_INLINE int64_t place_blocks(const Stream& stream, const BlockRule& rule, double count, Mask& mask) {
  int64_t masked = 0;
  uint32_t attempt = 0;
  while (static_cast<double>(masked) < count && attempt < kMaxAttempts) {
    const double missing = count - static_cast<double>(masked);
    const double limit = rule.most < missing ? rule.most : missing;
    int64_t added = 0;
    for (int64_t i = 0; i < rule.tries && added == 0 && attempt < kMaxAttempts; ++i) {
      Block block;
      if (!propose_block(stream, rule, limit, attempt++, &block)) continue;
      const int64_t fresh = int64_t{block.height} * block.width - mask.masked(block);
      if (fresh == 0 || static_cast<double>(fresh) > limit) continue;
      mask.fill(block);
      added = fresh;
    }
    if (added == 0) break;
    masked += added;
  }
  return masked;
}

// How many patches a completed mask has: `count` cut to a whole number in 0 … patches; NaN counts as 0.
SSLFAST_INLINE int64_t whole_count(double count, int64_t patches) {
  if (!(count > 0)) return 0;
  return count < static_cast<double>(patches) ? static_cast<int64_t>(count) : patches;
}

// A row of the mask is ⌈width / 64⌉ words. The bits of word number `word` that stand for columns from … to − 1:
SSLFAST_INLINE uint64_t columns_in_word(int from, int to, int word) {
  const int low = from > 64 * word ? from - 64 * word : 0, high = to < 64 * (word + 1) ? to - 64 * word : 64;
  if (low >= high) return 0;
  return (high == 64 ? ~uint64_t{0} : (uint64_t{1} << high) - 1) & (~uint64_t{0} << low);
}

SSLFAST_INLINE int words_of_row(int width) { return (width + 63) / 64; }

SSLFAST_INLINE int ones(uint64_t x) {
#ifdef __CUDA_ARCH__
  return __popcll(x);
#else
  // Not __builtin_popcountll, which is a call where the processor is not known to have the instruction.
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  return static_cast<int>(((x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
#endif
}

}  // namespace sslfast
