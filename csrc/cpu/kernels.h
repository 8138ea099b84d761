// The CPU row kernels as plain C++: one overload over rows [begin, end) for each struct of
// arguments. Every .cpp beside this file is compiled once for each instruction set into a namespace
// of its own; register.cpp picks the namespace at run time. avx512_bf16 has instances for bfloat16
// alone; over float64 the AVX-512 sets have none, and AVX2's serve.
#pragma once
#include <cstdint>

#include "../kernel_params.h"

namespace nitp {

#define NITP_DECLARE(name, Rows, types, of, schema) \
  template <NITP_UNPACK types>                      \
  void run(const Rows<NITP_UNPACK of>&, int64_t begin, int64_t end);
namespace portable {
NITP_ROW_KERNELS(NITP_DECLARE)
}
namespace avx2 {
NITP_ROW_KERNELS(NITP_DECLARE)
}
namespace avx512 {
NITP_ROW_KERNELS(NITP_DECLARE)
}
namespace avx512_bf16 {
NITP_ROW_KERNELS(NITP_DECLARE)
}
#undef NITP_DECLARE

enum class InstructionSet { portable, avx2, avx512, avx512_bf16 };

}  // namespace nitp

// The best set that this CPU has and this library holds, decided when the library loads; tests
// choose lesser ones.
extern "C" __attribute__((visibility("default"))) const char* nitp_ops_instruction_set();
extern "C" __attribute__((visibility("default"))) bool nitp_ops_choose_instruction_set(
    const char* name);
nitp::InstructionSet nitp_instruction_set();
// MKL is made for such processors; some have matrix instructions that this library does not use.
bool nitp_processor_is_intel();
