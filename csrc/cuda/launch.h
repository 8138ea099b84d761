// The seam between the kernels and what runs them. nvcc: a launch on a stream. Any other C++ compiler:
// tests/simt/simt.h, which has the same names and runs the same kernels on the CPU, block after block.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <stdexcept>
#include <string>

namespace nitp {
namespace cuda {

struct SharedMemory {
  int64_t block, multiprocessor;  // bytes that one block may ask for, and that the blocks of a multiprocessor share
};

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken, so that the next call does not report it once more
  throw std::runtime_error(std::string("nitp_ops row kernel: ") + what + ": " + cudaGetErrorString(error));
}

inline SharedMemory shared_memory() {
  int device = 0, block = 0, multiprocessor = 0;
  check(cudaGetDevice(&device), "no current device");
  check(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "device attribute");
  check(cudaDeviceGetAttribute(&multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        "device attribute");
  return {block, multiprocessor};
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

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
            Arguments... arguments) {
  if (blocks > INT32_MAX) throw std::runtime_error("nitp_ops row kernel: more blocks than a grid has");
  if (shared_bytes > 0) {  // more than 48 KB, or the larger share of the first-level cache, only on request
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "shared memory");
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "launch");
}

}  // namespace cuda
}  // namespace nitp
#else
#include <simt.h>
#endif
