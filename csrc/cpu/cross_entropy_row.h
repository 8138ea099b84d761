// A row of logits and its targets as the CPU's loops over rows see them.
#pragma once
#include <algorithm>
#include <vector>

#include "../formulas/cross_entropy.h"

namespace nitp {
namespace NITP_TARGET {

// What the smoothing term needs of each logit: nothing, its sum, or its sum weighted by class.
enum class Smoothing { none, uniform, by_class };

template <class T, class A, bool Biased, bool Capped, Smoothing Kind>
struct RowReader {
  using Stored = T;
  static constexpr bool capped = Capped;
  static constexpr Smoothing smoothing = Kind;
  const T* logits;
  const A* bias;
  const A* class_weight;
  LogitTransform<A, Capped> transform;

  NITP_HD A operator()(int64_t j) const {
    const A x = widen(logits[j]);
    return transform.value(Biased ? x + bias[j] : x);
  }
  NITP_HD A weight(int64_t j) const { return Kind == Smoothing::by_class ? class_weight[j] : A(1); }
};

template <class A>
struct Target {
  int64_t label;
  A weight, logit;
};

// The targets of one row that are present; after `merge` no label is there twice.
template <class A>
struct Targets {
  std::vector<Target<A>> present;
  double weight_sum = 0;

  // gap = sum_k w_k (lse - z_k), with lse = max + log_sum; a weight of zero adds nothing, even to
  // an infinite gap
  double gap(A max, double log_sum) const {
    double sum = 0;
    for (const auto& target : present) {
      if (target.weight != A(0)) {
        sum += target.weight * (log_sum + (static_cast<double>(max) - target.logit));
      }
    }
    return sum;
  }
  void merge() {
    if (present.size() < 2) return;
    std::sort(present.begin(), present.end(),
              [](const auto& a, const auto& b) { return a.label < b.label; });
    size_t kept = 0;
    for (size_t k = 1; k < present.size(); ++k) {
      if (present[k].label == present[kept].label) {
        present[kept].weight += present[k].weight;
      } else {
        present[++kept] = present[k];
      }
    }
    present.resize(kept + 1);
  }
};

}  // namespace NITP_TARGET
}  // namespace nitp
