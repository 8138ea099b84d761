// sum += addend, in float32: what a GEMM that rounds its product leaves to be done. 8 + sizeof(T) bytes an element.
#include "pack.h"
#include "rows.h"

namespace nitp {
namespace cuda {
inline namespace accumulate_cu {

template <class T, int N>
struct Operands {
  Pack<float, N> sum;
  Pack<T, N> addend;
};

template <class T>
__global__ void __launch_bounds__(kMaxThreads) accumulate_rows(AccumulateRows<T> a, unsigned tiles_of_row) {
  constexpr int N = kPackBytes / sizeof(float);
  const int64_t row = blockIdx.x / tiles_of_row;
  float* sum = a.sum + row * a.sum_stride;
  const T* addend = a.addend + row * a.addend_stride;
  const auto load = [&](auto width, int64_t j) {
    constexpr int W = decltype(width)::value;
    return Operands<T, W>{read<W>(sum + j), read<W>(addend + j)};
  };
  const auto finish = [&](auto width, int64_t j, auto in) {
    constexpr int W = decltype(width)::value;
#pragma unroll
    for (int i = 0; i < W; ++i) in.sum.at[i] += widen(in.addend.at[i]);
    write(sum + j, in.sum);
  };
  over_tile(split<N>(a.columns, sum, addend), blockIdx.x % tiles_of_row, load, finish);
}

}  // namespace accumulate_cu

template <class T>
void run(const AccumulateRows<T>& given, int64_t rows, void* stream) {
  AccumulateRows<T> a = given;
  flatten(rows, a.columns, a.sum_stride, a.addend_stride);
  const Tiles t = tiles<kPackBytes / sizeof(float)>(a.columns);
  if (rows > 0 && t.of_row > 0) launch(accumulate_rows<T>, rows * t.of_row, t.threads, 0, stream, a, t.of_row);
}

template void run(const AccumulateRows<bfloat16>&, int64_t, void*);
template void run(const AccumulateRows<float16>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
