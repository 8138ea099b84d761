// How many blocks of how many threads take a row of logits, and how much of it they keep in shared
// memory.
#pragma once
#include <algorithm>

#include "../pack.h"

namespace nitp {
namespace cuda {

constexpr int kMinRowThreads = 128;

struct Plan {
  int blocks, threads, in_shared;
  bool held;  // nothing is read again

  int64_t shared_bytes() const { return static_cast<int64_t>(in_shared) * threads * kPackBytes; }
};

// How `blocks` of so many threads take a row, if each multiprocessor has `resident` of them;
// `reserved` is a block's static part. Of a row that does not fit an even number of packs is held:
// they are taken by pairs.
inline Plan plan(const Multiprocessor& memory, int64_t packs, int in_registers, int64_t reserved,
                 int blocks, int threads, int resident) {
  constexpr int64_t kOfDriver = 1024;  // of each block
  const int64_t bytes =
      std::min(memory.shared_of_block, memory.shared / resident - kOfDriver) - reserved;
  const int64_t capacity = bytes > 0 ? bytes / (kPackBytes * threads) : 0;
  const int64_t of_block = (packs + blocks - 1) / blocks, each = (of_block + threads - 1) / threads;
  const int64_t wanted = each > in_registers ? each - in_registers : 0;
  return {blocks, threads, static_cast<int>(wanted <= capacity ? wanted : capacity / 2 * 2),
          wanted <= capacity};
}

// The smallest cluster that holds the row, in blocks that share their multiprocessor with others:
// while one waits for its peers or for memory, another computes. One block takes at most half of a
// multiprocessor's threads, those of a cluster a quarter, because the fewer they are the less they
// wait for one another; where that does not hold the row, clusters may have blocks of half, then of
// all. Three quarters of a multiprocessor's threads are enough to be busy. Time of 4096 bfloat16
// rows of 128256 columns on an H100, over that of a copy: 1.14 by one block, 1.17 by clusters of
// two of 512 threads, 1.12 by four of 256. Where no cluster holds the row, the largest: then the
// fewest rows are in flight, and the largest part of each is read once. largest(plan): how many
// such blocks a cluster can have.
template <class Largest>
Plan choose_plan(const Multiprocessor& memory, int64_t packs, int in_registers, int64_t reserved,
                 int max_threads, Largest largest) {
  const int most = std::min(max_threads, memory.threads_of_block);
  const auto by = [&](int blocks, int threads, int busy) {
    return plan(memory, packs, in_registers, reserved, blocks, threads,
                (busy + threads - 1) / threads);
  };
  const auto fits = [&](const Plan& p) { return p.blocks == 1 || p.blocks <= largest(p); };
  for (const int of_cluster : {most / 4, most / 2, most}) {
    for (int blocks = 1; blocks <= kMaxCluster; blocks *= 2) {
      for (const int busy : {most, most / 4 * 3}) {
        const int limit = blocks == 1 ? std::max(of_cluster, most / 2) : of_cluster;
        for (int threads = kMinRowThreads; threads <= limit; threads *= 2) {
          const Plan p = by(blocks, threads, busy);
          if (p.held && fits(p)) return p;
        }
      }
    }
  }
  int blocks = kMaxCluster;
  while (!fits(by(blocks, most, most))) blocks /= 2;
  return by(blocks, most, most);
}

}  // namespace cuda
}  // namespace nitp
