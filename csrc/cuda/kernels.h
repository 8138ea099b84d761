// The CUDA row kernels as plain C++: each overload starts its kernel on a stream of the current
// device and returns.
#pragma once
#include "../kernel_params.h"

namespace nitp {
namespace cuda {

#define NITP_DECLARE(name, Rows, types, of, schema) \
  template <NITP_UNPACK types>                      \
  void run(const Rows<NITP_UNPACK of>&, int64_t rows, void* stream);
NITP_ROW_KERNELS(NITP_DECLARE)
#undef NITP_DECLARE

}  // namespace cuda
}  // namespace nitp
