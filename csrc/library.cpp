// Every row-kernel schema of nitp_ops. `x_` overwrites its (a!) arguments; strided rows are accepted, the last axis
// must be dense. A gradient argument that is None means in place. stats tensors are [fields, rows] in the working
// precision (float64 for float64, else float32). parts [4, rows] is what a row that continues on other devices has
// here: max z, sum exp(z - max), sum u (z - max), sum exp(z - max) (max - z), whether or not a target is present;
// factors [3, rows] is what the whole row's gradient needs: max, probability, off (cross_entropy.h).
#include "torch_abi.h"

namespace nitp {
namespace torch_abi {

std::string& registration_error() {
  static std::string text;
  return text;
}

namespace {

const Library schemas(NITP_LIBRARY, nullptr, [](Library& m) {
  m.def("swiglu_rows(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def(
      "swiglu_rows_backward_(Tensor(a!) gate, Tensor(b!) up, Tensor upstream, Tensor(c!)? d_gate=None, "
      "Tensor(d!)? d_up=None) -> ()");
  m.def(
      "alignment_rows_(Tensor(a!) prediction, Tensor target, Tensor? target_rows, Tensor? row_scale, Tensor(b!) stats, "
      "Tensor(c!)? d_prediction, Tensor(d!)? d_target, int distance, float eps, bool gradient) -> ()");
  m.def(
      "cross_entropy_rows_(Tensor(a!) logits, Tensor labels, Tensor? target_weight, Tensor? bias, Tensor? "
      "class_weight, "
      "Tensor? row_scale, Tensor(b!) stats, Tensor(c!) target_logit, Tensor(d!) prediction, int ignore_index, "
      "bool negative_is_absent, float label_smoothing, float z_loss, float softcap, float logit_scale, bool gradient, "
      "Tensor(e!)? parts=None) -> ()");
  m.def(
      "cross_entropy_gradient_rows_(Tensor(a!) logits, Tensor labels, Tensor target_scale, Tensor target_logit, "
      "Tensor? bias, Tensor? class_weight, Tensor factors, float softcap, float logit_scale) -> ()");
  m.def("accumulate_rows_(Tensor(a!) sum, Tensor addend, Tensor? factor=None) -> ()");
  m.def("scale_rows_(Tensor(a!) rows, Tensor factor, Tensor(b!)? out=None) -> ()");
  // Not a row kernel: out = a b or out += a b where torch.mm would take a slower library.
  m.def("gemm_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()");
  // Fetches the pages of a block that is about to be written; its numbers stay what they are.
  m.def("populate_(Tensor(a!) block) -> ()");
});

}  // namespace
}  // namespace torch_abi
}  // namespace nitp

extern "C" __attribute__((visibility("default"))) const char* nitp_ops_registration_error() {
  return nitp::torch_abi::registration_error().c_str();
}
