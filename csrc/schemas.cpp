// Every schema of nitp_ops: those of the table of row kernels, and two that have no rows.
#include "kernel_params.h"
#include "torch_abi.h"

namespace nitp {
namespace torch_abi {

std::string& registration_error() {
  static std::string text;
  return text;
}

namespace {

const Library schemas(NITP_LIBRARY, nullptr, [](Library& m) {
#define NITP_DEFINE(name, Rows, types, of, schema) m.def(#name schema);
  NITP_ROW_KERNELS(NITP_DEFINE)
#undef NITP_DEFINE
  // out = a b or out += a b where torch.mm would take a slower library.
  m.def("gemm_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
  // Faults in the pages of a block that is about to be written; its values do not change.
  m.def("populate_(Tensor(a!) block) -> ()");
});

}  // namespace
}  // namespace torch_abi
}  // namespace nitp

extern "C" __attribute__((visibility("default"))) const char* nitp_ops_registration_error() {
  return nitp::torch_abi::registration_error().c_str();
}
