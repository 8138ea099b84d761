// csrc/cpu/gemm/gemm.cpp against GEMMs in float64: sizes around a tile, a part and a cell, both
// layouts of both operands, in the middle of larger matrices. Prints a line for each one that is
// wrong; returns how many.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../../csrc/cpu/gemm/gemm.cpp"

namespace {

using namespace nitp;

std::mt19937 numbers(7);

int64_t one_of(std::initializer_list<int64_t> values) {
  return values.begin()[numbers() % values.size()];
}

void fill(std::vector<float>& values) {
  for (float& x : values) x = static_cast<float>(numbers() % 2001) / 1000 - 1;
}
void fill(std::vector<bfloat16>& values) {
  for (bfloat16& x : values) {
    NITP_TARGET::store(&x, static_cast<float>(numbers() % 2001) / 1000 - 1);
  }
}

template <class T, class O>
int wrong(int64_t m, int64_t n, int64_t k, bool a_transposed, bool b_transposed, bool add,
          int64_t threads) {
  const int64_t a_stride = (a_transposed ? m : k) + 3, b_stride = (b_transposed ? k : n) + 5;
  const int64_t stride = n + 4;
  // no number after the last one
  std::vector<T> a(1 + ((a_transposed ? k : m) - 1) * a_stride + (a_transposed ? m : k));
  std::vector<T> b(2 + ((b_transposed ? n : k) - 1) * b_stride + (b_transposed ? k : n));
  std::vector<O> out((m + 2) * stride);
  fill(a), fill(b), fill(out);
  const std::vector<O> before = out;
  // size 1: both strides are 1, as gemm/register.cpp makes them
  const Operand<T> rows{a.data() + 1, a_transposed ? 1 : a_stride,
                        a_transposed && k > 1 ? a_stride : 1};
  const Operand<T> columns{b.data() + 2, b_transposed ? b_stride : 1,
                           !b_transposed && k > 1 ? b_stride : 1};
  NITP_TARGET::gemm(Gemm<T, O>{rows, columns, out.data() + stride + 2, m, n, k, stride, add},
                    Team{threads, [](int64_t count, const std::function<void(int64_t)>& task) {
                           const bool backwards =
                               numbers() % 2;  // what one thread writes beyond its own
                           for (int64_t i = 0; i < count; ++i) task(backwards ? count - 1 - i : i);
                         }});
  int count = 0;
  for (int64_t at = 0; at < static_cast<int64_t>(out.size()); ++at) {
    const int64_t i = at / stride - 1, j = at % stride - 2;
    const double old = NITP_TARGET::widen(before[at]), found = NITP_TARGET::widen(out[at]);
    double exact = old, tolerance = 0;
    if (i >= 0 && i < m && j >= 0 && j < n) {
      exact = add ? old : 0;
      double magnitude = std::fabs(exact);
      for (int64_t l = 0; l < k; ++l) {
        const double x = NITP_TARGET::widen(rows.data[i * rows.line + l * rows.depth]);
        const double y = NITP_TARGET::widen(columns.data[j * columns.line + l * columns.depth]);
        exact += x * y, magnitude += std::fabs(x * y);
      }
      const double terms =
          static_cast<double>(std::min<int64_t>(k, sizeof(T) < 4 ? 2048 : 256) + k / 256 + 3);
      tolerance = std::ldexp(magnitude * terms, -24) +
                  (sizeof(O) < 4 ? std::ldexp(std::fabs(exact), -8) : 0);
    }
    count += !(std::fabs(found - exact) <= tolerance);
  }
  if (count > 0) {
    std::printf(
        "%ld x %ld x %ld, transposed %d %d, add %d, %ld threads, %ld bytes into %ld: %d numbers\n",
        static_cast<long>(m), static_cast<long>(n), static_cast<long>(k), a_transposed,
        b_transposed, add, static_cast<long>(threads), static_cast<long>(sizeof(T)),
        static_cast<long>(sizeof(O)), count);
  }
  return count > 0;
}

template <class T, class O>
int all_wrong() {
  int count = 0;
  for (int round = 0; round < 60; ++round) {
    const int64_t m = one_of({1, 6, 13, 14, 15, 29, 70, 113});
    const int64_t n = one_of({1, 15, 16, 31, 32, 33, 64, 97});
    const int64_t k = one_of({1, 2, 15, 16, 17, 31, 33, 255, 257, 600, 1030, 2100});
    count += wrong<T, O>(m, n, k, numbers() % 2, numbers() % 2, numbers() % 2, 1 + numbers() % 3);
  }
  // cells that share rows packed once, in one part of the depth and in several; rows packed for
  // each cell
  count += wrong<T, O>(15, 20000, 480 / sizeof(T), false, true, false, 2);
  count += wrong<T, O>(15, 1200, 2100, true, false, true, 1);
  return count + wrong<T, O>(1050, 20, 2100, false, false, false, 2);
}

}  // namespace

int main() {
  int count = 0;
#ifdef NITP_GEMM_OF_FLOAT
  count += all_wrong<float, float>();
#endif
#ifdef NITP_GEMM_OF_BFLOAT16
  count += all_wrong<bfloat16, bfloat16>() + all_wrong<bfloat16, float>();
#endif
  return count;
}
