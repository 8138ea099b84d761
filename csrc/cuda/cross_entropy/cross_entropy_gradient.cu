// Over rows of logits whose maximum and sum of exponentials are known, their gradient: a block a
// row, one pass of packs, one barrier, then the targets, whose logits are arguments. The rows of a
// vocabulary-parallel head.
#include <cmath>

#include "../../formulas/cross_entropy.h"
#include "../kernels.h"
#include "row.h"

namespace nitp {
namespace cuda {
inline namespace cross_entropy_gradient_cu {

// Four blocks fill a multiprocessor with 64 registers a thread; without the bound the compiler
// takes 48 on sm_100a, and spills. Each thread loads its packs before it stores the first, which
// may alias them: 32 KB are in flight per multiprocessor. General rows wait for their arithmetic.
constexpr int kGradientThreads = 256;
template <class T>
constexpr int kGradientBlocks = sizeof(T) == 8 ? 2 : 4;
template <Kind K>
constexpr int kPacksAtOnce = K == Kind::general ? 1 : 2;

template <class T, class A, Kind K>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks<T>)
    cross_entropy_gradient_rows(CrossEntropyGradientRows<T, A> a) {
  constexpr int N = kPackBytes / sizeof(T), U = kPacksAtOnce<K>;
  const int threads = blockDim.x, thread = threadIdx.x;
  const int64_t i = blockIdx.x, first = i * a.targets;
  T* const logits = a.logits + i * a.logits_stride;
  const SoftmaxGradient<A> coeffs{a.grad_coeffs[i], a.grad_coeffs[a.grad_coeffs_stride + i],
                                  a.grad_coeffs[2 * a.grad_coeffs_stride + i]};
  const CrossEntropyRows<T, A> columns{
      // what a Row reads of its arguments
      .bias = a.bias,
      .class_weight = a.class_weight,
      .softcap = a.softcap,
      .logit_scale = a.logit_scale,
  };
  const Row<T, A, K> row(columns);
  const Exponential<A> exp(row.unit, coeffs.max, A(1));
  const Writer<T, A, K> writer{row, exp, row.common() * coeffs.softmax_coeff * exp.correction(),
                               row.common() * coeffs.uniform_coeff};
  const Split<N> split = cuda::split<N>(a.columns, logits);
  const int packs = static_cast<int>(split.packs), edges = static_cast<int>(split.edges);
  if (coeffs.is_zero()) {
    clear(logits, split, thread, threads);
  } else {
    int p = thread;
    for (; p + (U - 1) * threads < packs; p += U * threads) {
      Pack<T, N> loaded[U];
#pragma unroll
      for (int u = 0; u < U; ++u) loaded[u] = read<N>(logits + split.pack(p + u * threads));
#pragma unroll
      for (int u = 0; u < U; ++u) writer(logits, split.pack(p + u * threads), loaded[u]);
    }
    for (; p < packs; p += threads) writer(logits, split.pack(p), read<N>(logits + split.pack(p)));
    for (int e = thread; e < edges; e += threads) {
      writer(logits, split.edge(e), read<1>(logits + split.edge(e)));
    }
  }
  __syncthreads();
  for (int64_t t = thread; t < a.targets;
       t += threads) {  // over what the whole row got; duplicates add
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
    const A everywhere = coeffs.is_zero() ? A(0) : coeffs.at(z, row.weight(label));
    store(logits + label, row.common() * row.slope(z / row.unit) * (everywhere - scale));
  }
}

}  // namespace cross_entropy_gradient_cu

template <class T, class A>
void run(const CrossEntropyGradientRows<T, A>& a, int64_t rows, void* stream) {
  if (rows == 0 || a.columns == 0) return;
  if (a.columns >= INT32_MAX) throw Failure("logits has more than 2^31 - 2 columns");
  const auto start = [&](auto kernel) { launch(kernel, rows, kGradientThreads, 0, stream, a); };
  const bool general = a.bias || a.class_weight;
  if constexpr (sizeof(T) == 2) {
    if (!general && a.softcap > A(0) && a.softcap < kLargestCap) {
      return start(cross_entropy_gradient_rows<T, A, Kind::capped>);
    }
  }
  if constexpr (sizeof(T) < 8) {  // of a plain row the scale goes into the exponent, as it has gone
                                  // into the maximum
    int exponent;
    const bool exact = std::frexp(a.logit_scale, &exponent) == A(0.5);
    if (!general && !(a.softcap > A(0)) && exact) {
      return start(cross_entropy_gradient_rows<T, A, Kind::plain>);
    }
  }
  start(cross_entropy_gradient_rows<T, A, Kind::general>);
}

template void run(const CrossEntropyGradientRows<double, double>&, int64_t, void*);
template void run(const CrossEntropyGradientRows<float, float>&, int64_t, void*);
template void run(const CrossEntropyGradientRows<bfloat16, float>&, int64_t, void*);
template void run(const CrossEntropyGradientRows<float16, float>&, int64_t, void*);

}  // namespace cuda
}  // namespace nitp
