// Where the CUDA kernels run. tests/kernels/cuda_source/simt has a file of this name for the CPU,
// which the include path chooses.
#pragma once
#include <dlfcn.h>

#include "../torch_abi.h"

namespace nitp {
namespace cuda {

constexpr const char* kDevice = "CUDA";

inline bool is_here(const torch_abi::Tensor& t) { return t.is_cuda(); }

// The device is current, and `stream` PyTorch's current stream there, while a queue lives.
class Queue {
  torch_abi::DeviceGuard guard_;

 public:
  void* stream = nullptr;

  explicit Queue(int32_t device) : guard_(device) {
    using Current = int32_t (*)(
        int32_t device, void** stream);  // aoti_torch_get_current_cuda_stream of torch's C shim
    static const Current current = [] {
      void* torch = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return reinterpret_cast<Current>(torch ? dlsym(torch, "aoti_torch_get_current_cuda_stream")
                                             : nullptr);
    }();
    NITP_CHECK(current != nullptr, "nitp_ops row kernel: this torch has no CUDA streams");
    NITP_CHECK(current(device, &stream) == 0, "nitp_ops row kernel: torch has no current stream");
  }
};

}  // namespace cuda
}  // namespace nitp
