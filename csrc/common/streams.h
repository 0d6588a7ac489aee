// Which random numbers are for what: the table of sslfast/_random/streams.py, as far as C++ draws.
#pragma once
#include <cstdint>

namespace sslfast {

inline constexpr uint32_t kFirstStream = 1u << 15;  // views of images are the streams below
inline constexpr uint32_t kStreamsOfEach = 1u << 10;

constexpr uint32_t stream_of_each_view(uint32_t group) { return kFirstStream + group * kStreamsOfEach; }

inline constexpr uint32_t kRandomMaskStream = stream_of_each_view(1);
inline constexpr uint32_t kBlockMaskStream = stream_of_each_view(2);
inline constexpr uint32_t kMultiblockMaskStream = stream_of_each_view(3);
inline constexpr uint32_t kTokenSelectionStream = stream_of_each_view(4);
inline constexpr uint32_t kTokenReplacementStream = stream_of_each_view(5);
inline constexpr uint32_t kSlicesStream = stream_of_each_view(8);

}  // namespace sslfast
