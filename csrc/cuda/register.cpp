// The CUDA row kernels: on the tensors' device, on PyTorch's current stream, without waiting for
// anything. A value that is wrong (a label, a target row outside its range) gives NaN in its row.
//
// torch's CUDA library is looked up, not linked: one nitp_ops serves CPU-only and CUDA builds of
// torch.
#include <stream.h>

#include <type_traits>

#include "../dispatch.h"
#include "kernels.h"

namespace {

struct Cuda {
  static constexpr const char* device = nitp::cuda::kDevice;
  static constexpr bool reads_values = false;
  template <class P, class Z>
  static constexpr bool pairs = std::is_same_v<P, double> == std::is_same_v<Z, double>;
  template <class T>
  static constexpr bool adds = true;

  static bool holds(const Tensor& t, const Tensor& on) {
    return nitp::cuda::is_here(t) && t.device_index() == on.device_index();
  }
  template <class Arguments>
  static void run(const Arguments& args, int64_t rows, const Tensor& on) {
    const nitp::cuda::Queue queue(on.device_index());
    nitp::cuda::run(args, rows, queue.stream);
  }
};

const Library kernels(NITP_LIBRARY, nitp::cuda::kDevice, [](Library& m) {
#define NITP_REGISTER(name, Rows, types, of, schema) m.impl<name<Cuda>>(#name);
  NITP_ROW_KERNELS(NITP_REGISTER)
#undef NITP_REGISTER
});

}  // namespace
