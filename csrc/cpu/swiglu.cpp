// SwiGLU over rows: reads gate and up once, writes the result (or both gradients, also in place)
// once.
#include "../formulas/swiglu.h"

#include "kernels.h"
#include "simd_loops.h"

namespace nitp {
namespace NITP_TARGET {

template <class T>
void run(const SwigluRows<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = a.gate + row * a.gate_stride;
    const T* up = a.up + row * a.up_stride;
    T* out = a.out + row * a.out_stride;
    over_columns<T>(
        a.columns, [=](auto at) NITP_INLINE { at.store(out, swiglu(at.load(gate), at.load(up))); });
  }
}

template <class T>
void run(const SwigluRowsBackward<T>& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = a.gate + row * a.gate_stride;
    const T* up = a.up + row * a.up_stride;
    const T* upstream = a.upstream + row * a.upstream_stride;
    T* d_gate = a.d_gate + row * a.d_gate_stride;
    T* d_up = a.d_up + row * a.d_up_stride;
    over_columns<T>(a.columns, [=](auto at) NITP_INLINE {
      const auto gradient = swiglu_gradient(at.load(gate), at.load(up), at.load(upstream));
      at.store(d_gate, gradient.gate);
      at.store(d_up, gradient.up);
    });
  }
}

#define NITP_INSTANTIATE(T)                                  \
  template void run(const SwigluRows<T>&, int64_t, int64_t); \
  template void run(const SwigluRowsBackward<T>&, int64_t, int64_t);
NITP_INSTANTIATE(bfloat16)
#ifndef __AVX512BF16__
NITP_INSTANTIATE(float)
NITP_INSTANTIATE(float16)
#endif
#ifndef __AVX512F__
NITP_INSTANTIATE(double)
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
