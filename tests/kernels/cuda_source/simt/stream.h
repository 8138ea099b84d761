// Where the CUDA kernels run under simt.h: on the CPU, without a stream.
#pragma once

#include "../../../../csrc/torch_abi.h"

namespace nitp {
namespace cuda {

constexpr const char* kDevice = "CPU";

inline bool is_here(const torch_abi::Tensor& t) { return t.is_cpu(); }

struct Queue {
  void* stream = nullptr;
  explicit Queue(int32_t) {}
};

}  // namespace cuda
}  // namespace nitp
