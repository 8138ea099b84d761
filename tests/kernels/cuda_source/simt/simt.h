// Runs CUDA kernels on the CPU: every thread of a cluster of blocks is a fiber with a stack of its
// own, clusters follow one another.
//
// A fiber runs until it meets a barrier or a shuffle, then the next one of its block does; a block
// runs until all its fibers wait, then the next one of its cluster does. In which order is a
// setting: a kernel that lacks a barrier gives other results in another order. Shared memory starts
// as NaN in every block, is NaN again when the block has ended, and ends where the launch says
// (AddressSanitizer then sees an access beyond). Threads that wait for others which never come are
// an error, and so is a message to a block whose inbox is not open or that has ended.
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

// What tests choose (each choice is another device): the order in which fibers and blocks run, and
// what a device seems to have: bytes of shared memory, blocks in a cluster (1: no clusters) and
// threads in a block.
struct Settings {
  enum Order : int64_t { forward, backward, shuffled } order = forward;
  int64_t shared_bytes = 227 * 1024, cluster = 1, threads = 1024;
};
extern Settings settings;
extern int device,
    questions;  // which of them it is, and how often a launch asked what a device has

// Threads that wait for one another: a warp, a block or a cluster. Passing twice is safe, because
// no thread passes the second time before everybody has arrived there, and so has left the first.
struct Meeting {
  int members = 0, arrived = 0;
  int64_t round = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<std::function<void()>> copies;  // begun, and done only once the thread waits for them
  Meeting* waits_for = nullptr;
  int64_t round = 0;
  bool done = false;
};

struct Warp {
  Meeting meeting;
  uint32_t slots[2][kWarpSize];  // of this shuffle and of the one before, which some lanes may
                                 // still read
};

// A kernel's static shared memory, a part for every block of a cluster.
struct StaticShared {
  size_t size;
  std::vector<std::unique_ptr<char[]>> of_block;
  explicit StaticShared(size_t size);
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting all;
  Meeting mail;  // of the messages; members: 0 until the inbox is open
  std::vector<std::function<void()>>
      messages;  // sent, and there only once somebody waits for all of them
  std::unique_ptr<char[]> shared;
  size_t done = 0;  // fibers
};

class Cluster {
 public:
  Cluster(int blocks, int threads, int64_t shared_bytes, std::function<void()> body);
  void run(unsigned first_block);
  void meet(Meeting& meeting);
  uint32_t shuffle(uint32_t word, int lane);
  void open_inbox();
  void send(const void* here, const void* message, size_t size,
            int rank);  // to the same address in another block
  void await_messages();
  [[noreturn]] void fail(const std::string& what);

  int size() const { return static_cast<int>(blocks_.size()); }
  int rank() const { return rank_; }
  Block& block() { return blocks_[rank_]; }
  Meeting all;

 private:
  static void enter();
  std::vector<unsigned> order(size_t count);
  bool run_block(unsigned rank, unsigned index);  // whether anything moved
  void poison(unsigned rank);
  void wait(Meeting& meeting, int64_t round);
  void* peer(const void* here, int rank);  // the same address in another block's shared memory
  std::vector<Block> blocks_;
  std::unique_ptr<char[]> stacks_;
  int64_t shared_bytes_;
  std::function<void()> body_;
  ucontext_t scheduler_;
  int rank_ = 0;
  std::string error_;
  std::mt19937 random_;
};
extern Cluster* cluster;  // that runs

}  // namespace simt

namespace cuda {

inline int current_device() { return simt::device; }

inline Multiprocessor multiprocessor() {
  ++simt::questions;
  const auto& s = simt::settings;
  return {static_cast<int>(s.threads), s.shared_bytes, s.shared_bytes};
}

template <class S>
S& shared() {
  static simt::StaticShared memory(sizeof(S));
  return *reinterpret_cast<S*>(memory.of_block[simt::cluster->rank()].get());
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(simt::cluster->block().shared.get());
}

template <class P>
void begin_copy(P* to, const void* from) {
  simt::cluster->block().fibers[threadIdx.x].copies.push_back(
      [=] { std::memcpy(to, from, sizeof(P)); });
}

inline void wait_for_copies() {
  auto& copies = simt::cluster->block().fibers[threadIdx.x].copies;
  for (const auto& copy : copies) copy();
  copies.clear();
}

constexpr bool kClusters = true;
inline int cluster_rank() { return simt::cluster->rank(); }
inline int cluster_size() { return simt::cluster->size(); }

template <class M>
void open_inbox(Inbox<M>&) {
  simt::cluster->open_inbox();
}
inline void inboxes_are_open() { simt::cluster->meet(simt::cluster->all); }
template <class M>
void send(Inbox<M>& inbox, const M& message, int rank) {
  simt::cluster->send(inbox.from + cluster_rank(), &message, sizeof(M), rank);
}
template <class M>
void await_messages(Inbox<M>&) {
  simt::cluster->await_messages();
}

template <class... Arguments>
int largest_cluster(void (*)(Arguments...), int, int64_t) {
  ++simt::questions;
  return static_cast<int>(simt::settings.cluster);
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), Blocks blocks, int threads, int64_t shared_bytes, void*,
            Arguments... arguments) {
  if (threads % simt::kWarpSize != 0 || threads > 1024) {
    throw std::runtime_error("simt: no such block");
  }
  if (blocks.of_cluster > kMaxCluster || blocks.count % blocks.of_cluster != 0) {
    throw std::runtime_error("simt: no such cluster");
  }
  simt::Cluster cluster(blocks.of_cluster, threads, shared_bytes, [&] { kernel(arguments...); });
  for (int64_t i = 0; i < blocks.count; i += blocks.of_cluster) {
    cluster.run(static_cast<unsigned>(i));
  }
}

}  // namespace cuda
}  // namespace nitp

inline void __syncwarp() {
  auto& block = nitp::simt::cluster->block();
  nitp::simt::cluster->meet(block.warps[threadIdx.x / nitp::simt::kWarpSize].meeting);
}
inline void __syncthreads() { nitp::simt::cluster->meet(nitp::simt::cluster->block().all); }
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t word, int lanes) {
  if (mask != 0xffffffffu) nitp::simt::cluster->fail("every lane takes part in a shuffle");
  return nitp::simt::cluster->shuffle(
      word, static_cast<int>(threadIdx.x % nitp::simt::kWarpSize) ^ lanes);
}
