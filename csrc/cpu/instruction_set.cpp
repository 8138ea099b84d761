#include <cstring>

#include "kernels.h"
#ifdef NITP_X86
#include <cpuid.h>
#endif

namespace {

#ifdef NITP_X86
// A name that __builtin_cpu_supports knows since g++ 11 only.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

nitp::InstructionSet detect() {
#ifdef NITP_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? nitp::InstructionSet::avx512_bf16
                                                : nitp::InstructionSet::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    return nitp::InstructionSet::avx2;
  }
#endif
  return nitp::InstructionSet::portable;
}

const nitp::InstructionSet best = detect();
nitp::InstructionSet chosen = best;

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

}  // namespace

nitp::InstructionSet nitp_instruction_set() { return chosen; }

bool nitp_processor_is_intel() {
#ifdef NITP_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

extern "C" const char* nitp_ops_instruction_set() { return kNames[static_cast<int>(chosen)]; }

extern "C" bool nitp_ops_choose_instruction_set(const char* name) {
  for (int set = 0; set <= static_cast<int>(best); ++set) {
    if (std::strcmp(name, kNames[set]) == 0) {
      chosen = static_cast<nitp::InstructionSet>(set);
      return true;
    }
  }
  return false;
}
