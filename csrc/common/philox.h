// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four random words for every
// 128-bit counter under a 64-bit key. No state, so the same numbers come out on every device and in any order.
#pragma once
#include "half.h"

namespace sslfast {

struct Philox4 {
  uint32_t word[4];
};

SSLFAST_INLINE Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t high0 = static_cast<uint32_t>(p0 >> 32), high1 = static_cast<uint32_t>(p1 >> 32);
    c0 = high1 ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = high0 ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;  // the golden ratio
    k1 += 0xBB67AE85u;  // √3 − 1
  }
  return {{c0, c1, c2, c3}};
}

// Who draws: counter = (block | view << 16, epoch, sample id), key = seed. A block is four words.
struct Stream {
  uint64_t seed;
  uint64_t sample;
  uint32_t epoch;
  uint32_t view;  // below 2^16
};

SSLFAST_INLINE Philox4 draw(const Stream& s, uint32_t block) {
  return philox4x32(block | s.view << 16, s.epoch, static_cast<uint32_t>(s.sample),
                    static_cast<uint32_t>(s.sample >> 32), static_cast<uint32_t>(s.seed),
                    static_cast<uint32_t>(s.seed >> 32));
}

// A word as a number in [0, 1), exact in double.
SSLFAST_INLINE double unit(uint32_t word) { return word * 0x1p-32; }

}  // namespace sslfast
