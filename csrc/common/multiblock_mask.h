// I-JEPA's multi-block masks (Assran et al., CVPR 2023), host and device: target blocks, and a context block without
// what the targets cover. Block sizes come with the call; here places are drawn, in whole numbers only.
//
// Random numbers of a sample's stream: words 0 and 1 of block t are the corner of target t; those of block 1024 + n the
// corner of the context at attempt n; word l%4 of block 2^15 + l/4 is the key of patch l.
#pragma once
#include <algorithm>
#include <vector>
#include "philox.h"
#include "streams.h"

namespace sslfast {

constexpr int kMostTargets = 256;
constexpr int64_t kMostPatches = 1 << 17;
constexpr uint32_t kAttemptBlock = 1024, kPatchKeyBlock = 1u << 15;
constexpr int kTries = 20;

struct MultiBlockRules {
  uint64_t seed;
  uint32_t epoch, view;  // view below 1024
  int32_t height, width;
  int32_t targets, target_height, target_width;
  int32_t context_height, context_width;
  int32_t kept;      // length of every context; 0: they are only counted
  int32_t least;     // a context of fewer patches is drawn anew
  int32_t overlap;   // not 0: the context keeps what targets cover
  int32_t upstream;  // not 0: as facebookresearch/ijepa: see avoided(), corner_below() and rank()
};

struct Corner {
  int32_t top, left;
};

SSLFAST_INLINE Stream multiblock_stream(const MultiBlockRules& rules, uint64_t sample) {
  return {rules.seed, sample, rules.epoch, kMultiblockMaskStream + rules.view};
}

// Where a block of height × width lies. Upstream never reaches the last row and column.
SSLFAST_INLINE Corner draw_corner(const MultiBlockRules& rules, const Stream& stream, uint32_t block, int32_t height,
                                  int32_t width) {
  const Philox4 random = draw(stream, block);
  const int32_t more = rules.upstream ? 0 : 1;
  const auto tops = static_cast<uint64_t>(rules.height - height + more);
  const auto lefts = static_cast<uint64_t>(rules.width - width + more);
  return {static_cast<int32_t>(random.word[0] * tops >> 32), static_cast<int32_t>(random.word[1] * lefts >> 32)};
}
SSLFAST_INLINE Corner draw_target(const MultiBlockRules& rules, const Stream& stream, int t) {
  return draw_corner(rules, stream, t, rules.target_height, rules.target_width);
}
SSLFAST_INLINE Corner draw_context(const MultiBlockRules& rules, const Stream& stream, int attempt) {
  return draw_corner(rules, stream, kAttemptBlock + attempt, rules.context_height, rules.context_width);
}

SSLFAST_INLINE bool inside(Corner corner, int32_t height, int32_t width, int32_t y, int32_t x) {
  return y >= corner.top && y < corner.top + height && x >= corner.left && x < corner.left + width;
}

// The first target that covers a patch; as many as there are targets where none does.
SSLFAST_INLINE int first_target(const MultiBlockRules& rules, const Corner* targets, int32_t y, int32_t x) {
  int t = 0;
  while (t < rules.targets && !inside(targets[t], rules.target_height, rules.target_width, y, x)) ++t;
  return t;
}

// How many attempts at a context there are, and how many of the targets, from the first on, it avoids at one of them:
// upstream gives one up, the last first, after every 20.
SSLFAST_INLINE int attempts(const MultiBlockRules& rules) {
  return rules.upstream ? kTries * (rules.targets + 1) : kTries;
}
SSLFAST_INLINE int avoided(const MultiBlockRules& rules, int attempt) {
  if (rules.overlap) return 0;
  if (!rules.upstream) return rules.targets;
  const int left = rules.targets - attempt / kTries;
  return left > 0 ? left : 0;
}
SSLFAST_INLINE bool enough(const MultiBlockRules& rules, int32_t patches) {
  return rules.upstream ? patches > rules.least : patches >= rules.least;
}

// The context's `kept` patches are those of the lowest rank: first the ones of its block, then the ones outside it,
// each at random; never those of a target. Upstream cuts in the order of the patches' numbers.
constexpr uint64_t kNever = ~uint64_t{0};
SSLFAST_INLINE uint64_t rank(const MultiBlockRules& rules, Corner context, int avoids, int cover, uint32_t key,
                             int32_t y, int32_t x) {
  if (cover < avoids) return kNever;
  const bool in = inside(context, rules.context_height, rules.context_width, y, x);
  return static_cast<uint64_t>(in ? 0 : 1) << 49 | static_cast<uint64_t>(rules.upstream ? 0 : key) << 17 |
         static_cast<uint64_t>(y * rules.width + x);
}

// ----------------------------------------------------------------------------------------------------- on the host

// An operator's arguments as rules; `fits` tells beforehand whether they can be.
constexpr const char* kMultiBlockLimits =
    "multiblock_mask: grid and blocks must be two sizes each, a block no larger than the grid (upstream: smaller), "
    "targets from 1 to 256, at most 2^17 patches, and kept from 0 to the number of patches";

inline bool fits(const std::vector<int64_t>& grid, int64_t targets, const std::vector<int64_t>& target_block,
                 const std::vector<int64_t>& context_block, int64_t kept, bool upstream) {
  if (grid.size() != 2 || target_block.size() != 2 || context_block.size() != 2) return false;
  for (const auto& block : {target_block, context_block})
    for (int d = 0; d < 2; ++d)
      if (block[d] < 1 || block[d] > grid[d] - (upstream ? 1 : 0)) return false;
  // Each side first, so that their product cannot overflow.
  return grid[0] <= kMostPatches && grid[1] <= kMostPatches && grid[0] * grid[1] <= kMostPatches && targets >= 1 &&
         targets <= kMostTargets && kept >= 0 && kept <= grid[0] * grid[1];
}

inline MultiBlockRules rules_of(const std::vector<int64_t>& grid, int64_t targets,
                                const std::vector<int64_t>& target_block, const std::vector<int64_t>& context_block,
                                int64_t kept, int64_t min_keep, bool overlap, bool upstream, int64_t seed,
                                int64_t epoch, int64_t view) {
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(std::min<int64_t>(x, kMostPatches)); };
  return {static_cast<uint64_t>(seed),
          static_cast<uint32_t>(epoch),
          static_cast<uint32_t>(view),
          narrow(grid[0]),
          narrow(grid[1]),
          narrow(targets),
          narrow(target_block[0]),
          narrow(target_block[1]),
          narrow(context_block[0]),
          narrow(context_block[1]),
          narrow(kept),
          narrow(min_keep),
          overlap,
          upstream};
}

struct MultiBlockScratch {
  std::vector<Corner> corners;   // of the targets
  std::vector<uint16_t> covers;  // first_target() of each patch
  std::vector<uint64_t> ranks, sorted;
};

// One sample: context [kept], ascending, −1 where there are too few; targets of t at target + t·target_stride; and how
// many patches the context has before it is made `kept` long.
inline int64_t multiblock_sample(const MultiBlockRules& rules, uint64_t sample, int64_t* context, int64_t* target,
                                 int64_t target_stride, MultiBlockScratch& scratch) {
  const Stream stream = multiblock_stream(rules, sample);
  const int32_t patches = rules.height * rules.width;
  scratch.corners.resize(rules.targets);
  for (int t = 0; t < rules.targets; ++t) {
    const Corner corner = scratch.corners[t] = draw_target(rules, stream, t);
    int64_t* out = target + t * target_stride;
    for (int32_t y = corner.top; y < corner.top + rules.target_height; ++y)
      for (int32_t x = corner.left; x < corner.left + rules.target_width; ++x) *out++ = int64_t{y} * rules.width + x;
  }
  scratch.covers.resize(patches);
  for (int32_t y = 0, l = 0; y < rules.height; ++y)
    for (int32_t x = 0; x < rules.width; ++x)
      scratch.covers[l++] = static_cast<uint16_t>(first_target(rules, scratch.corners.data(), y, x));

  Corner best{};
  int best_avoids = 0;
  int32_t most = -1;
  for (int n = 0; n < attempts(rules) && !(most >= 0 && enough(rules, most)); ++n) {
    const Corner corner = draw_context(rules, stream, n);
    const int avoids = avoided(rules, n);
    int32_t count = 0;
    for (int32_t y = corner.top; y < corner.top + rules.context_height; ++y) {
      const uint16_t* const cover = scratch.covers.data() + y * rules.width + corner.left;
      for (int32_t x = 0; x < rules.context_width; ++x) count += cover[x] >= avoids;
    }
    if (count > most) {
      best = corner;
      best_avoids = avoids;
      most = count;
    }
  }
  if (rules.kept == 0) return most;

  const bool by_key = most != rules.kept && !rules.upstream;
  scratch.ranks.resize(patches);
  Philox4 random{};
  for (int32_t y = 0, l = 0; y < rules.height; ++y)
    for (int32_t x = 0; x < rules.width; ++x, ++l) {
      if (by_key && l % 4 == 0) random = draw(stream, kPatchKeyBlock + static_cast<uint32_t>(l / 4));
      scratch.ranks[l] = rank(rules, best, best_avoids, scratch.covers[l], random.word[l % 4], y, x);
    }
  scratch.sorted = scratch.ranks;
  const auto last = scratch.sorted.begin() + std::min(rules.kept, patches) - 1;
  std::nth_element(scratch.sorted.begin(), last, scratch.sorted.end());
  int64_t found = 0;
  for (int32_t l = 0; l < patches; ++l)
    if (scratch.ranks[l] <= *last && scratch.ranks[l] != kNever) context[found++] = l;
  for (; found < rules.kept; ++found) context[found] = -1;
  return most;
}

}  // namespace sslfast
