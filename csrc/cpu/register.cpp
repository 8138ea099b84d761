// The CPU's row kernels: picks the instruction set, splits the rows over threads. One thread
// computes a row, for any number of threads, so results are bitwise reproducible.
#include <type_traits>

#include "../dispatch.h"
#include "kernels.h"

namespace {

constexpr int64_t kElementsPerTask =
    16384;  // about 10 us of work: with less, threads cost more than they gain

#ifdef NITP_X86
#define NITP_AVX512_BF16 avx512_bf16
#define NITP_AVX512 avx512
#define NITP_AVX2 avx2
#else
#define NITP_AVX512_BF16 portable
#define NITP_AVX512 portable
#define NITP_AVX2 portable
#endif
// What the set avx512_bf16 has kernels for; the others are avx512's.
template <class First, class... Rest>
constexpr bool rounds_to_bfloat16 =
    std::is_same_v<First, bfloat16> &&
    ((std::is_same_v<Rest, bfloat16> || std::is_same_v<Rest, float>) && ...);

template <class T, class... Types>
constexpr bool has = (std::is_same_v<Types, T> || ...);
// float64 beside another dtype, the one half precision beside the other: such an alignment is there
// for checks, so that one set serves it.
template <class... Types>
constexpr bool for_checks = (has<double, Types...> && !(std::is_same_v<Types, double> && ...)) ||
                            (has<bfloat16, Types...> && has<float16, Types...>);

struct Cpu {
  static constexpr const char* device = "CPU";
  static constexpr bool reads_values = true;
  template <class P, class Z>
  static constexpr bool pairs = true;
  template <class T>
  static constexpr bool adds = !std::is_same_v<T, float16>;

  static bool holds(const Tensor& t, const Tensor&) { return t.is_cpu(); }

  template <template <class...> class Rows, class... Types>
  static void run(const Rows<Types...>& args, int64_t rows, const Tensor&) {
    const int64_t grain = args.columns > 0 ? 1 + (kElementsPerTask - 1) / args.columns : 1;
    const auto over = [&](int64_t begin, int64_t end) {
      if constexpr (for_checks<Types...>) {
        nitp::portable::run(args, begin, end);
      } else {
        switch (nitp_instruction_set()) {
          case nitp::InstructionSet::avx512_bf16:
            if constexpr (rounds_to_bfloat16<Types...>) {
              nitp::NITP_AVX512_BF16::run(args, begin, end);
              break;
            }
            [[fallthrough]];
          case nitp::InstructionSet::avx512:
            if constexpr (!has<double, Types...>) {
              nitp::NITP_AVX512::run(args, begin, end);
              break;
            }
            [[fallthrough]];
          case nitp::InstructionSet::avx2: nitp::NITP_AVX2::run(args, begin, end); break;
          case nitp::InstructionSet::portable: nitp::portable::run(args, begin, end); break;
        }
      }
    };
    if (rows > 0) nitp::torch_abi::parallel_for(0, rows, grain, over);
  }
};

const Library kernels(NITP_LIBRARY, "CPU", [](Library& m) {
#define NITP_REGISTER(name, Rows, types, of, schema) m.impl<name<Cpu>>(#name);
  NITP_ROW_KERNELS(NITP_REGISTER)
#undef NITP_REGISTER
});

}  // namespace
