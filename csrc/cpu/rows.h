// The CPU row kernels as plain C++: one function over rows [begin, end) an op. Every .cpp beside this file is compiled
// once for each instruction set into a namespace of its own; entry.cpp picks the namespace at run time. avx512_bf16 has
// instances for bfloat16 alone.
#pragma once
#include <cstdint>

#include "../arguments.h"

namespace nitp {

#define NITP_DECLARE_ROWS(target)                                                            \
  namespace target {                                                                         \
  template <class T>                                                                         \
  void swiglu_rows(const SwigluRows<T>&, int64_t, int64_t);                                  \
  template <class T>                                                                         \
  void swiglu_rows_backward(const SwigluRowsBackward<T>&, int64_t, int64_t);                 \
  template <class P, class Z, class A>                                                       \
  void alignment_rows(const AlignmentRows<P, Z, A>&, int64_t, int64_t);                      \
  template <class T, class A>                                                                \
  void cross_entropy_rows(const CrossEntropyRows<T, A>&, int64_t, int64_t);                  \
  template <class T, class A>                                                                \
  void cross_entropy_gradient_rows(const CrossEntropyGradientRows<T, A>&, int64_t, int64_t); \
  template <class T, class A>                                                                \
  void accumulate_rows(const AccumulateRows<T, A>&, int64_t, int64_t);                       \
  template <class T, class Out, class A>                                                     \
  void scale_rows(const ScaleRows<T, Out, A>&, int64_t, int64_t);                            \
  }

NITP_DECLARE_ROWS(portable)
NITP_DECLARE_ROWS(avx2)
NITP_DECLARE_ROWS(avx512)
NITP_DECLARE_ROWS(avx512_bf16)
#undef NITP_DECLARE_ROWS

enum class InstructionSet { portable, avx2, avx512, avx512_bf16 };

}  // namespace nitp

// The best set that this CPU has and this library holds, decided when the library loads; tests choose lesser ones.
extern "C" __attribute__((visibility("default"))) const char* nitp_ops_instruction_set();
extern "C" __attribute__((visibility("default"))) bool nitp_ops_choose_instruction_set(const char* name);
nitp::InstructionSet nitp_instruction_set();
// MKL is at home on such processors; some have matrix instructions that this library has not.
bool nitp_processor_is_intel();
