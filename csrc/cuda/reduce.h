// Reductions over the lanes of a warp, the warps of a block and the blocks of a cluster, by
// butterflies: every lane ends with the same bits, and the order of additions depends on the number
// of threads and blocks alone.
#pragma once
#include "../host_device.h"
#include "cluster.h"

namespace nitp {
namespace cuda {

template <class V>
__device__ V shuffle_xor(const V& value, int lanes) {
  static_assert(sizeof(V) % sizeof(uint32_t) == 0, "shuffled word by word");
  uint32_t words[sizeof(V) / sizeof(uint32_t)];
  memcpy(words, &value, sizeof(V));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, lanes);
  V other;
  memcpy(&other, words, sizeof(V));
  return other;
}

template <class V, class Merge>
__device__ V warp_merge(V value, Merge merge) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = merge(value, shuffle_xor(value, lanes));
  }
  return value;
}

template <class A>
__device__ A warp_sum(A value) {
  return warp_merge(value, [](A a, A b) { return a + b; });
}

// What one lane of every warp leaves in shared memory and every warp merges again, behind one
// barrier.
template <class V, class WarpMerge>
__device__ V block_merge(V value, V none, V (&partials)[kWarp], WarpMerge warp_merge) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  value = warp_merge(value);
  if (lane == 0) partials[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_merge(lane < warps ? partials[lane] : none);
}

// The team of a row: one block, or the blocks of a cluster. kCompiled: the code may have the
// instructions for it.
struct OneBlock {
  static constexpr bool kCompiled = true, kAlone = true;
  template <class M>
  struct Mail {};
  static __device__ int size() { return 1; }
  static __device__ int rank() { return 0; }
};

struct Cluster {
  static constexpr bool kCompiled = kClusters, kAlone = false;
  template <class M>
  using Mail = Inbox<M>;
  static __device__ int size() { return cluster_size(); }
  static __device__ int rank() { return cluster_rank(); }
};

// One message from each block to every block of its team, in turns: before anything else the blocks
// open their inboxes, then each sends, and every warp of each merges them all, lane by lane in the
// order of the ranks: all have the same bits. The blocks of a cluster exchange nothing else:
//
// * open_inbox initialises the mbarrier that counts the bytes of an inbox and releases that to the
// cluster
//   (fence.mbarrier_init, a relaxed arrival at the cluster's barrier); inboxes_are_open acquires
//   it. So no message reaches a barrier that is not initialised, and every block has begun.
// * A message lies in the sender's registers. st.async stores it and then completes its bytes at
// the mbarrier of the
//   same inbox with release semantics at cluster scope; await_messages acquires that phase at
//   cluster scope. So a block that has waited reads whole messages.
// * The phase ends with the last byte for the inbox, and a block waits for it before it ends:
// nothing is stored into
//   the memory of a block that has ended. No block reads another's memory, so none waits for its
//   readers.
//
// A message releases nothing else of its sender. A row must not need it: of a row's memory each
// block reads and writes what is its own alone (its columns, what it found of the targets in them),
// and what no block writes.
template <class Team, class M>
__device__ void open(typename Team::template Mail<M>& mail) {
  if constexpr (!Team::kAlone) open_inbox(mail);
}

template <class Team, class M, class WarpMerge>
__device__ M exchange(typename Team::template Mail<M>& mail, const M& message, const M& none,
                      WarpMerge warp_merge) {
  if constexpr (Team::kAlone) {
    return message;
  } else {
    inboxes_are_open();
    if (static_cast<int>(threadIdx.x) < Team::size()) send(mail, message, threadIdx.x);
    await_messages(mail);
    const int lane = threadIdx.x % kWarp;
    return warp_merge(lane < Team::size() ? mail.from[lane] : none);
  }
}

}  // namespace cuda
}  // namespace nitp
