// The masks of one image on the host, for the CPU operators and for sslfast._host.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "masks.h"

namespace sslfast {
namespace {

// ---------------------------------------------------------------------------------------------- selection and sorting

// The first items by (key, number): all whose key is below `key`, and the first `ties` of those whose key is equal.
struct Threshold {
  uint64_t key;
  int64_t ties;
};

// Of the `take` smallest: eight bits of the key after the other, each a histogram of what is still undecided. Random
// keys of a few hundred items are mostly told apart by the first eight.
[[maybe_unused]] Threshold threshold_of(const uint32_t* keys, int64_t count, int64_t take) {
  if (take <= 0) return {0, 0};
  if (take >= count) return {uint64_t{1} << 32, 0};
  uint64_t prefix = 0;
  for (int shift = 24;; shift -= 8) {
    uint32_t histogram[256] = {};
    for (int64_t i = 0; i < count; ++i) {
      if (shift == 24 || keys[i] >> (shift + 8) == prefix) ++histogram[keys[i] >> shift & 255];
    }
    uint32_t digit = 0;
    while (take > histogram[digit]) take -= histogram[digit++];
    prefix = prefix << 8 | digit;
    if (take == histogram[digit]) return {(prefix + 1) << shift, 0};
    if (shift == 0) return {prefix, take};
  }
}

// Whether an item is among the first; to be asked once for each item, in order.
[[maybe_unused]] inline bool taken(Threshold& threshold, uint32_t key) {
  if (key != threshold.key) return key < threshold.key;
  return threshold.ties-- > 0;
}

// Items sorted by (key, number), key in the upper half of an item: a radix sort with a buffer as long as the items.
// Returns where the result lies, in one or the other.
[[maybe_unused]] uint64_t* sort_items(uint64_t* items, uint64_t* buffer, int64_t count) {
  uint32_t histogram[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int digit = 0; digit < 4; ++digit) ++histogram[digit][items[i] >> (32 + 8 * digit) & 255];
  }
  for (int digit = 0; digit < 4; ++digit) {
    const int shift = 32 + 8 * digit;
    if (count > 0 && histogram[digit][items[0] >> shift & 255] == count) continue;  // one value alone
    uint32_t next[256], sum = 0;
    for (int value = 0; value < 256; ++value) {
      next[value] = sum;
      sum += histogram[digit][value];
    }
    for (int64_t i = 0; i < count; ++i) buffer[next[items[i] >> shift & 255]++] = items[i];
    uint64_t* sorted = buffer;
    buffer = items;
    items = sorted;
  }
  return items;
}

// --------------------------------------------------------------------------------------------------------- random_mask

struct RandomMask {
  UnitGrid shape;
  int64_t units, kept;  // units, and units that are kept
  bool ascending;
  Stream stream;  // but for the sample
  // Which unit a cell lies in, and the cells unit after unit; empty where a unit is a cell.
  std::vector<int32_t> unit_of, cell_of;
};

// Empty, or what is wrong with the numbers, of which the caller has checked that they are three and three.
[[maybe_unused]] std::string make_random_mask(const std::vector<int64_t>& grid, const std::vector<int64_t>& unit,
                                              int64_t kept, bool ascending, int64_t seed, int64_t epoch, int64_t view,
                                              RandomMask* mask) {
  if (grid.size() != 3 || unit.size() != 3) return "grid and unit must have three numbers each";
  mask->units = 1;
  int64_t cells = 1;
  for (int d = 0; d < 3; ++d) {
    if (grid[d] < 1 || unit[d] < 1 || grid[d] % unit[d] != 0) return "unit must divide grid, both of at least 1";
    if (grid[d] > kMaxCells / cells) return "grid must have fewer than 2^31 cells";
    cells *= grid[d];
    mask->units *= grid[d] / unit[d];
    mask->shape.grid[d] = static_cast<int32_t>(grid[d]);
    mask->shape.unit[d] = static_cast<int32_t>(unit[d]);
  }
  if (mask->units > kMaxUnits) return "grid must have at most 2^18 units";
  if (kept < 0 || kept > mask->units) return "kept must be between 0 and the number of units";
  mask->kept = kept;
  mask->ascending = ascending;
  mask->stream = {static_cast<uint64_t>(seed), 0, static_cast<uint32_t>(epoch),
                  kRandomMaskStream + static_cast<uint32_t>(view)};
  return {};
}

[[maybe_unused]] void make_tables(RandomMask* mask) {
  const auto cells = static_cast<int32_t>(cells_of(mask->shape)), inside = static_cast<int32_t>(cells / mask->units);
  if (inside == 1) return;
  mask->unit_of.resize(cells);
  mask->cell_of.resize(cells);
  for (int32_t i = 0; i < cells; ++i) {
    mask->unit_of[i] = unit_of_cell(mask->shape, i);
    mask->cell_of[i] = cell_of_unit(mask->shape, i / inside, i % inside);
  }
}

// Memory of one thread.
struct MaskScratch {
  std::vector<uint32_t> keys;
  std::vector<uint64_t> items;  // two of each unit
  std::vector<uint8_t> flags;
  std::vector<uint64_t> words;
};

// Keys of the items 0 … count − 1; `keys` has room for a multiple of four.
[[maybe_unused]] void draw_keys(const Stream& stream, uint32_t first_block, int64_t count, uint32_t* keys) {
  for (int64_t i = 0; i < count; i += 4) {
    const Philox4 block = draw(stream, first_block + static_cast<uint32_t>(i / 4));
    std::memcpy(keys + i, block.word, sizeof block.word);
  }
}

// Both groups in raster order, and where each item went. No branch on a flag, which no processor could foresee.
template <typename Masked>
inline void partition_items(int64_t count, int64_t kept, Masked masked, int64_t* keep, int64_t* mask,
                            int64_t* restore) {
  int64_t k = 0, m = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool gone = masked(i);
    int64_t* at = gone ? mask + m : keep + k;
    *at = i;
    restore[i] = gone ? kept + m : k;
    m += gone;
    k += !gone;
  }
}

// keep [kept · cells of a unit], masked [the other cells], restore [cells]; noise [units] or null.
[[maybe_unused]] void random_mask_image(const RandomMask& mask, int64_t sample, const float* noise,
                                        MaskScratch& scratch, int64_t* keep, int64_t* masked, int64_t* restore) {
  const int64_t units = mask.units, cells = cells_of(mask.shape), inside = cells / units;
  scratch.keys.resize((units + 3) / 4 * 4);
  uint32_t* keys = scratch.keys.data();
  if (noise) {
    for (int64_t u = 0; u < units; ++u) keys[u] = noise_key(noise[u]);
  } else {
    Stream stream = mask.stream;
    stream.sample = static_cast<uint64_t>(sample);
    draw_keys(stream, 0, units, keys);
  }
  if (mask.ascending) {
    Threshold threshold = threshold_of(keys, units, mask.kept);
    if (inside == 1) {
      partition_items(cells, mask.kept, [&](int64_t i) { return !taken(threshold, keys[i]); }, keep, masked, restore);
      return;
    }
    scratch.flags.resize(units);
    uint8_t* gone = scratch.flags.data();
    for (int64_t u = 0; u < units; ++u) gone[u] = !taken(threshold, keys[u]);
    const int32_t* unit_of = mask.unit_of.data();
    partition_items(cells, mask.kept * inside, [=](int64_t i) { return gone[unit_of[i]] != 0; }, keep, masked, restore);
    return;
  }
  scratch.items.resize(2 * units);
  for (int64_t u = 0; u < units; ++u) scratch.items[u] = uint64_t{keys[u]} << 32 | static_cast<uint64_t>(u);
  const uint64_t* sorted = sort_items(scratch.items.data(), scratch.items.data() + units, units);
  for (int64_t rank = 0; rank < units; ++rank) {
    const auto u = static_cast<int64_t>(sorted[rank] & 0xffffffffu);
    int64_t* ids = rank < mask.kept ? keep + rank * inside : masked + (rank - mask.kept) * inside;
    for (int64_t i = 0; i < inside; ++i) {
      const int64_t cell = inside == 1 ? u : mask.cell_of[u * inside + i];
      ids[i] = cell;
      restore[cell] = rank * inside + i;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- block_mask

// Empty, or what is wrong with the numbers.
[[maybe_unused]] std::string make_block_rule(const std::vector<int64_t>& grid, const std::vector<double>& area,
                                             const std::vector<double>& log_aspect, int64_t tries, bool complete,
                                             BlockRule* rule) {
  if (grid.size() != 2) return "grid must have two numbers";
  if (area.size() != 2) return "area must have two numbers";
  if (log_aspect.size() != 2) return "log_aspect must have two numbers";
  for (int64_t side : grid) {
    if (side < 1 || side > kMaxSide) return "sides of the grid must be from 1 to 1024";
  }
  if (grid[0] * grid[1] > kMaxPatches) return "grid must have at most 2^17 patches";
  for (double a : area) {
    if (!(a >= 0 && a <= 0x1p40)) return "areas must be from 0 to 2^40";
  }
  for (double a : log_aspect) {
    if (!(a > -300 && a < 300)) return "log_aspect must be between -300 and 300";
  }
  *rule = {static_cast<int>(grid[0]),
           static_cast<int>(grid[1]),
           area[0],
           area[1],
           {log_aspect[0], log_aspect[1]},
           tries,
           complete};
  return {};
}

struct MaskRows {
  uint64_t* words;
  int per_row;

  inline int64_t masked(const Block& b) const {
    int64_t sum = 0;
    for (int j = b.left >> 6; j <= (b.left + b.width - 1) >> 6; ++j) {
      const uint64_t columns = columns_in_word(b.left, b.left + b.width, j);
      for (int i = b.top; i < b.top + b.height; ++i) sum += ones(words[i * per_row + j] & columns);
    }
    return sum;
  }
  inline void fill(const Block& b) {
    for (int j = b.left >> 6; j <= (b.left + b.width - 1) >> 6; ++j) {
      const uint64_t columns = columns_in_word(b.left, b.left + b.width, j);
      for (int i = b.top; i < b.top + b.height; ++i) words[i * per_row + j] |= columns;
    }
  }
};

// mask [height · width]: 1 where a patch is masked.
[[maybe_unused]] void block_mask_image(const Stream& stream, const BlockRule& rule, double count, MaskScratch& scratch,
                                       uint8_t* mask) {
  const int per_row = words_of_row(rule.width);
  scratch.words.assign(static_cast<size_t>(rule.height) * per_row, 0);
  MaskRows rows{scratch.words.data(), per_row};
  int64_t missing = -place_blocks(stream, rule, count, rows);
  for (int i = 0; i < rule.height; ++i) {
    for (int j = 0; j < rule.width; ++j) {
      mask[i * rule.width + j] = rows.words[i * per_row + (j >> 6)] >> (j & 63) & 1;
    }
  }
  const int64_t patches = int64_t{rule.height} * rule.width;
  missing += whole_count(count, patches);
  if (!rule.complete || missing <= 0) return;
  scratch.keys.resize((patches + 3) / 4 * 4);
  uint32_t* keys = scratch.keys.data();
  draw_keys(stream, kCompletionBlock, patches, keys);
  int64_t free = 0;  // keys of the patches that are not masked, one after the other
  for (int64_t l = 0; l < patches; ++l) {
    keys[free] = keys[l];
    free += !mask[l];
  }
  Threshold threshold = threshold_of(keys, free, missing);
  const uint32_t* key = keys;
  for (int64_t l = 0; l < patches; ++l) {
    if (!mask[l]) mask[l] = taken(threshold, *key++);
  }
}

}  // namespace
}  // namespace sslfast
