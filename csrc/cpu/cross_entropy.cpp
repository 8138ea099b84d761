// Cross-entropy over rows of logits: one pass for max, sum and arg-max (blocked, so that each block stays in the
// first-level cache between its max and its sum), one pass that overwrites the logits with their gradient.
#include "../cross_entropy.h"

#include "rows.h"

namespace nitp {
namespace NITP_TARGET {

namespace {

// Columns between two additions to the float64 sums: a vector lane adds 32 numbers in float32, hardly any rounding.
constexpr int64_t kBlock = 512;

template <class T, class A, bool Biased, bool Capped>
struct RowReader {
  const T* logits;
  const A* bias;
  LogitTransform<A, Capped> transform;

  NITP_HD A operator()(int64_t j) const {
    const A x = widen(logits[j]);
    return transform.value(Biased ? x + bias[j] : x);
  }
};

template <class A>
struct RowSums {
  A max;
  double sum, total;  // sum exp(z - max), sum z
  int64_t argmax;
};

template <class A, class Read>
NITP_HD RowSums<A> reduce(const Read read, int64_t columns) {
  RowSums<A> row{A(-INFINITY), 0, 0, 0};
  int64_t best_block = 0;
  A z[kBlock];
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t n = columns - first < kBlock ? columns - first : kBlock;
    A block_max = A(-INFINITY), block_total = A(0), block_sum = A(0);
#pragma omp simd reduction(max : block_max) reduction(+ : block_total)
    for (int64_t j = 0; j < n; ++j) {
      const A x = read(first + j);
      z[j] = x;
      block_max = x > block_max ? x : block_max;
      block_total += x;
    }
    if (block_max > row.max) {
      row.sum *= exp_nonpositive(row.max - block_max);
      row.max = block_max;
      best_block = first;
    }
    const A shift = row.max == A(-INFINITY) ? A(0) : row.max;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t j = 0; j < n; ++j) block_sum += exp_nonpositive(z[j] - shift);
    row.sum += block_sum;
    row.total += block_total;
  }
  // The first column of the best block that holds the maximum (a row of NaN has none: 0).
  const int64_t n = columns - best_block < kBlock ? columns - best_block : kBlock;
  int32_t best = static_cast<int32_t>(n);
#pragma omp simd reduction(min : best)
  for (int32_t j = 0; j < static_cast<int32_t>(n); ++j) {
    const int32_t candidate = read(best_block + j) == row.max ? j : static_cast<int32_t>(n);
    best = candidate < best ? candidate : best;
  }
  row.argmax = best < n ? best_block + best : 0;
  return row;
}

template <class T>
void clear(T* row, int64_t columns) {
  using A = working_t<T>;
  for (int64_t j = 0; j < columns; ++j) store(row + j, A(0));
}

template <class T, class A, class Read>
NITP_HD void overwrite(T* logits, const Read read, const RowSums<A>& row, const TokenLoss<A>& loss, A lse,
                       int64_t label, A scale, int64_t columns) {
  const auto transform = read.transform;
  const A z_target = read(label);
  const A max = row.max, factor = static_cast<A>(scale * loss.probability_factor(lse) / row.sum);
  const A everywhere = scale * loss.everywhere();
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) {
    const A z = read(j);
    store(logits + j, transform.slope(z) * (factor * exp_nonpositive(z - max) - everywhere));
  }
  const A at_target = factor * exp_nonpositive(z_target - max) - everywhere - scale * loss.at_target();
  store(logits + label, transform.slope(z_target) * at_target);
}

template <bool Biased, bool Capped, class T, class A>
void rows(const CrossEntropyRows<T, A>& a, int64_t begin, int64_t end) {
  const TokenLoss<A> token{a.smoothing, a.z_loss, A(a.columns)};
  for (int64_t i = begin; i < end; ++i) {
    T* logits = a.logits + i * a.logits_stride;
    const int64_t label = a.labels[i];
    const A scale = a.row_scale ? a.row_scale[i] : A(1);
    A* loss = a.stats + i;
    A* log_sum_exp = loss + a.stats_stride;
    A* target_logit = log_sum_exp + a.stats_stride;
    const bool inside = label >= 0 && label < a.columns;
    const RowReader<T, A, Biased, Capped> read{logits, a.bias, {a.logit_scale, a.softcap}};
    const RowSums<A> row = reduce<A>(read, a.columns);
    const A log_sum = static_cast<A>(std::log(row.sum));
    const A lse = row.max + log_sum;
    a.prediction[i] = row.argmax;
    *log_sum_exp = lse;
    if (label == a.ignore_index) {
      *loss = A(0);
      *target_logit = A(NAN);
      if (a.gradient) clear(logits, a.columns);
      continue;
    }
    // A label outside [0, V) poisons its row; the op above refuses it with a clear error first.
    *target_logit = inside ? read(label) : A(NAN);
    const A mean = static_cast<A>(row.total / a.columns);
    *loss = token.loss(lse, log_sum + (row.max - *target_logit), log_sum + (row.max - mean));
    if (!a.gradient) continue;
    if (scale == A(0)) {
      clear(logits, a.columns);  // not 0 * gradient: a NaN under a zero weight stays out
    } else {
      overwrite(logits, read, row, token, lse, inside ? label : 0, inside ? scale : A(NAN), a.columns);
    }
  }
}

}  // namespace

template <class T, class A>
void cross_entropy_rows(const CrossEntropyRows<T, A>& a, int64_t begin, int64_t end) {
  if (a.bias) {
    a.softcap > A(0) ? rows<true, true>(a, begin, end) : rows<true, false>(a, begin, end);
  } else {
    a.softcap > A(0) ? rows<false, true>(a, begin, end) : rows<false, false>(a, begin, end);
  }
}

template void cross_entropy_rows(const CrossEntropyRows<double, double>&, int64_t, int64_t);
template void cross_entropy_rows(const CrossEntropyRows<float, float>&, int64_t, int64_t);
template void cross_entropy_rows(const CrossEntropyRows<bfloat16, float>&, int64_t, int64_t);

}  // namespace NITP_TARGET
}  // namespace nitp
