// Over rows of logits whose maximum and sum of exponentials are known, their gradient:
// SoftmaxGradient a column, one pass, then the targets. The rows of a vocabulary-parallel head,
// whose sums run over several devices.
#include "cross_entropy_row.h"
#include "kernels.h"

namespace nitp {
namespace NITP_TARGET {

namespace {

template <bool Biased, bool Capped, Smoothing Kind, class T, class A>
void rows(const CrossEntropyGradientRows<T, A>& a, int64_t begin, int64_t end) {
  Targets<A> targets;
  targets.present.reserve(a.targets);
  for (int64_t i = begin; i < end; ++i) {
    T* logits = a.logits + i * a.logits_stride;
    const A* coeffs = a.grad_coeffs + i;
    const SoftmaxGradient<A> row{coeffs[0], coeffs[a.grad_coeffs_stride],
                                 coeffs[2 * a.grad_coeffs_stride]};
    const RowReader<T, A, Biased, Capped, Kind> read{
        logits, a.bias, a.class_weight, {a.logit_scale, a.softcap}};
    if (row.is_zero()) {  // not 0 * exp: a NaN under a zero weight stays out
      for (int64_t j = 0; j < a.columns; ++j) store(logits + j, A(0));
    } else {
#pragma omp simd
      for (int64_t j = 0; j < a.columns; ++j) {
        const A z = read(j);
        store(logits + j, read.transform.slope(z) * row.at(z, read.weight(j)));
      }
    }
    targets.present.clear();
    for (int64_t k = i * a.targets; k < (i + 1) * a.targets; ++k) {
      const bool here = a.labels[k] >= 0 && a.labels[k] < a.columns;
      if (here && a.target_scale[k] != A(0)) {
        targets.present.push_back({a.labels[k], a.target_scale[k], a.target_logit[k]});
      }
    }
    targets.merge();
    for (const auto& target : targets.present) {
      const A everywhere = row.is_zero() ? A(0) : row.at(target.logit, read.weight(target.label));
      store(logits + target.label,
            read.transform.slope(target.logit) * (everywhere - target.weight));
    }
  }
}

template <bool Biased, bool Capped, class T, class A>
void rows(const CrossEntropyGradientRows<T, A>& a, int64_t begin, int64_t end) {
  a.class_weight ? rows<Biased, Capped, Smoothing::by_class>(a, begin, end)
                 : rows<Biased, Capped, Smoothing::uniform>(a, begin, end);
}

}  // namespace

template <class T, class A>
void run(const CrossEntropyGradientRows<T, A>& a, int64_t begin, int64_t end) {
  if (!(a.softcap > A(0))) {
    a.bias ? rows<true, false>(a, begin, end) : rows<false, false>(a, begin, end);
    return;
  }
  const std::vector<A> zeros(a.bias ? 0 : a.columns);  // as in cross_entropy.cpp
  CrossEntropyGradientRows<T, A> biased = a;
  if (!a.bias) biased.bias = zeros.data();
  rows<true, true>(biased, begin, end);
}

template void run(const CrossEntropyGradientRows<bfloat16, float>&, int64_t, int64_t);
#ifndef __AVX512BF16__
template void run(const CrossEntropyGradientRows<float, float>&, int64_t, int64_t);
template void run(const CrossEntropyGradientRows<float16, float>&, int64_t, int64_t);
#endif
#ifndef __AVX512F__
template void run(const CrossEntropyGradientRows<double, double>&, int64_t, int64_t);
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
