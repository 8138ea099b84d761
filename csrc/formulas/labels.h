// The labels of one row, on the host and on the device: whether the row counts, and its weight
// before the normalizer.
#pragma once
#include "../kernel_params.h"

namespace nitp {
namespace NITP_TARGET {

template <class A>
struct RowLabels {
  bool present;  // the row has a target
  A weight;  // of the row before the normalizer; 0 where it has no target, or none with a weight
             // and needs one
  int64_t outside;  // index of its first label outside [0, classes), -1: none
};

template <class A>
NITP_HD RowLabels<A> read_labels(const PrepareRows<A>& a, int64_t row) {
  bool present = false, weighs = a.target_weight == nullptr;
  int64_t outside = -1;
  for (int64_t k = row * a.targets; k < (row + 1) * a.targets; ++k) {
    const int64_t label = a.labels[k];
    if (label == a.ignore_index || (label < 0 && a.negative_is_absent)) continue;
    present = true;
    weighs = weighs || a.target_weight[k] != A(0);
    if (outside < 0 && (label < 0 || label >= a.classes)) outside = k;
  }
  const bool counts = present && (weighs || !a.needs_target_weight);
  const A weight = a.row_weight == nullptr ? A(1) : a.row_weight[row * a.weight_stride];
  return {present, counts ? weight : A(0), outside};
}

// What a row adds to the normalizer: 1, or the class weight of its only target.
template <class A>
NITP_HD double count_of(const PrepareRows<A>& a, int64_t row) {
  return a.target_weight != nullptr && !a.negative_is_absent
             ? static_cast<double>(a.target_weight[row])
             : 1.0;
}

template <class A>
NITP_HD A normalizer_of(const PrepareRows<A>& a, double count) {
  if (a.normalizer != nullptr) return *a.normalizer;
  return a.mean && count != 0.0 ? static_cast<A>(count) : A(1);
}

// A weight of zero stays zero, whatever divides it.
template <class A>
NITP_HD A scale_of(A weight, A normalizer) {
  return weight == A(0) ? A(0) : weight / normalizer;
}

// The values of a row that is not computed.
template <class A>
NITP_HD void clear_values(const PrepareRows<A>& a, int64_t row) {
  for (int64_t field = 0; field < a.fields; ++field) {
    a.stats[field * a.stats_stride + row] = field == 0 ? A(0) : A(NAN);
  }
  for (int64_t k = row * a.targets; k < (row + 1) * a.targets; ++k) a.target_logit[k] = A(NAN);
  a.prediction[row] = -1;
}

// What a row adds to the loss; a weight of zero adds nothing, whatever it meets.
template <class A>
NITP_HD double loss_of(const FinishRows<A>& a, int64_t row) {
  return a.scale[row] == A(0) ? 0.0 : static_cast<double>(a.losses[row] * a.scale[row]);
}

}  // namespace NITP_TARGET
}  // namespace nitp
