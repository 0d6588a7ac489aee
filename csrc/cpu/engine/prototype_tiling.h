// How the samples and the prototypes of a cross-entropy are cut into tiles, chunks and blocks.
#pragma once
#include "cpu/prototype_cross_entropy.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {
namespace {

// Of the exponentials so much is kept from visit 1 to visit 2 at most, or this part of all logits where it is more: a
// step then takes an eighth of what it takes with all logits in memory. The blocks that are not kept are computed
// again.
constexpr int64_t kLeastKept = 24 << 20, kMostKept = 96 << 20;
constexpr int64_t kPartKept = 6;
constexpr int64_t kSplits = 16;  // parts of the prototypes that threads take in turns

inline int64_t split_count(int64_t blocks, int64_t threads) {
  const int64_t wanted = (kSplits + threads - 1) / threads * threads;
  return wanted < blocks ? wanted : blocks;
}

// How many samples make a tile, how many tiles a chunk, and of how many blocks of prototypes the exponentials are kept.
template <typename T>
struct Tiling {
  int64_t in_tile = 1, in_chunk = 1, kept = 0;
  int64_t lds = 0, ldt = 0, ldb = 0;  // columns of a tile of the student, of the teacher, of one view; readable

  // Samples of a tile in a chunk of `count`.
  int64_t samples_of(int64_t tile, int64_t count) const {
    const int64_t left = count - tile * in_tile;
    return left < in_tile ? left : in_tile;
  }
  static int64_t columns(int64_t views, int64_t samples) {
    return round_up((views - 1) * samples + round_up(samples, kLanes<T>), kLanes<T>);
  }

  Tiling(const PrototypeInput& in, const Blocks<T>& of_k, bool learns) {
    const int64_t views = in.student.count > in.teacher.count ? in.student.count : in.teacher.count;
    const int64_t most = kTile / views < in.samples ? kTile / views : in.samples;
    double best = 0;
    for (int64_t samples = most < kLanes<T> ? most : kLanes<T>; samples <= most; samples += kLanes<T>) {
      const double work = static_cast<double>(3 * round_up(in.student.count * samples, kColumns<T>) +
                                              round_up(in.teacher.count * samples, kColumns<T>)) /
                          static_cast<double>(samples);
      if (best != 0 && work > best) continue;
      best = work;
      in_tile = samples;
    }
    lds = columns(in.student.count, in_tile);
    ldt = columns(in.teacher.count, in_tile);
    ldb = round_up(in_tile, kLanes<T>);
    const int64_t block_bytes = of_k.height * (lds + ldt) * static_cast<int64_t>(sizeof(T));
    const int64_t tiles = (in.samples + in_tile - 1) / in_tile, part = tiles * of_k.count * block_bytes / kPartKept;
    const int64_t budget = part < kLeastKept ? kLeastKept : part < kMostKept ? part : kMostKept;
    // Without a gradient only features and sums stay, which are hundreds of times smaller.
    const int64_t fit = budget / (of_k.count * block_bytes);
    in_chunk = learns ? (fit < 1 ? 1 : fit) : 16;
    in_chunk = in_chunk < tiles ? in_chunk : tiles;
    kept = learns ? budget / (in_chunk * block_bytes) : 0;
    kept = kept < of_k.count ? kept : of_k.count;
  }
};

// Which samples count, and which views of the teacher each view of the student meets.
template <typename T>
struct SamplePairs {
  const PrototypeInput& in;
  int64_t *order, *starts, *teachers;  // samples that count; those of view v are teachers[starts[v]] … [starts[v + 1]]

  SamplePairs(const PrototypeInput& input, Arena& arena)
      : in(input),
        order(arena.take<int64_t>(input.samples)),
        starts(arena.take<int64_t>(input.student.count + 1)),
        teachers(arena.take<int64_t>(input.pairs)) {}

  // Returns how many samples count.
  int64_t prepare() {
    int64_t count = 0, pair = 0;
    for (int64_t b = 0; b < in.samples; ++b)
      if (weight_of(b) != 0) order[count++] = b;
    for (int64_t v = 0; v < in.student.count; ++v) {
      starts[v] = pair;
      for (int64_t p = 0; p < in.pairs; ++p)
        if (in.student_views[p] == v) teachers[pair++] = in.teacher_views[p];
    }
    starts[in.student.count] = pair;
    return count;
  }
  double weight_of(int64_t sample) const {
    return in.row_weights == nullptr ? 1.0 / static_cast<double>(in.samples)
                                     : static_cast<double>(static_cast<const T*>(in.row_weights)[sample]);
  }
};

// Rows against all prototypes: how many make a tile [prototypes of a block × width], and how many tiles a chunk, whose
// exponentials are in memory together; and of how many blocks the logits of all rows are kept.
constexpr int64_t kMostOfChunk = 32 << 20;  // MOST_OF_CHUNK of ops/prototype_columns.py
constexpr int64_t kTilesInChunk = 16;

template <typename T>
struct RowTiling {
  int64_t width = 1, size = 0, kept = 0, in_chunk = 1, blocks;

  RowTiling(int64_t rows, const Blocks<T>& of_k, int64_t keep, bool softmax) : blocks(of_k.count) {
    constexpr int64_t C = kColumns<T>;
    int64_t most = kMostOfChunk / (of_k.rows * static_cast<int64_t>(sizeof(T))) / C * C;
    most = most < C ? C : most > kTile ? kTile : most;
    int64_t all = 0, tiles = 0;  // columns of all tiles
    for (int64_t w = most; w > 0 && 2 * w >= most; w -= C) {
      const int64_t count = rows <= w ? 1 : (rows + w - 1) / w;
      if (tiles != 0 && count * w >= all) continue;
      width = w;
      tiles = count;
      all = count * w;
    }
    if (tiles == 1) width = round_up(rows < 1 ? 1 : rows, C);
    size = of_k.height * width;
    kept = keep / (tiles * size);
    kept = kept < blocks ? kept : blocks;
    const int64_t bytes = softmax ? (blocks - kept) * size * static_cast<int64_t>(sizeof(T)) : 0;
    const int64_t fit = bytes == 0 ? kTilesInChunk : kMostOfChunk / bytes;
    in_chunk = fit < 1 ? 1 : fit < kTilesInChunk ? fit : kTilesInChunk;
    in_chunk = in_chunk < tiles ? in_chunk : tiles;
  }
  // Kept blocks are spread over all, so that threads have the same share of them.
  int64_t kept_before(int64_t b) const { return b * kept / blocks; }
  bool keeps(int64_t b) const { return kept_before(b + 1) != kept_before(b); }
  // Rows of a tile in a chunk of `count`.
  int64_t rows_of(int64_t slot, int64_t count) const {
    const int64_t left = count - slot * width;
    return left < width ? left : width;
  }
};

// Zeros into x, or nowhere.
template <typename T>
void clear_numbers(void* x, int64_t count) {
  for (int64_t k = 0; x != nullptr && k < count; ++k) static_cast<T*>(x)[k] = 0;
}

// Calls f(split, block, scratch) for every block, the blocks of a split by one thread in their order.
template <typename At, typename F>
void each_block(const Parallel& parallel, int64_t splits, int64_t blocks, int64_t* next, At&& scratch_at, F&& f) {
  each_task(parallel, splits, next, [&](int64_t worker, int64_t split) {
    const auto mine = scratch_at(worker);
    const int64_t first = split * blocks / splits, end = (split + 1) * blocks / splits;
    for (int64_t b = first; b < end; ++b) f(split, b, mine);
  });
}

}  // namespace
}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
