// Whether this build's kernels can run on a device: the driver is asked once per device, before the
// first launch.
#include "launch.h"

inline namespace probe_cu {

__global__ void probe() {}

}  // namespace probe_cu

// nullptr, or why not: a driver older than the runtime that the library is linked with, or no code
// for the device.
extern "C" __attribute__((visibility("default"))) const char* nitp_ops_cuda_refusal(int device) {
  int before = 0;
  cudaFuncAttributes code;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&code, probe);
    cudaSetDevice(before);
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // taken, so that the next call does not report it once more
  return cudaGetErrorString(error);
}
