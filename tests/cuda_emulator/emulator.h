// Running a CUDA kernel on the CPU. A block is a set of fibres on one thread of the CPU, which run in a chosen order
// from barrier to barrier; blocks run one after another, in a chosen order too. A kernel that is right gives the same
// bits in every order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <tuple>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = void*;

namespace emulator {

constexpr size_t kSharedBytes = 48 << 10;  // what a block has without asking for more

extern dim3 thread_idx, block_idx, block_dim, grid_dim;

struct Launch {
  dim3 grid, block;
  size_t shared;  // bytes of the dynamic array
};

// Throws std::runtime_error, naming the kernel, where a GPU would refuse the launch or wait forever.
void run(const char* kernel, const Launch& launch, const std::function<void()>& thread);

// kernel<<<grid, block, shared, stream>>>(arguments...): these are evaluated once, and copied for every thread.
inline Launch configured(dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = nullptr) {
  return {grid, block, shared};
}
template <typename Kernel, typename... Arguments>
void launch(const char* name, const Launch& launch, Kernel kernel, Arguments... arguments) {
  run(name, launch, [&] { kernel(arguments...); });
}

// Within a block, x fastest.
unsigned thread_number();

// Waits until all threads of the block call it from the same place; how many of them gave a `flag` that is set.
int wait_for_block(const char* name, const std::source_location& site, bool flag);

// Waits until all lanes of the warp call it from the same place, and returns what each of them gave, until the next
// call. `ordered`: what a lane wrote to memory before is there for the others after.
const uint64_t* wait_for_warp(const char* name, const std::source_location& site, unsigned lanes, uint64_t given,
                              bool ordered);

// What threads wrote before their call is there for those that call it later.
void fence();

// A block's memory that `owner` stands for, new to each block, all bits set.
void* shared_memory(const void* owner, size_t bytes, size_t alignment);
void* dynamic_shared_memory();

template <typename T>
T& shared(const void* owner) {
  return *static_cast<T*>(shared_memory(owner, sizeof(T), alignof(T)));
}
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}

}  // namespace emulator
