// sum += factor addend, in float32 (float64 for float64): for GEMMs that round their result, and to
// add a gradient times its upstream to a buffer. 2 sizeof(A) + sizeof(T) bytes an element, none
// where the factor is zero.
#include "kernels.h"
#include "pack.h"

namespace nitp {
namespace cuda {
inline namespace accumulate_cu {

template <class A, class T, int N>
struct Operands {
  Pack<A, N> sum;
  Pack<T, N> addend;
};

template <class T, class A>
__global__ void __launch_bounds__(kMaxThreads)
    accumulate_rows(AccumulateRows<T, A> a, unsigned tiles_of_row) {
  constexpr int N = kPackBytes / sizeof(A);
  const A factor = a.factor == nullptr ? A(1) : *a.factor;
  if (factor == A(0)) return;
  const int64_t row = blockIdx.x / tiles_of_row;
  A* sum = a.sum + row * a.sum_stride;
  const T* addend = a.addend + row * a.addend_stride;
  const auto load = [&](auto width, int64_t j) {
    constexpr int W = decltype(width)::value;
    return Operands<A, T, W>{read<W>(sum + j), read<W>(addend + j)};
  };
  const auto finish = [&](auto width, int64_t j, auto in) {
    constexpr int W = decltype(width)::value;
#pragma unroll
    for (int i = 0; i < W; ++i) in.sum.at[i] += factor * widen(in.addend.at[i]);
    write(sum + j, in.sum);
  };
  over_tile(split<N>(a.columns, sum, addend), blockIdx.x % tiles_of_row, load, finish);
}

}  // namespace accumulate_cu

template <class T, class A>
void run(const AccumulateRows<T, A>& arguments, int64_t rows, void* stream) {
  AccumulateRows<T, A> a = arguments;
  flatten(rows, a.columns, a.sum_stride, a.addend_stride);
  const Tiles t = tiles<kPackBytes / sizeof(A)>(a.columns);
  if (rows > 0 && t.of_row > 0) {
    launch(accumulate_rows<T, A>, rows * t.of_row, t.threads, 0, stream, a, t.of_row);
  }
}

template void run(const AccumulateRows<double, double>&, int64_t, void*);
template void run(const AccumulateRows<float, float>&, int64_t, void*);
template void run(const AccumulateRows<bfloat16, float>&, int64_t, void*);
template void run(const AccumulateRows<float16, float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
