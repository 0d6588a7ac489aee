// The fibres of a block, and who runs next. This file is compiled without instrumentation; what the sanitizers must
// know of it is said through sanitizers.h.
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator.h"
#include "sanitizers.h"

namespace emulator {

dim3 thread_idx, block_idx, block_dim, grid_dim;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024, kMostBlocks = 0x7fffffff, kMostRows = 65535;  // along x, and along y and z

enum class Order { kForward, kReverse, kRandom };

Order order = Order::kForward;
std::mt19937 random_numbers;

template <typename T>
void arrange(std::vector<T>& turns) {
  std::iota(turns.begin(), turns.end(), T{0});
  if (order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  if (order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), random_numbers);
}

// ------------------------------------------------------------------------------------------------ a block's threads

enum class State { kReady, kAtBlock, kAtWarp, kDone };

struct Thread {
  State state = State::kReady;
  const char* function = "";  // in which it waits
  std::source_location site;
  unsigned lanes = 0;
  bool flag = false;
  uint64_t given = 0;
};

// What a barrier orders, for ThreadSanitizer: two addresses in turn, for a thread may be at the next barrier before
// another has left this one.
struct Barrier {
  char phase[2];
  int turn = 0;
};

struct Warp {
  uint64_t given[kWarp] = {};
  Barrier barrier;
};

struct Free {
  std::align_val_t alignment;
  void operator()(char* bytes) const { ::operator delete[](bytes, alignment); }
};

struct SharedArray {
  const void* owner;
  size_t bytes;
  std::unique_ptr<char[], Free> memory;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<SharedArray> arrays;
  Barrier barrier;
  int flags = 0;  // that were set at the last barrier

  explicit Block(unsigned count) : threads(count), warps((count + kWarp - 1) / kWarp) {}
};

// ------------------------------------------------------------------------------------------------------------- fibres

// Where a stack is left and entered again. Not by swapcontext(), which asks the system for the signals it masks: that
// would be most of the time.
using Place = void* [5];  // what the compiler's setjmp keeps

// Opaque to the compiler: what happens meanwhile is not for it to guess.
[[gnu::noipa]] void go_to(Place& place) { __builtin_longjmp(place, 1); }
[[gnu::noipa]] void exchange(Place& from, Place& to) {
  if (__builtin_setjmp(from) == 0) go_to(to);
}
[[gnu::noipa]] void begin(Place& from, ucontext_t& to) {
  if (__builtin_setjmp(from) == 0) setcontext(&to);
}

struct Fibre {
  Place place;
  std::unique_ptr<char[]> memory = std::make_unique_for_overwrite<char[]>(kStackBytes);
  Stack stack{memory.get(), kStackBytes};

  Fibre() { stack.create(); }
  ~Fibre() { stack.destroy(); }
  Fibre(const Fibre&) = delete;
};

// What runs now. One launch at a time, on one thread of the CPU.
struct Running {
  const char* kernel = "";
  Launch launch;
  const std::function<void()>* body = nullptr;
  std::unique_ptr<Block> block;
  unsigned thread = 0;
  Fibre* fibre = nullptr;
  std::exception_ptr error;
  char begin, end, fence;  // where memory is ordered
} running;

std::vector<std::unique_ptr<Fibre>> fibres;
Place scheduler;
Stack scheduler_stack;

// From a fibre; returns when it is its turn again.
void to_scheduler() {
  Fibre& me = *running.fibre;
  leave(me.stack, scheduler_stack);
  exchange(me.place, scheduler);
  arrived(me.stack, scheduler_stack);
}

void to_fibre(Fibre& fibre) {
  running.fibre = &fibre;
  leave(scheduler_stack, fibre.stack);
  exchange(scheduler, fibre.place);
  arrived(scheduler_stack, fibre.stack);
}

// A fibre's life: one thread of a kernel after another.
void enter() {
  arrived(running.fibre->stack, scheduler_stack);
  for (;;) {
    to_scheduler();
    acquire(&running.begin);
    try {
      (*running.body)();
    } catch (...) {
      running.error = std::current_exception();
    }
    release(&running.end);
    running.block->threads[running.thread].state = State::kDone;
  }
}

void add_fibre() {
  running.fibre = fibres.emplace_back(std::make_unique<Fibre>()).get();
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = running.fibre->memory.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  leave(scheduler_stack, running.fibre->stack);
  begin(scheduler, context);
  arrived(scheduler_stack, running.fibre->stack);
}

// ------------------------------------------------------------------------------------------------------------- errors

std::string text(const dim3& d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

dim3 place_of(uint64_t n, const dim3& size) {
  return dim3(static_cast<unsigned>(n % size.x), static_cast<unsigned>(n / size.x % size.y),
              static_cast<unsigned>(n / size.x / size.y));
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(std::string("CUDA emulator: ") + running.kernel + ": " + what);
}

std::string what_of(unsigned t) {
  const Thread& thread = running.block->threads[t];
  const std::string who = "thread " + text(place_of(t, block_dim));
  if (thread.state == State::kDone) return who + " has left the kernel";
  return who + " waits in " + thread.function + " at " + thread.site.file_name() + ":" +
         std::to_string(thread.site.line());
}

[[noreturn]] void fail_apart(unsigned a, unsigned b) {
  fail("block " + text(block_idx) + ": threads wait at different barriers: " + what_of(a) + ", " + what_of(b));
}

void check_together(unsigned a, unsigned b) {
  const Thread &one = running.block->threads[a], &other = running.block->threads[b];
  const auto same = [](const std::source_location& x, const std::source_location& y) {
    return x.line() == y.line() && x.column() == y.column() && std::strcmp(x.file_name(), y.file_name()) == 0;
  };
  if (one.state != other.state || !same(one.site, other.site)) fail_apart(a, b);
}

void check_launch(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const auto allowed = [](unsigned count, unsigned most) { return count > 0 && count <= most; };
  const bool blocks = allowed(grid.x, kMostBlocks) && allowed(grid.y, kMostRows) && allowed(grid.z, kMostRows);
  if (!blocks || threads == 0 || threads > kMostThreads || block.z > 64) {
    fail("a launch of " + text(grid) + " blocks of " + text(block) + " threads is not allowed");
  }
  if (launch.shared > kSharedBytes) fail(std::to_string(launch.shared) + " bytes of shared memory are too many");
}

// ----------------------------------------------------------------------------------------------------------- barriers

// Lets a warp go on if all of its lanes that are left wait for it.
bool release_warp(Block& block, unsigned w) {
  const unsigned begin = w * kWarp, end = std::min<unsigned>(begin + kWarp, block.threads.size());
  unsigned waiting = 0, first = end;
  for (unsigned t = begin; t < end; ++t) {
    const State state = block.threads[t].state;
    if (state != State::kAtWarp && state != State::kDone) return false;
    waiting += state == State::kAtWarp;
    if (state == State::kAtWarp) first = std::min(first, t);
  }
  if (waiting == 0) return false;
  for (unsigned t = begin; t < end; ++t) check_together(first, t);
  Warp& warp = block.warps[w];
  for (unsigned t = begin; t < end; ++t) {
    Thread& thread = block.threads[t];
    if (thread.lanes != ~0u || waiting < kWarp) fail(what_of(t) + ", not for a whole warp: that is not emulated");
    warp.given[t - begin] = thread.given;
    thread.state = State::kReady;
  }
  warp.barrier.turn ^= 1;
  return true;
}

bool release_block(Block& block) {
  for (const Thread& thread : block.threads) {
    if (thread.state != State::kAtBlock && thread.state != State::kDone) return false;
  }
  const auto waits = [](const Thread& t) { return t.state == State::kAtBlock; };
  const auto first = std::find_if(block.threads.begin(), block.threads.end(), waits);
  if (first == block.threads.end()) return false;
  block.flags = 0;
  for (unsigned t = 0; t < block.threads.size(); ++t) {
    check_together(static_cast<unsigned>(first - block.threads.begin()), t);
    block.flags += block.threads[t].flag;
  }
  for (Thread& thread : block.threads) thread.state = State::kReady;
  block.barrier.turn ^= 1;
  return true;
}

// Waits in `state`; with a barrier, what it orders is ordered.
void wait(State state, const char* function, const std::source_location& site, Barrier* barrier) {
  Thread& me = running.block->threads[running.thread];
  me.state = state;
  me.function = function;
  me.site = site;
  char* const phase = barrier ? &barrier->phase[barrier->turn] : nullptr;
  if (phase) release(phase);
  to_scheduler();
  if (phase) acquire(phase);
}

// ------------------------------------------------------------------------------------------------ blocks and launches

// The threads of a warp that can run, until each of them waits or is done; whether there were any.
bool run_warp(Block& block, unsigned w, uint64_t number) {
  const auto count = static_cast<unsigned>(block.threads.size()), begin = w * kWarp;
  std::vector<unsigned> lanes(std::min(kWarp, count - begin));
  arrange(lanes);
  bool moved = false;
  for (unsigned lane : lanes) {
    const unsigned t = begin + lane;
    if (block.threads[t].state != State::kReady) continue;
    moved = true;
    running.thread = t;
    thread_idx = place_of(t, block_dim);
    // Another fibre for a thread of this number in each block: what one fibre does is in order for ThreadSanitizer.
    to_fibre(*fibres[(t + number) % count]);
    if (running.error) std::rethrow_exception(running.error);
  }
  return release_warp(block, w) || moved;
}

// Warp by warp, each as far ahead of the others as it gets; in random order it may stop before.
void run_warps(Block& block, uint64_t number) {
  const auto goes_on = [] { return order != Order::kRandom || random_numbers() % 8 != 0; };
  std::vector<unsigned> turns(block.warps.size());
  for (bool left = true; left;) {
    bool moved = false;
    arrange(turns);
    for (unsigned w : turns) {
      while (run_warp(block, w, number)) {
        moved = true;
        if (!goes_on()) break;
      }
    }
    moved = release_block(block) || moved;
    left = false;
    for (const Thread& thread : block.threads) left = left || thread.state != State::kDone;
    if (moved || !left) continue;
    for (unsigned t = 1; t < block.threads.size(); ++t) check_together(0, t);
  }
}

void run_block(uint64_t number) {
  block_idx = place_of(number, grid_dim);
  {
    const Unwatched belongs_to_no_thread;
    running.block = std::make_unique<Block>(block_dim.x * block_dim.y * block_dim.z);
  }
  run_warps(*running.block, number);
  const Unwatched belongs_to_no_thread;
  running.block.reset();
}

}  // namespace

void run(const char* kernel, const Launch& launch, const std::function<void()>& thread) {
  running = {};
  running.kernel = kernel;
  running.launch = launch;
  running.body = &thread;
  check_launch(launch);
  grid_dim = launch.grid;
  block_dim = launch.block;
  scheduler_stack.is_current();
  while (fibres.size() < block_dim.x * block_dim.y * block_dim.z) add_fibre();
  release(&running.begin);
  std::vector<uint64_t> turns(uint64_t{grid_dim.x} * grid_dim.y * grid_dim.z);
  arrange(turns);
  try {
    for (uint64_t number : turns) run_block(number);
  } catch (...) {
    fibres.clear();  // some are in the middle of a kernel
    throw;
  }
  acquire(&running.end);
}

unsigned thread_number() { return running.thread; }

int wait_for_block(const char* name, const std::source_location& site, bool flag) {
  Block& block = *running.block;
  block.threads[running.thread].flag = flag;
  wait(State::kAtBlock, name, site, &block.barrier);
  return block.flags;
}

const uint64_t* wait_for_warp(const char* name, const std::source_location& site, unsigned lanes, uint64_t given,
                              bool ordered) {
  Block& block = *running.block;
  Thread& me = block.threads[running.thread];
  Warp& warp = block.warps[running.thread / kWarp];
  me.lanes = lanes;
  me.given = given;
  wait(State::kAtWarp, name, site, ordered ? &warp.barrier : nullptr);
  return warp.given;
}

void fence() {
  release(&running.fence);
  acquire(&running.fence);
}

void* shared_memory(const void* owner, size_t bytes, size_t alignment) {
  auto& arrays = running.block->arrays;
  size_t used = owner == &running ? 0 : running.launch.shared;
  for (const SharedArray& array : arrays) {
    if (array.owner == owner) return array.memory.get();
    if (array.owner != &running) used += array.bytes;
  }
  if (used + bytes > kSharedBytes) fail(std::to_string(used + bytes) + " bytes of shared memory are too many");
  const Unwatched belongs_to_no_thread;
  const auto aligned = std::align_val_t{std::max<size_t>(alignment, 16)};
  auto* memory = static_cast<char*>(::operator new[](bytes, aligned));
  std::memset(memory, 0xff, bytes);
  arrays.push_back({owner, bytes, {memory, Free{aligned}}});
  return memory;
}

void* dynamic_shared_memory() { return shared_memory(&running, running.launch.shared, 16); }

}  // namespace emulator

// For __init__.py.
extern "C" __attribute__((visibility("default"))) void emulator_set_order(int value, unsigned seed) {
  emulator::order = static_cast<emulator::Order>(value);
  emulator::random_numbers.seed(seed);
}
