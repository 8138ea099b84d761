// gemm_: GEMMs on CPU where this library is faster than what torch.mm calls (README.md).

#include "../../torch_abi.h"
#include "../kernels.h"
#include "gemm.h"

namespace {

using nitp::bfloat16;
using nitp::InstructionSet;
using nitp::torch_abi::Library;
using nitp::torch_abi::ScalarType;
using nitp::torch_abi::Tensor;

const bool intel = nitp_processor_is_intel();

void run(int64_t count, const std::function<void(int64_t)>& task) {
  nitp::torch_abi::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

template <class T>
nitp::Operand<T> operand(const Tensor& t, int line, int depth) {
  return {static_cast<const T*>(t.data_ptr()), t.stride(line),
          t.size(depth) == 1 ? 1 : t.stride(depth)};
}

template <class T, class O>
nitp::Gemm<T, O> arguments(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  return {operand<T>(a, 0, 1),
          operand<T>(b, 1, 0),
          static_cast<O*>(out.data_ptr()),
          a.size(0),
          b.size(1),
          a.size(1),
          out.stride(0),
          add};
}

// The stride of a dimension of size 1 means nothing.
bool dense(const Tensor& t, int dim) { return t.size(dim) == 1 || t.stride(dim) == 1; }

bool is_matrix(const Tensor& t) {
  return t.is_cpu() && t.dim() == 2 && t.numel() > 0 && (dense(t, 0) || dense(t, 1));
}

#ifdef NITP_X86
template <class O>
void bfloat16_gemm(const nitp::Gemm<bfloat16, O>& args, nitp::Team team) {
  const bool pairs = nitp_instruction_set() >= InstructionSet::avx512_bf16;
  pairs ? nitp::avx512_bf16::gemm(args, team) : nitp::avx2::gemm(args, team);
}
#endif

void gemm_(Tensor out, Tensor a, Tensor b, bool add) {
  NITP_CHECK(is_matrix(out) && is_matrix(a) && is_matrix(b) && dense(out, 1),
             "nitp_ops::gemm_: expected CPU matrices that are not empty, out with dense rows, a "
             "and b with dense "
             "rows or columns");
  NITP_CHECK(a.size(1) == b.size(0) && out.size(0) == a.size(0) && out.size(1) == b.size(1),
             "nitp_ops::gemm_: shapes do not match");
  const ScalarType of = a.scalar_type(), into = out.scalar_type();
  const bool narrow = of == ScalarType::BFloat16;
  NITP_CHECK(b.scalar_type() == of && (into == of || into == ScalarType::Float) &&
                 (narrow || of == ScalarType::Float),
             "nitp_ops::gemm_: expected float32, or bfloat16 into bfloat16 or float32");
  NITP_CHECK(nitp_ops_has_gemm(), "nitp_ops::gemm_: not for this processor");
#ifdef NITP_X86
  const nitp::Team team{nitp::torch_abi::num_threads(), run};
  const InstructionSet set = nitp_instruction_set();
  if (!narrow) {
    const auto args = arguments<float, float>(out, a, b, add);
    set >= InstructionSet::avx512 ? nitp::avx512::gemm(args, team) : nitp::avx2::gemm(args, team);
  } else if (into == of) {
    bfloat16_gemm(arguments<bfloat16, bfloat16>(out, a, b, add), team);
  } else {
    bfloat16_gemm(arguments<bfloat16, float>(out, a, b, add), team);
  }
#endif
}

}  // namespace

extern "C" bool nitp_ops_has_gemm() {
  return !intel && nitp_instruction_set() >= InstructionSet::avx2;
}

static const Library kernel(NITP_LIBRARY, "CPU", [](Library& m) { m.impl<gemm_>("gemm_"); });
