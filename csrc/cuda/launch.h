// The seam between the kernels and what runs them. nvcc: a launch on a stream. Any other C++ compiler:
// tests/simt/simt.h, which has the same names and runs the same kernels on the CPU, cluster after cluster.
//
// A .cu keeps its kernels in an inline namespace of its own: the mangled name of an anonymous one holds the path of the
// build folder, and the same sources would give other bytes elsewhere.
#pragma once
#include <cstdint>

namespace nitp {
namespace cuda {

constexpr int kMaxCluster = 8;  // blocks, on every device that has clusters

// What a multiprocessor gives: the threads and the bytes of shared memory that one block may ask for, and the bytes
// that all its blocks share.
struct Multiprocessor {
  int threads_of_block;
  int64_t shared_of_block, shared;
};

// The blocks of a launch, of which each `of_cluster` that follow one another are a cluster.
struct Blocks {
  int64_t count;
  int of_cluster;
  Blocks(int64_t count, int of_cluster = 1) : count(count), of_cluster(of_cluster) {}
};

}  // namespace cuda
}  // namespace nitp

#ifdef __CUDACC__
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace nitp {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken, so that the next call does not report it once more
  throw std::runtime_error(std::string("nitp_ops row kernel: ") + what + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}

inline Multiprocessor multiprocessor() {
  return {device_attribute(cudaDevAttrMaxThreadsPerBlock), device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

// One S in the block's shared memory, where no constructor runs.
template <class S>
__device__ S& shared() {
  alignas(S) __shared__ unsigned char memory[sizeof(S)];
  return *reinterpret_cast<S*>(memory);
}

template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Begins to copy a pack of 16 bytes from global memory to the block's shared memory, without a register in between: all
// packs of a row can be under way at once. The thread that began it sees it after wait_for_copies.
template <class P>
__device__ void begin_copy(P* to, const void* from) {
  static_assert(sizeof(P) == 16, "in one piece");
  const unsigned there = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const auto address = __cvta_generic_to_global(from);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(there), "l"(address) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

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

// A barrier of all threads of all blocks of the cluster, of global and shared memory.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What stands at this place of shared memory in another block of the cluster, which must have begun and not ended.
template <class S>
__device__ S& peer(S& here, int rank) {
  S* there = &here;
#if __CUDA_ARCH__ >= 900
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(&here), "r"(rank));
#endif
  return *there;
}

// More than 48 KB of shared memory, or the larger share of the first-level cache, only on request: once per kernel and
// device, for as much as a block can have. The request holds for all host threads, so one for the bytes of a launch
// would let another thread's launch fail.
inline void allow(const void* kernel, int64_t shared_bytes) {
  if (shared_bytes == 0) return;
  static std::mutex one_at_a_time;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "no current device");
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (allowed.count({device, kernel})) return;
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, kernel), "kernel attributes");
  const int most = static_cast<int>(multiprocessor().shared_of_block) - static_cast<int>(code.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory");
  allowed.insert({device, kernel});
}

// How many blocks of this size a cluster of the kernel can have, at most kMaxCluster. 1 where it is code for sm_80,
// which has no clusters: also on a later device that translates the PTX of compute_80.
template <class... Arguments>
int largest_cluster(void (*kernel)(Arguments...), int threads, int64_t shared_bytes) {
  cudaFuncAttributes code;
  check(cudaFuncGetAttributes(&code, kernel), "kernel attributes");
  if (code.ptxVersion < 90) return 1;
  allow(reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = kMaxCluster, config.blockDim = threads, config.dynamicSmemBytes = shared_bytes;
  int blocks = 0;  // fewer on a slice of a device
  check(cudaOccupancyMaxPotentialClusterSize(&blocks, kernel, &config), "cluster size");
  return blocks < kMaxCluster ? blocks : kMaxCluster;
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), Blocks blocks, int threads, int64_t shared_bytes, void* stream,
            Arguments... arguments) {
  if (blocks.count > INT32_MAX) throw std::runtime_error("nitp_ops row kernel: more blocks than a grid has");
  allow(reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = blocks.of_cluster, shape.val.clusterDim.y = 1, shape.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks.count), config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &shape, config.numAttrs = blocks.of_cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
}

}  // namespace cuda
}  // namespace nitp
#else
#include <simt.h>
#endif
