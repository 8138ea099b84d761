// What runs the kernels. nvcc: a launch on a stream. Any other C++ compiler:
// tests/kernels/cuda_source/simt/simt.h, which has the same names and runs the same kernels on the
// CPU, cluster after cluster.
//
// A .cu keeps its kernels in an inline namespace of its own: the mangled name of an anonymous one
// holds the path of the build folder, and the same sources would give other bytes elsewhere.
//
// Few headers of the standard library: nvcc reads a .cu once for the host and once for each kind of
// PTX, and <map>, <mutex>, <stdexcept> and <string> took two of the three CPU seconds that a short
// one needs.
#pragma once
#include <pthread.h>

#include <cstdint>
#include <cstdio>
#include <exception>

namespace nitp {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kMaxCluster = 8;  // blocks, on every device that has clusters

// What a multiprocessor gives: the threads and the bytes of shared memory that one block may ask
// for, and the bytes that all its blocks share.
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

// What the blocks of a cluster send to one of them, each its message, and what counts their bytes.
template <class M>
struct Inbox {
  static_assert(sizeof(M) % 16 == 0, "sent by 16 bytes");
  alignas(16) M from[kMaxCluster];
  uint64_t barrier;
};

// Why a kernel is not launched.
class Failure : public std::exception {
  char what_[256];

 public:
  explicit Failure(const char* what, const char* why = nullptr) {
    std::snprintf(what_, sizeof what_, "nitp_ops row kernel: %s%s%s", what, why ? ": " : "",
                  why ? why : "");
  }
  const char* what() const noexcept override { return what_; }
};

// Values that the driver is asked for once per device and key: later launches make no call. Host
// threads take turns. The entries live as long as the process: threads may still launch while it
// ends.
template <class Key, class Value>
class DriverCache {
  struct Entry {
    int device;
    Key key;
    Value value;
    const Entry* earlier;
  };
  struct Lock {
    pthread_mutex_t& mutex;
    explicit Lock(pthread_mutex_t& mutex) : mutex(mutex) { pthread_mutex_lock(&mutex); }
    ~Lock() { pthread_mutex_unlock(&mutex); }
  };
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  const Entry* latest_ = nullptr;

 public:
  template <class Query>
  Value get(int device, const Key& key, Query query) {
    const Lock lock(mutex_);
    const Entry* entry = latest_;
    while (entry && !(entry->device == device && entry->key == key)) entry = entry->earlier;
    if (!entry) entry = latest_ = new Entry{device, key, query(), latest_};
    return entry->value;
  }
};

}  // namespace cuda
}  // namespace nitp

#ifdef __CUDACC__
namespace nitp {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken, so that the next call does not report it once more
  throw Failure(what, cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "no current device");
  return device;
}

inline Multiprocessor multiprocessor() {
  static DriverCache<int, Multiprocessor> cache;
  const int device = current_device();
  return cache.get(device, 0, [&] {
    const auto attribute_of = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
      return value;
    };
    return Multiprocessor{attribute_of(cudaDevAttrMaxThreadsPerBlock),
                          attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                          attribute_of(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  });
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

// Begins to copy a pack of 16 bytes from global memory to the block's shared memory, without a
// register in between: all packs of a row can be under way at once. The thread that began it sees
// it after wait_for_copies.
template <class P>
__device__ void begin_copy(P* to, const void* from) {
  static_assert(sizeof(P) == 16, "one pack");
  const unsigned there = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const auto address = __cvta_generic_to_global(from);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(there), "l"(address) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// More than 48 KB of shared memory, or the larger share of the first-level cache, is opt-in: once
// per kernel and device, for as much as a block can have. The setting holds for all host threads,
// so one for the bytes of a single launch would let another thread's launch fail.
inline void allow(const void* kernel, int64_t shared_bytes) {
  if (shared_bytes == 0) return;
  static DriverCache<const void*, bool> cache;
  cache.get(current_device(), kernel, [&] {
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, kernel), "kernel attributes");
    const int most =
        static_cast<int>(multiprocessor().shared_of_block) - static_cast<int>(code.sharedSizeBytes);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most),
          "shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                               cudaSharedmemCarveoutMaxShared),
          "shared memory");
    return true;
  });
}

// How many blocks of this size a cluster of the kernel can have, at most kMaxCluster. 1 where it is
// code for sm_80, which has no clusters: also on a later device that translates the PTX of
// compute_80.
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
void launch(void (*kernel)(Arguments...), Blocks blocks, int threads, int64_t shared_bytes,
            void* stream, Arguments... arguments) {
  if (blocks.count > INT32_MAX) throw Failure("more blocks than a grid has");
  allow(reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchAttribute shape{};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim.x = blocks.of_cluster, shape.val.clusterDim.y = 1,
  shape.val.clusterDim.z = 1;
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
