// sum += factor addend, in float32 (float64 for float64): for GEMMs that round their result, and to
// add a gradient times its upstream to a buffer.
#include "kernels.h"

namespace nitp {
namespace NITP_TARGET {

template <class T, class A>
void run(const AccumulateRows<T, A>& a, int64_t begin, int64_t end) {
  const A factor = a.factor == nullptr ? A(1) : *a.factor;
  if (factor == A(0)) return;
  for (int64_t row = begin; row < end; ++row) {
    A* sum = a.sum + row * a.sum_stride;
    const T* addend = a.addend + row * a.addend_stride;
#pragma omp simd
    for (int64_t j = 0; j < a.columns; ++j) sum[j] += factor * widen(addend[j]);
  }
}

template void run(const AccumulateRows<bfloat16, float>&, int64_t, int64_t);
#ifndef __AVX512BF16__
template void run(const AccumulateRows<float, float>&, int64_t, int64_t);
#endif
#ifndef __AVX512F__
template void run(const AccumulateRows<double, double>&, int64_t, int64_t);
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
