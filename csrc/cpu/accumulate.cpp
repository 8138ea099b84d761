// sum += addend, in float32: what a GEMM that rounds its product to bfloat16 leaves to be done.
#include "rows.h"

namespace nitp {
namespace NITP_TARGET {

template <class T>
void accumulate_rows(const AccumulateRows<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    float* sum = a.sum + row * a.sum_stride;
    const T* addend = a.addend + row * a.addend_stride;
#pragma omp simd
    for (int64_t j = 0; j < a.columns; ++j) sum[j] += widen(addend[j]);
  }
}

template void accumulate_rows(const AccumulateRows<bfloat16>&, int64_t, int64_t);

}  // namespace NITP_TARGET
}  // namespace nitp
