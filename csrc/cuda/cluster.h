// What a block tells the others of its cluster: a message into the inbox of each.
// tests/kernels/cuda_source/simt/simt.h has the same functions for the CPU.
#pragma once
#include "launch.h"

#ifdef __CUDACC__
namespace nitp {
namespace cuda {

// Whether the code that is being compiled may have the instructions of clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

__device__ inline int cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

__device__ inline int cluster_size() {
  unsigned blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}

// The same address in the shared memory of another block of the cluster.
__device__ inline uint32_t shared_of(const void* here, int rank) {
  uint32_t there = static_cast<uint32_t>(__cvta_generic_to_shared(here));
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(there) : "r"(rank));
#endif
  return there;
}

// All threads, before anything is sent: the inbox waits for a message of every block.
// inboxes_are_open: those of all blocks do.
template <class M>
__device__ void open_inbox(Inbox<M>& inbox) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&inbox.barrier));
    const uint32_t bytes = cluster_size() * sizeof(M);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
  }
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ inline void inboxes_are_open() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// One thread: this block's message to the block of that rank.
template <class M>
__device__ void send(Inbox<M>& inbox, const M& message, int rank) {
#if __CUDA_ARCH__ >= 900
  const uint32_t there = shared_of(inbox.from + cluster_rank(), rank);
  const uint32_t barrier = shared_of(&inbox.barrier, rank);
  uint32_t w[sizeof(M) / sizeof(uint32_t)];
  memcpy(w, &message, sizeof(M));
#pragma unroll
  for (unsigned i = 0; i < sizeof(M) / 16; ++i) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(there + 16 * i),
        "r"(w[4 * i]), "r"(w[4 * i + 1]), "r"(w[4 * i + 2]), "r"(w[4 * i + 3]), "r"(barrier)
        : "memory");
  }
#endif
}

// Waits for the message of every block; once only.
template <class M>
__device__ void await_messages(Inbox<M>& inbox) {
#if __CUDA_ARCH__ >= 900
  const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&inbox.barrier));
  uint32_t complete = 0;
  while (!complete) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(complete)
        : "r"(barrier)
        : "memory");
  }
#endif
}

}  // namespace cuda
}  // namespace nitp
#endif
