// Every pair of a row block and a column block, once, so that both can be updated without atomics or private copies.
//
// Blocks are taken in groups. With P groups on the longer side and S ≤ P on the shorter, in round t = 0 … P − 1 group x
// of the shorter side meets group (x + t) mod P of the longer: no group is in two pairs of a round. Tasks are taken
// from a counter in that order, and a task waits until both its groups have finished their earlier tasks. So every
// block is updated in one fixed order, whichever thread does it, without a barrier between rounds. It cannot deadlock:
// a task waits only for earlier tickets, and every earlier ticket is held by a thread that is running.
#pragma once
#include <cstdint>

#include "pair_schedule.h"

namespace sslfast {
namespace SSLFAST_CPU_LEVEL {

struct GridSchedule {
  int64_t rows, columns;            // blocks
  int64_t row_group, column_group;  // blocks in a group
  int64_t* done;                    // rows + columns + 1 numbers, all zero: finished tasks of each group, tickets

  static GridSchedule make(int64_t rows, int64_t columns, int64_t threads, int64_t* done) {
    return {rows, columns, PairSchedule::group_size(rows, threads), PairSchedule::group_size(columns, threads), done};
  }

  // How many of 0, 1, …, x − 1 are below s modulo p.
  static int64_t below(int64_t x, int64_t s, int64_t p) { return x / p * s + (x % p < s ? x % p : s); }

  // Calls tile(i, j) for the block pairs of two groups, as a snake: from one to the next only one block changes.
  template <typename Tile>
  void walk(int64_t a, int64_t b, Tile&& tile) const {
    const int64_t end_a = (a + 1) * row_group < rows ? (a + 1) * row_group : rows;
    const int64_t begin = b * column_group;
    const int64_t end_b = begin + column_group < columns ? begin + column_group : columns;
    bool forth = true;
    for (int64_t i = a * row_group; i < end_a; ++i, forth = !forth)
      for (int64_t step = begin; step < end_b; ++step) tile(i, forth ? step : end_b - 1 - (step - begin));
  }

  // Runs tile(i, j) for every pair until no ticket is left; called by every thread.
  template <typename Tile>
  void work(Tile&& tile) const {
    const int64_t r = (rows + row_group - 1) / row_group, c = (columns + column_group - 1) / column_group;
    const int64_t longer = r > c ? r : c, shorter = r > c ? c : r;
    int64_t* next = done + r + c;
    for (;;) {
      const int64_t ticket = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (ticket >= longer * shorter) return;
      const int64_t round = ticket / shorter, x = ticket % shorter, y = (x + round) % longer;
      // Group y met in each earlier round the group y − t of the shorter side, where there is one.
      const int64_t met = below(longer + y + 1, shorter, longer) - below(longer + y - round + 1, shorter, longer);
      const int64_t a = r > c ? y : x, b = r > c ? x : y;
      wait_until(done + a, r > c ? met : round);
      wait_until(done + r + b, r > c ? round : met);
      walk(a, b, tile);
      __atomic_store_n(done + a, (r > c ? met : round) + 1, __ATOMIC_RELEASE);
      __atomic_store_n(done + r + b, (r > c ? round : met) + 1, __ATOMIC_RELEASE);
    }
  }
};

}  // namespace SSLFAST_CPU_LEVEL
}  // namespace sslfast
