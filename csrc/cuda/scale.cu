// out = rows * factor, a number on the device. In place a factor of one touches nothing (the
// upstream gradient of most losses, which the host cannot know without waiting); a factor of zero
// writes zeros, so that a NaN under it stays out.
#include "kernels.h"
#include "pack.h"

namespace nitp {
namespace cuda {
inline namespace scale_cu {

// Enough for any device, and few where there is nothing to do: one block a tile took 0.08 ms over 1
// GB that a factor of one leaves alone.
constexpr int64_t kMostBlocks = 4096;

template <class T, class Out, class A>
__global__ void __launch_bounds__(kMaxThreads)
    scale_rows(ScaleRows<T, Out, A> a, int64_t blocks, int64_t tiles, unsigned tiles_of_row) {
  constexpr int N = kPackBytes / sizeof(T);
  const A factor = *a.factor;
  if (factor == A(1) && static_cast<const void*>(a.out) == a.rows) return;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += blocks) {
    const int64_t at = tile / tiles_of_row;
    const T* row = a.rows + at * a.stride;
    Out* out = a.out + at * a.out_stride;
    const auto load = [&](auto width, int64_t j) { return read<decltype(width)::value>(row + j); };
    const auto finish = [&](auto width, int64_t j, auto in) {
      Pack<Out, decltype(width)::value> pack;
#pragma unroll
      for (int i = 0; i < decltype(width)::value; ++i) {
        store(pack.at + i, factor == A(0) ? A(0) : widen(in.at[i]) * factor);
      }
      write(out + j, pack);
    };
    over_tile(split<N>(a.columns, row, out), tile % tiles_of_row, load, finish);
  }
}

}  // namespace scale_cu

template <class T, class Out, class A>
void run(const ScaleRows<T, Out, A>& arguments, int64_t rows, void* stream) {
  ScaleRows<T, Out, A> a = arguments;
  flatten(rows, a.columns, a.stride, a.out_stride);
  const Tiles t = tiles<kPackBytes / sizeof(T)>(a.columns);
  const int64_t all = rows * t.of_row, blocks = all < kMostBlocks ? all : kMostBlocks;
  if (blocks > 0) {
    launch(scale_rows<T, Out, A>, blocks, t.threads, 0, stream, a, blocks, all, t.of_row);
  }
}

template void run(const ScaleRows<double, double, double>&, int64_t, void*);
template void run(const ScaleRows<float, float, float>&, int64_t, void*);
template void run(const ScaleRows<bfloat16, bfloat16, float>&, int64_t, void*);
template void run(const ScaleRows<float16, float16, float>&, int64_t, void*);
template void run(const ScaleRows<float, float16, float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
