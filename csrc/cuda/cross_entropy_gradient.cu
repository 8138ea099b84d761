// Over rows of logits whose maximum and sum of exponentials are known, their gradient: a block a row, one pass of
// packs, one barrier, then the targets, whose logits come from outside. The rows of a vocabulary-parallel head.
#include <stdexcept>

#include "../cross_entropy.h"
#include "cross_entropy_row.h"
#include "rows.h"

namespace nitp {
namespace cuda {
inline namespace cross_entropy_gradient_cu {

// Four blocks fill a multiprocessor with 64 registers a thread; left to itself the compiler takes 48 on sm_100a, and
// spills.
constexpr int kGradientThreads = 256, kGradientBlocks = 4;

template <class T, class A>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks)
    cross_entropy_gradient_rows(CrossEntropyGradientRows<T, A> a) {
  constexpr int N = kPackBytes / sizeof(T);
  const int threads = blockDim.x, thread = threadIdx.x;
  const int64_t i = blockIdx.x, first = i * a.targets;
  T* logits = a.logits + i * a.logits_stride;
  const SoftmaxGradient<A> slopes{a.factors[i], a.factors[a.factors_stride + i], a.factors[2 * a.factors_stride + i]};
  CrossEntropyRows<T, A> columns{};  // what a Row reads of its arguments
  columns.bias = a.bias;
  columns.class_weight = a.class_weight;
  columns.softcap = a.softcap;
  columns.logit_scale = a.logit_scale;
  const Row<T, A, false> row(columns);
  const Writer<T, A, false> writer{row, slopes, !slopes.nothing()};
  const Split<N> split = cuda::split<N>(a.columns, logits);
  for (int64_t p = thread; p < split.packs; p += threads) {
    writer(logits, split.pack(p), read<N>(logits + split.pack(p)));
  }
  for (int64_t e = thread; e < split.edges; e += threads) {
    writer(logits, split.edge(e), read<1>(logits + split.edge(e)));
  }
  __syncthreads();
  for (int64_t t = thread; t < a.targets; t += threads) {  // over what the whole row got; duplicates add
    const int64_t label = a.labels[first + t];
    if (label < 0 || label >= a.columns || a.target_scale[first + t] == A(0)) continue;
    A scale(0);
    bool leads = true;
    for (int64_t other = 0; leads && other < a.targets; ++other) {
      if (a.labels[first + other] != label || a.target_scale[first + other] == A(0)) continue;
      leads = other >= t;
      scale += a.target_scale[first + other];
    }
    if (!leads) continue;
    const A z = a.target_logit[first + t];
    const A everywhere = slopes.nothing() ? A(0) : slopes.at(z, row.weight(label));
    store(logits + label, row.slope(z) * (everywhere - scale));
  }
}

}  // namespace cross_entropy_gradient_cu

template <class T, class A>
void run(const CrossEntropyGradientRows<T, A>& a, int64_t rows, void* stream) {
  if (rows == 0 || a.columns == 0) return;
  launch(cross_entropy_gradient_rows<T, A>, rows, kGradientThreads, 0, stream, a);
}

template void run(const CrossEntropyGradientRows<double, double>&, int64_t, void*);
template void run(const CrossEntropyGradientRows<float, float>&, int64_t, void*);
template void run(const CrossEntropyGradientRows<bfloat16, float>&, int64_t, void*);
template void run(const CrossEntropyGradientRows<float16, float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
