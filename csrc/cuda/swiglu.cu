// SwiGLU over rows: reads gate and up (and the upstream gradient) once, writes the result (or both
// gradients, also in place) once. 3 and 5 accesses an element; no other memory, no barrier.
#include "../formulas/swiglu.h"
#include "kernels.h"
#include "pack.h"

namespace nitp {
namespace cuda {
inline namespace swiglu_cu {

template <class T, int N>
struct Operands {
  Pack<T, N> gate, up, upstream;
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads) swiglu_rows(SwigluRows<T> a, unsigned tiles_of_row) {
  constexpr int N = kPackBytes / sizeof(T);
  const int64_t row = blockIdx.x / tiles_of_row;
  const T* gate = a.gate + row * a.gate_stride;
  const T* up = a.up + row * a.up_stride;
  T* out = a.out + row * a.out_stride;
  const auto load = [&](auto width, int64_t j) {
    constexpr int W = decltype(width)::value;
    return Operands<T, W>{read<W>(gate + j), read<W>(up + j), {}};
  };
  const auto finish = [&](auto width, int64_t j, const auto& in) {
    constexpr int W = decltype(width)::value;
    Pack<T, W> result;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      store(result.at + i, swiglu(widen(in.gate.at[i]), widen(in.up.at[i])));
    }
    write(out + j, result);
  };
  over_tile(split<N>(a.columns, gate, up, out), blockIdx.x % tiles_of_row, load, finish);
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    swiglu_rows_backward(SwigluRowsBackward<T> a, unsigned tiles_of_row) {
  constexpr int N = kPackBytes / sizeof(T);
  const int64_t row = blockIdx.x / tiles_of_row;
  const T* gate = a.gate + row * a.gate_stride;
  const T* up = a.up + row * a.up_stride;
  const T* upstream = a.upstream + row * a.upstream_stride;
  T* d_gate = a.d_gate + row * a.d_gate_stride;
  T* d_up = a.d_up + row * a.d_up_stride;
  const auto load = [&](auto width, int64_t j) {
    constexpr int W = decltype(width)::value;
    return Operands<T, W>{read<W>(gate + j), read<W>(up + j), read<W>(upstream + j)};
  };
  const auto finish = [&](auto width, int64_t j, const auto& in) {
    constexpr int W = decltype(width)::value;
    Pack<T, W> of_gate, of_up;
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const auto gradient =
          swiglu_gradient(widen(in.gate.at[i]), widen(in.up.at[i]), widen(in.upstream.at[i]));
      store(of_gate.at + i, gradient.gate);
      store(of_up.at + i, gradient.up);
    }
    write(d_gate + j, of_gate);
    write(d_up + j, of_up);
  };
  over_tile(split<N>(a.columns, gate, up, upstream, d_gate, d_up), blockIdx.x % tiles_of_row, load,
            finish);
}

}  // namespace swiglu_cu

template <class T>
void run(const SwigluRows<T>& arguments, int64_t rows, void* stream) {
  SwigluRows<T> a = arguments;
  flatten(rows, a.columns, a.gate_stride, a.up_stride, a.out_stride);
  const Tiles t = tiles<kPackBytes / sizeof(T)>(a.columns);
  if (rows > 0 && t.of_row > 0) {
    launch(swiglu_rows<T>, rows * t.of_row, t.threads, 0, stream, a, t.of_row);
  }
}

template <class T>
void run(const SwigluRowsBackward<T>& arguments, int64_t rows, void* stream) {
  SwigluRowsBackward<T> a = arguments;
  flatten(rows, a.columns, a.gate_stride, a.up_stride, a.upstream_stride, a.d_gate_stride,
          a.d_up_stride);
  const Tiles t = tiles<kPackBytes / sizeof(T)>(a.columns);
  if (rows > 0 && t.of_row > 0) {
    launch(swiglu_rows_backward<T>, rows * t.of_row, t.threads, 0, stream, a, t.of_row);
  }
}

#define NITP_INSTANTIATE(T)                                \
  template void run(const SwigluRows<T>&, int64_t, void*); \
  template void run(const SwigluRowsBackward<T>&, int64_t, void*);
NITP_INSTANTIATE(double)
NITP_INSTANTIATE(float)
NITP_INSTANTIATE(bfloat16)
NITP_INSTANTIATE(float16)

}  // namespace cuda
}  // namespace nitp
