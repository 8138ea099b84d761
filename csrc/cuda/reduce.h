// Reductions over the lanes of a warp and the warps of a block, by butterflies: every lane ends with the same bits, and
// the order of additions depends on the number of threads alone.
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

}  // namespace cuda
}  // namespace nitp
