// Runs CUDA kernels on the CPU: every thread of a block is a fiber with a stack of its own, blocks follow one another.
//
// A fiber runs until it meets a barrier or a shuffle, then the next one does. In which order is a setting: a kernel
// that lacks a barrier gives other results in another order. Shared memory starts as NaN in every block, and ends where
// the launch says (AddressSanitizer then sees an access beyond). Threads that wait for others which never come are an
// error.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
extern thread_local Index threadIdx, blockIdx, blockDim;

namespace nitp {
namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kPoison = 0xff;  // a NaN in every floating-point type

// What tests choose: the order in which the fibers of a block run, and how much shared memory a device seems to have.
struct Settings {
  enum Order : int64_t { forward, backward, shuffled } order = forward;
  int64_t shared_bytes = 227 * 1024;
};
extern Settings settings;

// Threads that wait for one another: a warp or a block. Passing twice is safe, because nobody passes the second time
// before everybody has arrived there, and so has left the first.
struct Meeting {
  int members = 0, arrived = 0;
  int64_t round = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  unsigned index = 0;
  Meeting* waits_for = nullptr;
  int64_t round = 0;
  bool done = false;
};

struct Warp {
  Meeting meeting;
  uint32_t slots[2][kWarpSize];  // of this shuffle and of the one before, which some lanes may still read
};

// A kernel's static shared memory; every block finds it poisoned.
struct StaticShared {
  size_t size;
  std::unique_ptr<char[]> bytes;
  explicit StaticShared(size_t size);
  void poison();
};

class Block {
 public:
  Block(int threads, int64_t shared_bytes, std::function<void()> body);
  void run(unsigned index);
  void meet(Meeting& meeting);
  uint32_t shuffle(uint32_t word, int lane);
  void* shared() { return shared_.get(); }
  Meeting all;

 private:
  static void enter();
  std::vector<unsigned> order();
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::unique_ptr<char[]> shared_;
  int64_t shared_bytes_;
  std::function<void()> body_;
  ucontext_t scheduler_;
  Fiber* now_ = nullptr;
  std::mt19937 random_;
};
extern Block* block;

}  // namespace simt

namespace cuda {

struct SharedMemory {
  int64_t block, multiprocessor;
};
inline SharedMemory shared_memory() { return {simt::settings.shared_bytes, simt::settings.shared_bytes}; }

template <class S>
S& shared() {
  static simt::StaticShared memory(sizeof(S));
  return *reinterpret_cast<S*>(memory.bytes.get());
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(simt::block->shared());
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, int64_t shared_bytes, void*,
            Arguments... arguments) {
  if (threads % simt::kWarpSize != 0 || threads > 1024) throw std::runtime_error("simt: no such block");
  simt::Block block(threads, shared_bytes, [&] { kernel(arguments...); });
  for (int64_t i = 0; i < blocks; ++i) block.run(static_cast<unsigned>(i));
}

}  // namespace cuda
}  // namespace nitp

inline void __syncthreads() { nitp::simt::block->meet(nitp::simt::block->all); }
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t word, int lanes) {
  if (mask != 0xffffffffu) throw std::runtime_error("simt: every lane takes part in a shuffle");
  return nitp::simt::block->shuffle(word, static_cast<int>(threadIdx.x % nitp::simt::kWarpSize) ^ lanes);
}
