// One row of logits, from the view of a thread: what it adds up of its packs, and what it writes
// over them. A single element at the edge is a pack of one.
#pragma once
#include "../../formulas/cross_entropy.h"
#include "../../kernel_params.h"
#include "../pack.h"
#include "../reduce.h"
#include "exponential.h"

namespace nitp {
namespace cuda {

constexpr int kNoColumn = INT32_MAX;

// The options of a row. plain: a scale. capped: a softcap as well, in half precision. general: any
// of bias, softcap, class weights and entropy.
enum class Kind { plain, capped, general };
// A larger softcap would cost a capped row digits.
constexpr float kLargestCap = 1024;

// A row is added up by values v of its logits x: exp(z - max z) = exp(unit (v - max v)). The
// maximum is kept as a key, which is cheap to find; v grows with it.
//
// So the prediction of a capped row is that of exact arithmetic, its largest logit, also where the
// cap makes several equal in float32.
//
//            key    value                    unit
//   plain    x      x                        scale
//   capped   x      tanh(scale x / cap)      cap
//   general  z      z                        1
//
// Every sum is relative to the value of `max`, but for `shifted_logit_sum`, which is relative to
// the block's reference until the blocks' sums meet.
template <class A>
struct RowSums {
  A max, sum;           // sum exp(unit (v - max))
  A shifted_logit_sum;  // sum w_v (v - reference), w_v = 1 or class_weight_v: for smoothing
  A weight_sum;         // sum w_v
  A entropy_sum;        // sum exp(z - max) (max - z)
  int first;            // first column of the first pack that reaches max; kNoColumn: none
};

template <class A>
__device__ A finite_or_zero(A x) {
  return x - x == A(0) ? x : A(0);
}

// The targets of one row, gathered by the first warp of each block; `own_weight_sum`: of those that
// are the block's.
template <class A>
struct RowTargets {
  A weight_sum, own_weight_sum;
  int present, outside;
};

// What a block has found in its part of the row.
template <class A>
struct alignas(16) Found {
  RowSums<A> sums;    // shifted_logit_sum relative to the maximum
  A gap, own_weight;  // sum_k w_k (max - z_k) and sum_k w_k over the block's targets
};

template <class Team, class A>
struct Scratch {
  RowSums<A> partials[kWarp];
  RowTargets<A> targets;
  typename Team::template Mail<Found<A>> mail;
};

template <class T, class A, Kind K>
struct Row {
  static constexpr bool kGeneral = K == Kind::general;
  // Packs at once, so that a maximum is settled once for all of them.
  static constexpr int kAtOnce = kGeneral ? 1 : 2;
  const CrossEntropyRows<T, A>& a;
  A unit, into_cap, reference;

  __device__ explicit Row(const CrossEntropyRows<T, A>& a)
      : a(a),
        unit(K == Kind::plain    ? a.logit_scale
             : K == Kind::capped ? a.softcap
                                 : A(1)),
        into_cap(K == Kind::capped ? a.logit_scale / a.softcap : A(0)),
        reference(0) {}

  __device__ bool smooth() const { return a.smoothing > A(0); }
  __device__ bool by_class() const { return kGeneral && a.class_weight != nullptr; }
  __device__ bool entropy() const { return kGeneral && a.entropy; }
  __device__ A weight(int64_t j) const { return by_class() ? a.class_weight[j] : A(1); }

  __device__ A key(T logit, int j) const {
    const A x = widen(logit);
    if constexpr (!kGeneral) return x;
    const A biased = a.bias ? x + a.bias[j] : x;
    return a.softcap > A(0) ? LogitTransform<A, true>{a.logit_scale, a.softcap}.value(biased)
                            : LogitTransform<A, false>{a.logit_scale, A(0)}.value(biased);
  }
  __device__ A value(A key) const {
    if constexpr (K == Kind::capped) return half_tanh(into_cap * key);
    return key;
  }
  __device__ A gradient_value(A key) const {
    if constexpr (K == Kind::capped) return gradient_tanh<T>(into_cap * key);
    return key;
  }
  // dz/dx = common slope(v): what all columns share is in their coefficients.
  __device__ A common() const { return kGeneral ? A(1) : a.logit_scale; }
  __device__ A slope(A v) const {
    if constexpr (K == Kind::plain) return A(1);
    if constexpr (K == Kind::capped) return A(1) - v * v;
    return a.softcap > A(0) ? LogitTransform<A, true>{a.logit_scale, a.softcap}.slope(v)
                            : a.logit_scale;
  }

  // Relative to a maximum; -inf is none, and then to zero.
  __device__ A base(A max) const {
    return K != Kind::capped && max == A(-INFINITY) ? A(0) : value(max);
  }
  __device__ Exponential<A> relative_to(A max) const { return Exponential<A>(unit, base(max)); }

  // The sums move to another maximum, which is not smaller.
  __device__ void rebase(RowSums<A>& s, A to) const {
    const A from = base(s.max), shift = base(to);
    const A factor = exp_of_difference(unit, value(s.max) - shift);
    scale_sums(s, factor, shift - from);
    s.max = to;
  }
  __device__ void scale_sums(RowSums<A>& s, A factor, A raised) const {
    if (entropy()) {
      s.entropy_sum =
          factor > A(0) && s.sum != A(0) ? factor * (s.entropy_sum + raised * s.sum) : A(0);
    }
    s.sum *= factor;
  }

  // Adds packs that start at columns j, j + step, ... to sums relative to `exp`, the Exponential of
  // s.max.
  template <int U, int W>
  __device__ void add(RowSums<A>& s, Exponential<A>& exp, const Pack<T, W>* loaded, int j,
                      int step) const {
    A keys[U][W];
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < W; ++i) keys[u][i] = key(loaded[u].at[i], j + u * step + i);
    }
    const A top = largest<U, W>(loaded, keys);  // a NaN is left out here and shows in the sum
    // packs come by rising columns, but an edge may precede them
    if (top > s.max || (W == 1 && top == s.max && j < s.first)) {
      const Exponential<A> to = relative_to(top);
      scale_sums(s, exp.correction() * to(value(s.max)), base(top) - base(s.max));
      s.max = top, s.first = j, exp = to;
      if constexpr (U > 1) {
        if (largest<1, W>(loaded, keys) != top) s.first = j + step;
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A v = value(keys[u][i]), e = exp(v);
        s.sum += e;
        if (entropy()) s.entropy_sum -= e > A(0) ? e * (v - base(s.max)) : A(0);
      }
    }
    if (!smooth()) return;
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        const A w = weight(j + u * step + i);
        s.shifted_logit_sum += w * (value(keys[u][i]) - reference);
        s.weight_sum += w;
      }
    }
  }

  // Of sums of the threads of one block, or of blocks whose `shifted_logit_sum` are relative to one
  // number.
  __device__ RowSums<A> merge_warp(RowSums<A> s) const {
    struct Best {
      A max;
      int first, unused;  // a multiple of four bytes without padding
    };
    const Best best = cuda::warp_merge(Best{s.max, s.first, 0}, [](const Best& a, const Best& b) {
      return a.max > b.max || (a.max == b.max && a.first < b.first) ? a : b;
    });
    rebase(s, best.max);
    s.first = best.first;
    s.sum = warp_sum(s.sum);
    if (smooth()) {
      s.shifted_logit_sum = warp_sum(s.shifted_logit_sum), s.weight_sum = warp_sum(s.weight_sum);
    }
    if (entropy()) s.entropy_sum = warp_sum(s.entropy_sum);
    return s;
  }

 private:
  template <int U, int W>
  static __device__ A largest(const Pack<T, W>* loaded, const A (*keys)[W]) {
    if constexpr (!kGeneral && sizeof(T) == 2 && W > 1) {
      return largest_of<U>(loaded);
    } else {
      A top(-INFINITY);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int i = 0; i < W; ++i) top = std::fmax(top, keys[u][i]);
      }
      return top;
    }
  }
};

// Overwrites packs with their gradient. The coefficients are those of values v: they hold the unit.
template <class T, class A, Kind K>
struct Writer {
  const Row<T, A, K>& row;
  Exponential<A> exp;
  A softmax_coeff, uniform_coeff;

  __device__ A gradient(A v, int j) const {
    return row.slope(v) *
           (softmax_coeff * exp(v) -
            (Row<T, A, K>::kGeneral ? uniform_coeff * row.weight(j) : uniform_coeff));
  }
  template <int W>
  __device__ void operator()(T* logits, int64_t j, const Pack<T, W>& in) const {
    A out[W];
#pragma unroll
    for (int i = 0; i < W; ++i) {
      out[i] = gradient(row.gradient_value(row.key(in.at[i], j + i)), j + i);
    }
    write(logits + j, narrow<T>(out));
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
