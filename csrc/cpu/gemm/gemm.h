// A GEMM: out[m, n] = a[m, k] b[k, n], or out += a b. Sums are float32, whatever the operands.
#pragma once
#include <cstdint>
#include <functional>

#include "../../host_device.h"

namespace nitp {

// Line i (a row of a, a column of b) at depth k lies at data[i * line + k * depth]; one of the
// strides is 1.
template <class T>
struct Operand {
  const T* data;
  int64_t line, depth;
};

template <class T, class O>
struct Gemm {
  Operand<T> a, b;
  O* out;
  int64_t m, n, k, stride;  // of the rows of out
  bool add;
};

// The threads: run(count, task) calls task(i) once for each i below count, by up to `threads`
// threads.
struct Team {
  int64_t threads;
  void (*run)(int64_t count, const std::function<void(int64_t)>& task);
};

#define NITP_DECLARE_GEMM(target, of, into)         \
  namespace target {                                \
  void gemm(const Gemm<of, into>& args, Team team); \
  }

NITP_DECLARE_GEMM(avx2, float, float)
NITP_DECLARE_GEMM(avx2, bfloat16, bfloat16)
NITP_DECLARE_GEMM(avx2, bfloat16, float)
NITP_DECLARE_GEMM(avx512, float, float)
NITP_DECLARE_GEMM(avx512_bf16, bfloat16, bfloat16)
NITP_DECLARE_GEMM(avx512_bf16, bfloat16, float)
#undef NITP_DECLARE_GEMM

}  // namespace nitp

// Whether this library's GEMMs of float32 and of bfloat16 serve this processor.
extern "C" __attribute__((visibility("default"))) bool nitp_ops_has_gemm();
