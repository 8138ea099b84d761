// Reductions over the lanes of a warp, the warps of a block and the blocks of a cluster, by butterflies: every lane
// ends with the same bits, and the order of additions depends on the number of threads and blocks alone.
#pragma once
#include "../host_device.h"
#include "launch.h"

namespace nitp {
namespace cuda {

constexpr int kWarp = 32;

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
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value = merge(value, shuffle_xor(value, lanes));
  return value;
}

template <class A>
__device__ A warp_sum(A value) {
  return warp_merge(value, [](A a, A b) { return a + b; });
}

// What one lane of every warp leaves in shared memory and every warp merges again, behind one barrier.
template <class V, class WarpMerge>
__device__ V block_merge(V value, V none, V (&partials)[kWarp], WarpMerge warp_merge) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  value = warp_merge(value);
  if (lane == 0) partials[threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_merge(lane < warps ? partials[lane] : none);
}

// Who takes a row together: one block, or the blocks of a cluster. of(rank, here) is what stands at `here` in the
// shared memory of the block of that rank; kCompiled: the code may have the instructions for it.
struct OneBlock {
  static constexpr bool kCompiled = true, kAlone = true;
  static __device__ int size() { return 1; }
  static __device__ int rank() { return 0; }
  static __device__ void sync() { __syncthreads(); }
  template <class S>
  static __device__ const S& of(int, S& here) {
    return here;
  }
};

struct Cluster {
  static constexpr bool kCompiled = kClusters, kAlone = false;
  static __device__ int size() { return cluster_size(); }
  static __device__ int rank() { return cluster_rank(); }
  static __device__ void sync() { cluster_sync(); }
  template <class S>
  static __device__ S of(int rank, S& here) {  // a copy: what is far is read once
    return peer(here, rank);
  }
};

// What every block leaves in `whole` and every warp of every block merges again, behind one barrier of the team. No
// block may end before another barrier: its peers may still read.
template <class Team, class V, class WarpMerge>
__device__ V team_merge(V value, V none, V& whole, WarpMerge warp_merge) {
  if constexpr (Team::kAlone) {
    return value;
  } else {
    if (threadIdx.x == 0) whole = value;
    Team::sync();
    const int lane = threadIdx.x % kWarp;
    return warp_merge(lane < Team::size() ? Team::of(lane, whole) : none);
  }
}

}  // namespace cuda
}  // namespace nitp
