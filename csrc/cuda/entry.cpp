// The CUDA row kernels: on the tensors' device, on PyTorch's current stream, without waiting for anything. What a
// kernel finds wrong in values (a label, a target row outside its range) it answers with NaN in that row.
//
// torch's CUDA library is looked up, not linked: one nitp_ops serves CPU-only and CUDA builds of torch.
#include <device.hpp>
#include <type_traits>

#include "../door.hpp"
#include "rows.h"

namespace {

struct Cuda {
  static constexpr const char* device = nitp::cuda::kDevice;
  static constexpr bool reads_values = false;
  template <class P, class Z>
  static constexpr bool pairs = std::is_same_v<P, double> == std::is_same_v<Z, double>;
  template <class T>
  static constexpr bool adds = std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>;

  static bool holds(const Tensor& t, const Tensor& on) {
    return nitp::cuda::is_here(t) && t.get_device_index() == on.get_device_index();
  }
  template <class Arguments>
  static void run(const Arguments& args, int64_t rows, const Tensor& on) {
    const nitp::cuda::Queue queue(on.get_device_index());
    nitp::cuda::run(args, rows, queue.stream);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nitp_ops, NITP_DISPATCH_KEY, m) {
  m.impl("accumulate_rows_", TORCH_BOX(&accumulate_rows_<Cuda>));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_<Cuda>));
  m.impl("swiglu_rows", TORCH_BOX(&swiglu_rows<Cuda>));
  m.impl("swiglu_rows_backward_", TORCH_BOX(&swiglu_rows_backward_<Cuda>));
  m.impl("alignment_rows_", TORCH_BOX(&alignment_rows_<Cuda>));
  m.impl("cross_entropy_rows_", TORCH_BOX(&cross_entropy_rows_<Cuda>));
  m.impl("cross_entropy_gradient_rows_", TORCH_BOX(&cross_entropy_gradient_rows_<Cuda>));
}
