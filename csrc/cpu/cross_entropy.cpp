// Cross-entropy over rows of logits: one pass for max, sum and arg-max (blocked, so that each block
// stays in the first-level cache between its max and its sum), one pass that overwrites the logits
// with their gradient. The first keeps its exponentials, each block's relative to the maximum so
// far, and the second needs one factor a block.
#include "cross_entropy_row.h"
#include "kernels.h"
#include "simd_loops.h"

namespace nitp {
namespace NITP_TARGET {

namespace {

// Columns between two additions to the float64 sums: a vector lane adds 32 numbers in float32,
// hardly any rounding.
constexpr int64_t kBlock = 512;

template <class A>
struct RowSums {
  A max;
  double sum, shifted_logit_sum;  // sum exp(z - max), sum class_weight (z - max)
  int64_t argmax;
};

// What the first pass leaves to the second: exp(z - base of its block), in the second-level cache.
template <class A>
struct Exponentials {
  std::vector<A> values, base;

  explicit Exponentials(int64_t columns) : values(columns), base((columns + kBlock - 1) / kBlock) {}
};

template <class A, class Read>
NITP_HD RowSums<A> reduce(const Read read, int64_t columns, Exponentials<A>& exponentials) {
  RowSums<A> row{A(-INFINITY), 0, 0, 0};
  int64_t best_block = 0;
  double weight_sum = 0;  // of class_weight so far
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t n = columns - first < kBlock ? columns - first : kBlock;
    A* z = exponentials.values.data() + first;
    A block_max = A(-INFINITY), block_shifted = A(0), block_weight = A(0);
#pragma omp simd reduction(max : block_max)
    for (int64_t j = 0; j < n; ++j) {
      const A x = read(first + j);
      z[j] = x;
      block_max = x > block_max ? x : block_max;
    }
    if (block_max > row.max) {
      row.sum *= exp_nonpositive(row.max - block_max);
      if (weight_sum != 0) {
        row.shifted_logit_sum -= weight_sum * (static_cast<double>(block_max) - row.max);
      }
      row.max = block_max;
      best_block = first;
    }
    exponentials.base[first / kBlock] = row.max;
    const A shift = row.max == A(-INFINITY) ? A(0) : row.max;
    if (Read::smoothing != Smoothing::none) {
#pragma omp simd reduction(+ : block_shifted, block_weight)
      for (int64_t j = 0; j < n; ++j) {
        block_shifted += read.weight(first + j) * (z[j] - shift);
        block_weight += read.weight(first + j);
      }
    }
    row.sum += sum_over_columns<typename Read::Stored, A>(n, [=](auto at) NITP_INLINE {
      const auto power = exp_nonpositive(at.load(z) - shift);
      at.store(z, power);
      return power;
    });
    row.shifted_logit_sum += block_shifted;
    weight_sum += block_weight;
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

// sum exp(z - max) (max - z); a probability of zero adds nothing, however small its logit is.
template <class A, class Read>
NITP_HD double entropy_sum_of(const Read read, A max, int64_t columns) {
  double sum = 0;
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t last = columns - first < kBlock ? columns : first + kBlock;
    A block(0);
#pragma omp simd reduction(+ : block)
    for (int64_t j = first; j < last; ++j) {
      const A drop = max - read(j), p = exp_nonpositive(-drop);
      block += p > A(0) ? p * drop : A(0);
    }
    sum += block;
  }
  return sum;
}

template <class T>
void clear(T* row, int64_t columns) {
  using A = working_t<T>;
  for (int64_t j = 0; j < columns; ++j) store(row + j, A(0));
}

template <class T, class A, class Read>
NITP_HD void overwrite(T* logits, const Read read, const RowSums<A>& row, const TokenLoss<A>& loss,
                       A lse, const Exponentials<A>& exponentials, Targets<A>& targets, A scale,
                       int64_t columns) {
  const auto transform = read.transform;
  const A max = row.max, factor = static_cast<A>(scale * loss.softmax_weight(lse) / row.sum);
  const A weight_sum = Read::smoothing == Smoothing::by_class ? A(1) : loss.smooth_weight_sum;
  const A uniform_coeff =
      Read::smoothing == Smoothing::none ? A(0) : scale * loss.smoothing * weight_sum / A(columns);
  // Without a cap the slope is one number, which is part of the coefficients of all columns.
  const A slope = Read::capped ? A(1) : transform.scale;
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t last = columns - first < kBlock ? columns : first + kBlock;
    const A of_block = slope * factor * exp_nonpositive(exponentials.base[first / kBlock] - max);
    const A of_uniform = slope * uniform_coeff, *e = exponentials.values.data();
    if (Read::smoothing == Smoothing::none && !Read::capped) {
      over_columns<T>(last - first, [from = e + first, into = logits + first, of_block](auto at)
                                        NITP_INLINE { at.store(into, at.load(from) * of_block); });
      continue;
    }
#pragma omp simd
    for (int64_t j = first; j < last; ++j) {
      const A g = Read::smoothing == Smoothing::none
                      ? of_block * e[j]
                      : of_block * e[j] - of_uniform * read.weight(j);
      store(logits + j, Read::capped ? transform.slope(read(j)) * g : g);
    }
  }
  targets.merge();
  for (const auto& target : targets.present) {
    const A everywhere =
        factor * exp_nonpositive(target.logit - max) - uniform_coeff * read.weight(target.label);
    store(logits + target.label, transform.slope(target.logit) *
                                     (everywhere - scale * loss.target_weight() * target.weight));
  }
}

template <bool Biased, bool Capped, Smoothing Kind, class T, class A>
void rows(const CrossEntropyRows<T, A>& a, int64_t begin, int64_t end) {
  constexpr bool by_class = Kind == Smoothing::by_class;
  Targets<A> targets;
  targets.present.reserve(a.targets);
  Exponentials<A> exponentials(a.columns);
  for (int64_t i = begin; i < end; ++i) {
    T* logits = a.logits + i * a.logits_stride;
    const A scale = a.row_scale ? a.row_scale[i] : A(1);
    const RowReader<T, A, Biased, Capped, Kind> read{
        logits, a.bias, a.class_weight, {a.logit_scale, a.softcap}};
    const RowSums<A> row = reduce<A>(read, a.columns, exponentials);
    const double log_sum = std::log(row.sum);
    const A lse = static_cast<A>(row.max + log_sum);
    bool outside = false;
    targets.present.clear();
    targets.weight_sum = 0;
    for (int64_t k = i * a.targets; k < (i + 1) * a.targets; ++k) {
      const int64_t label = a.labels[k];
      a.target_logit[k] = A(NAN);
      if (label == a.ignore_index || (label < 0 && a.negative_is_absent)) continue;
      const A weight = a.target_weight ? a.target_weight[k] : A(1);
      // A label outside [0, V) poisons its row; the op above refuses it with a clear error first.
      const bool inside = label >= 0 && label < a.columns;
      outside = outside || !inside;
      if (inside) a.target_logit[k] = read(label);
      targets.present.push_back({inside ? label : 0, inside ? weight : A(NAN), a.target_logit[k]});
      targets.weight_sum += weight;
    }
    const bool absent = targets.present.empty();
    const double entropy_sum = a.entropy ? entropy_sum_of(read, row.max, a.columns) : 0;
    if (a.softmax_partials) {
      const double partials[] = {row.max, row.sum, row.shifted_logit_sum, entropy_sum};
      for (int64_t field = 0; field < 4; ++field) {
        a.softmax_partials[field * a.softmax_partials_stride + i] = static_cast<A>(partials[field]);
      }
    }
    a.prediction[i] = absent && !a.softmax_partials ? -1 : row.argmax;
    a.stats[i] = A(0);
    a.stats[a.stats_stride + i] = absent ? A(NAN) : lse;
    if (a.entropy) {
      const double entropy = log_sum + entropy_sum / row.sum;
      a.stats[2 * a.stats_stride + i] = absent ? A(NAN) : static_cast<A>(entropy);
    }
    if (!absent) {
      const double shifted_mean = row.shifted_logit_sum / a.columns;
      const double weight_sum = by_class ? a.class_weight_mean : targets.weight_sum;
      const double smooth_gap =
          weight_sum * log_sum - (by_class ? shifted_mean : weight_sum * shifted_mean);
      const TokenLoss<A> token =
          token_loss(a, static_cast<A>(targets.weight_sum), static_cast<A>(weight_sum));
      a.stats[i] = token.loss(lse, static_cast<A>(targets.gap(row.max, log_sum)),
                              static_cast<A>(smooth_gap));
      if (a.gradient && scale != A(0)) {
        overwrite(logits, read, row, token, lse, exponentials, targets, outside ? A(NAN) : scale,
                  a.columns);
      }
    }
    // not 0 * gradient: a NaN under a zero weight stays out
    if (a.gradient && (absent || scale == A(0))) clear(logits, a.columns);
  }
}

template <bool Biased, bool Capped, class T, class A>
void rows(const CrossEntropyRows<T, A>& a, int64_t begin, int64_t end) {
  if (!(a.smoothing > A(0))) {
    rows<Biased, Capped, Smoothing::none>(a, begin, end);
  } else if (a.class_weight) {
    rows<Biased, Capped, Smoothing::by_class>(a, begin, end);
  } else {
    rows<Biased, Capped, Smoothing::uniform>(a, begin, end);
  }
}

}  // namespace

template <class T, class A>
void run(const CrossEntropyRows<T, A>& a, int64_t begin, int64_t end) {
  if (!(a.softcap > A(0))) {
    a.bias ? rows<true, false>(a, begin, end) : rows<false, false>(a, begin, end);
    return;
  }
  // A capped row spends its time in tanh: zeros for a missing bias spare a quarter of this file's
  // code.
  const std::vector<A> zeros(a.bias ? 0 : a.columns);
  CrossEntropyRows<T, A> biased = a;
  if (!a.bias) biased.bias = zeros.data();
  rows<true, true>(biased, begin, end);
}

template void run(const CrossEntropyRows<bfloat16, float>&, int64_t, int64_t);
#ifndef __AVX512BF16__
template void run(const CrossEntropyRows<float, float>&, int64_t, int64_t);
template void run(const CrossEntropyRows<float16, float>&, int64_t, int64_t);
#endif
#ifndef __AVX512F__
template void run(const CrossEntropyRows<double, double>&, int64_t, int64_t);
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
