// rows *= factor. A factor of one touches nothing, a factor of zero writes zeros, so that a NaN under it stays out.
#include "columns.h"
#include "rows.h"

namespace nitp {
namespace NITP_TARGET {

template <class T, class A>
void scale_rows(const ScaleRows<T, A>& a, int64_t begin, int64_t end) {
  const A factor = *a.factor;
  if (factor == A(1)) return;
  for (int64_t i = begin; i < end; ++i) {
    T* row = a.rows + i * a.stride;
    if (factor == A(0)) {
#pragma omp simd
      for (int64_t j = 0; j < a.columns; ++j) store(row + j, A(0));
    } else {
      over_columns<T>(a.columns, [=](auto at) NITP_INLINE { at.store(row, at.load(row) * factor); });
    }
  }
}

template void scale_rows(const ScaleRows<bfloat16, float>&, int64_t, int64_t);
#ifndef __AVX512BF16__
template void scale_rows(const ScaleRows<double, double>&, int64_t, int64_t);
template void scale_rows(const ScaleRows<float, float>&, int64_t, int64_t);
template void scale_rows(const ScaleRows<float16, float>&, int64_t, int64_t);
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
