#include "rows.h"

namespace {

nitp::InstructionSet detect() {
#ifdef NITP_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return nitp::InstructionSet::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return nitp::InstructionSet::avx2;
#endif
  return nitp::InstructionSet::portable;
}

const nitp::InstructionSet chosen = detect();

}  // namespace

nitp::InstructionSet nitp_instruction_set() { return chosen; }

extern "C" const char* nitp_ops_instruction_set() {
  switch (chosen) {
    case nitp::InstructionSet::avx512: return "avx512";
    case nitp::InstructionSet::avx2: return "avx2";
    case nitp::InstructionSet::portable: break;
  }
  return "portable";
}
