// Before the chunks of a token loss: row weights, counts and empty values from the labels. After
// them: the loss from the rows. One task each: a row costs a few loads.
#include "../formulas/labels.h"
#include "kernels.h"

namespace nitp {
namespace NITP_TARGET {
namespace {

// By halves: the error of n terms grows with log n.
template <class A>
double sum(const FinishRows<A>& a, int64_t begin, int64_t end) {
  if (end - begin > 128) {
    const int64_t middle = begin + (end - begin) / 2;
    return sum(a, begin, middle) + sum(a, middle, end);
  }
  double total = 0;
  for (int64_t row = begin; row < end; ++row) total += loss_of(a, row);
  return total;
}

}  // namespace

template <class A>
void run(const PrepareRows<A>& a, int64_t, int64_t) {
  int64_t present = 0, first = -1, last = -1, outside = -1;
  double count = 0;
  for (int64_t row = 0; row < a.columns; ++row) {
    const RowLabels<A> labels = read_labels(a, row);
    a.scale[row] = labels.weight;
    clear_values(a, row);
    if (outside < 0) outside = labels.outside;
    if (!labels.present) continue;
    count += count_of(a, row);
    present += 1, last = row;
    if (first < 0) first = row;
  }
  const A normalizer = normalizer_of(a, count);
  const bool too_many = a.max_rows >= 0 && present > a.max_rows;
  int64_t active = 0;
  for (int64_t row = 0; row < a.columns; ++row) {
    A& scale = a.scale[row];
    scale = too_many && read_labels(a, row).present ? A(NAN) : scale_of(scale, normalizer);
    active += scale != A(0);
  }
  const int64_t totals[] = {present, active, first, last, outside};
  for (int i = 0; i < kTotals; ++i) a.totals[i] = totals[i];
}

template <class A>
void run(const FinishRows<A>& a, int64_t, int64_t) {
  *a.loss = sum(a, 0, a.columns);
}

#ifndef __AVX512BF16__
template void run(const PrepareRows<double>&, int64_t, int64_t);
template void run(const PrepareRows<float>&, int64_t, int64_t);
template void run(const FinishRows<double>&, int64_t, int64_t);
template void run(const FinishRows<float>&, int64_t, int64_t);
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
