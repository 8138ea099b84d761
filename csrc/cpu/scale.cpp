// out = rows * factor. A factor of one touches nothing in place, a factor of zero writes zeros, so
// that a NaN under it stays out.
#include "kernels.h"
#include "simd_loops.h"

namespace nitp {
namespace NITP_TARGET {

template <class T, class Out, class A>
void run(const ScaleRows<T, Out, A>& a, int64_t begin, int64_t end) {
  const A factor = *a.factor;
  if (factor == A(1) && static_cast<const void*>(a.out) == a.rows) return;
  for (int64_t i = begin; i < end; ++i) {
    const T* row = a.rows + i * a.stride;
    Out* out = a.out + i * a.out_stride;
    if (factor == A(0)) {
#pragma omp simd
      for (int64_t j = 0; j < a.columns; ++j) store(out + j, A(0));
    } else {
      over_columns<Out>(a.columns,
                        [=](auto at) NITP_INLINE { at.store(out, at.load(row) * factor); });
    }
  }
}

template void run(const ScaleRows<bfloat16, bfloat16, float>&, int64_t, int64_t);
#ifndef __AVX512BF16__
template void run(const ScaleRows<float, float, float>&, int64_t, int64_t);
template void run(const ScaleRows<float16, float16, float>&, int64_t, int64_t);
template void run(const ScaleRows<float, float16, float>&, int64_t, int64_t);
#endif
#ifndef __AVX512F__
template void run(const ScaleRows<double, double, double>&, int64_t, int64_t);
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
