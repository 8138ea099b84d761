// One row of logits as the threads of its block see it: what a thread adds up of its pieces, and what it writes over
// them.
#pragma once
#include "../arguments.h"
#include "../cross_entropy.h"
#include "pack.h"
#include "reduce.h"

namespace nitp {
namespace cuda {

constexpr int kNoColumn = INT32_MAX;

// exp(factor x) for x <= 0, by one multiplication.
template <class A>
struct ScaledExp {
  A factor;
  __device__ explicit ScaledExp(A factor) : factor(factor) {}
  __device__ A operator()(A x) const { return exp_nonpositive(factor * x); }
};
#ifdef __CUDA_ARCH__
template <>
struct ScaledExp<float> {
  float rate;
  __device__ explicit ScaledExp(float factor) : rate(factor * kLog2e) {}
  __device__ float operator()(float x) const { return power_of_two(rate * x); }
};
#endif

// Of the values that a Row sees. Every sum is relative to `max`, but for `below`, which is relative to the row's
// reference.
template <class A>
struct RowSums {
  A max, sum;     // sum exp(unit (z - max))
  A below, mass;  // sum w_v (z_v - reference) and sum w_v, w_v = 1 or class_weight_v: for smoothing
  A spread;       // sum exp(z - max) (max - z): for the entropy
  int first;      // first column of the first piece that reaches max; kNoColumn: none does
};

template <class A>
__device__ A finite_or_zero(A x) {
  return x - x == A(0) ? x : A(0);
}

// The sums move to another maximum; both may be -inf.
template <class A>
__device__ void rebase(RowSums<A>& s, A to, const ScaledExp<A>& exp) {
  const A shift = to == A(-INFINITY) ? A(0) : to, factor = exp(s.max - shift);
  if (s.max != A(-INFINITY)) s.spread = factor > A(0) ? factor * (s.spread + (shift - s.max) * s.sum) : A(0);
  s.sum *= factor;
  s.max = to;
}

template <class A>
__device__ RowSums<A> merge_warp(RowSums<A> s, const ScaledExp<A>& exp) {
  struct Best {
    A max;
    int first, unused;  // a multiple of four bytes without padding
  };
  const Best best = warp_merge(Best{s.max, s.first, 0}, [](const Best& a, const Best& b) {
    return a.max > b.max || (a.max == b.max && a.first < b.first) ? a : b;
  });
  rebase(s, best.max, exp);
  s.first = best.first;
  s.sum = warp_sum(s.sum);
  s.below = warp_sum(s.below);
  s.mass = warp_sum(s.mass);
  s.spread = warp_sum(s.spread);
  return s;
}

// The targets of one row, gathered by its first warp.
template <class A>
struct RowTargets {
  A mass;
  int present, outside;
};

// One row as its threads see it. Plain: no bias, no softcap, no class weights, no entropy; then its values are the raw
// logits, whose scale (`unit`) goes into the exponential, and two packs are taken at once, so that a maximum is settled
// once for both. Four cost more registers than there are.
template <class T, class A, bool Plain>
struct Row {
  static constexpr int kAtOnce = Plain ? 2 : 1;
  const CrossEntropyRows<T, A>& a;
  A unit;  // transformed logits are so many times the values
  ScaledExp<A> exp;
  A reference;

  __device__ explicit Row(const CrossEntropyRows<T, A>& a)
      : a(a), unit(Plain ? a.logit_scale : A(1)), exp(unit), reference(0) {}

  __device__ bool smooth() const { return a.smoothing > A(0); }
  __device__ bool by_class() const { return !Plain && a.class_weight != nullptr; }
  __device__ A weight(int64_t j) const { return by_class() ? a.class_weight[j] : A(1); }

  __device__ A value(T logit, int64_t j) const {
    const A x = widen(logit);
    if (Plain) return x;
    const A biased = a.bias ? x + a.bias[j] : x;
    return a.softcap > A(0) ? LogitTransform<A, true>{a.logit_scale, a.softcap}.value(biased)
                            : LogitTransform<A, false>{a.logit_scale, A(0)}.value(biased);
  }
  __device__ A slope(A z) const {
    return !Plain && a.softcap > A(0) ? LogitTransform<A, true>{a.logit_scale, a.softcap}.slope(z) : a.logit_scale;
  }

  // Adds pieces that start at columns j, j + step, ...
  template <int U, int W>
  __device__ void add(RowSums<A>& s, const Pack<T, W>* pieces, int64_t j, int64_t step) const {
    A z[U][W], tops[U], top = A(-INFINITY);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      tops[u] = A(-INFINITY);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        z[u][i] = value(pieces[u].at[i], j + u * step + i);
        tops[u] = std::fmax(tops[u], z[u][i]);  // a NaN is left out here and shows in the sum
      }
      top = std::fmax(top, tops[u]);
    }
    if (top > s.max || (top == s.max && j < s.first)) {
#pragma unroll
      for (int u = U - 1; u >= 0; --u) s.first = tops[u] == top ? static_cast<int>(j + u * step) : s.first;
      rebase(s, top, exp);
    }
    const A shift = s.max == A(-INFINITY) ? A(0) : s.max;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A below = z[u][i] - shift, e = exp(below);
        s.sum += e;
        if (!Plain && a.entropy) s.spread -= e > A(0) ? e * below : A(0);
      }
    }
    if (!smooth()) return;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A w = weight(j + u * step + i);
        s.below += w * (z[u][i] - reference);
        s.mass += w;
      }
    }
  }
};

template <class T, class A, bool Plain>
struct Writer {
  const Row<T, A, Plain>& row;
  SoftmaxGradient<A> slopes;  // of the row's values
  bool live;                  // else the row is cleared

  __device__ A gradient(A z, int64_t j) const {
    if (Plain) return slopes.probability * row.exp(z - slopes.max) - slopes.off;
    return row.slope(z) * slopes.at(z, row.weight(j));
  }
  template <int W>
  __device__ void operator()(T* logits, int64_t j, const Pack<T, W>& in) const {
    Pack<T, W> out;
#pragma unroll
    for (int i = 0; i < W; ++i) store(out.at + i, live ? gradient(row.value(in.at[i], j + i), j + i) : A(0));
    write(logits + j, out);
  }
};

template <class T, class A>
struct Target {
  int64_t label;
  bool present, inside;
  A weight;

  __device__ Target(const CrossEntropyRows<T, A>& a, int64_t k) {
    label = a.labels[k];
    present = label != a.ignore_index && !(label < 0 && a.negative_is_absent);
    inside = present && label >= 0 && label < a.columns;
    weight = a.target_weight ? a.target_weight[k] : A(1);
  }
};

}  // namespace cuda
}  // namespace nitp
