// A service of the CPU that ATen has but does not offer.
//
// onednn_matmul_: float32 products by oneDNN. torch.mm hands float32 to MKL, which on AMD processors reached 142-197
// GFLOP/s where oneDNN reached 202-217 (256 rows against [32000, 512] to [151936, 896], two cores). The public switch
// (torch.backends.mkldnn.matmul.fp32_precision) is global and would mean real bfloat16 on some processors;
// at::native::mkldnn_matmul, which libtorch_cpu exports, keeps no state and follows the user's own flags.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// out = add * out + a b. The name encodes the signature: where it differs, the symbol is absent. An AtenTensorHandle
// is an at::Tensor*, and a C++ reference is passed as a pointer.
using Matmul = void (*)(const void* a, const void* b, const void* out, float add, float factor);

Matmul find_matmul() {
#ifdef NITP_X86
  if (nitp_processor_is_intel()) return nullptr;
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (torch != nullptr) {
    return reinterpret_cast<Matmul>(dlsym(torch, "_ZN2at6native13mkldnn_matmulERKNS_6TensorES3_S3_ff"));
  }
#endif
  return nullptr;
}

const Matmul onednn_matmul = find_matmul();

void onednn_matmul_(Tensor out, Tensor a, Tensor b) {
  STD_TORCH_CHECK(onednn_matmul != nullptr, "nitp_ops::onednn_matmul_: this torch or processor has no such product");
  for (const Tensor& t : {out, a, b}) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.scalar_type() == ScalarType::Float && t.numel() > 0,
                    "nitp_ops::onednn_matmul_: expected float32 CPU matrices that are not empty");
  }
  STD_TORCH_CHECK(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
                  "nitp_ops::onednn_matmul_: shapes do not match");
  onednn_matmul(a.get(), b.get(), out.get(), 0.0f, 1.0f);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) bool nitp_ops_has_onednn_matmul() { return onednn_matmul != nullptr; }

STABLE_TORCH_LIBRARY_IMPL(nitp_ops, CPU, m) { m.impl("onednn_matmul_", TORCH_BOX(&onednn_matmul_)); }
