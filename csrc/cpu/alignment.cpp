// Alignment over pairs of rows: one pass for the sums, one pass that writes the gradients, also in
// place.
#include <vector>

#include "kernels.h"
#include "simd_loops.h"

namespace nitp {
namespace NITP_TARGET {

namespace {

template <class P, class Z, class A>
struct Pair {
  const P* p;
  const Z* z;
  P* dp;
  Z* dz;  // null: not wanted
  int64_t columns;
  A scale;
  bool gradient;

  NITP_HD A prediction(int64_t j) const { return static_cast<A>(widen(p[j])); }
  NITP_HD A target(int64_t j) const { return static_cast<A>(widen(z[j])); }
};

template <class T, class A>
NITP_HD void put(T* p, A x) {
  store(p, static_cast<working_t<T>>(x));
}

template <class P, class Z, class A>
PairSums<A> sums_of(
    const Pair<P, Z, A> pair) {  // by value: through a reference the loop does not vectorise
  A pp(0), zz(0), pz(0);
#pragma omp simd reduction(+ : pp, zz, pz)
  for (int64_t j = 0; j < pair.columns; ++j) {
    const A p = pair.prediction(j), z = pair.target(j);
    pp += p * p;
    zz += z * z;
    pz += p * z;
  }
  return {pp, zz, pz};
}

// sum of (p^ - z^)^2, and the gradients on the way. What is wanted is a compile-time choice: with a
// test in it the loop does not vectorise.
template <bool OfPrediction, bool OfTarget, class P, class Z, class A>
A squared_chord(const Pair<P, Z, A> pair, const CosineRow<A>& row, const CosineRow<A>& swapped) {
  const A of_p = row.unit_prediction, of_z = swapped.unit_prediction;
  const A a = row.of_prediction, b = row.of_target, c = swapped.of_prediction;
  const A d = swapped.of_target;
  constexpr bool alike = std::is_same_v<Z, P> || std::is_same_v<Z, float>;
  return sum_over_columns<std::conditional_t<alike, P, A>, A>(
      pair.columns, [=](auto at) NITP_INLINE {
        const auto p = at.load(pair.p);
        const auto z = at.load(pair.z);
        const auto apart = of_p * p - of_z * z;
        if (OfTarget) at.store(pair.dz, c * z + d * p);
        if (OfPrediction) at.store(pair.dp, a * p + b * z);
        return apart * apart;
      });
}

// The scalars of a pair with these sums; where `loss` is wanted, that and the gradients. Half the
// squared chord is 1 - c, and near c = 1 it keeps the digits that 1 - c loses: an error of the
// norms enters it squared.
template <class P, class Z, class A>
CosineRow<A> cosine_row(const Pair<P, Z, A>& pair, const PairSums<A>& sums, PairFactors<A> by,
                        A eps, A* loss) {
  const CosineRow<A> row(sums, by, eps, pair.scale),
      swapped(swap(sums), {by.z, by.p}, eps, pair.scale);
  if (loss == nullptr) return row;
  A chord(0);
  if (pair.gradient) {
    chord = pair.dz ? squared_chord<true, true>(pair, row, swapped)
                    : squared_chord<true, false>(pair, row, swapped);
  } else if (row.near) {
    chord = squared_chord<false, false>(pair, row, swapped);
  }
  *loss = row.near ? chord / 2 : static_cast<A>(1 - row.cosine);
  return row;
}

template <class P, class Z, class A>
CosineRow<A> cosine_of(const Pair<P, Z, A>& pair, A eps, A* loss) {
  const PairSums<A> sums = sums_of(pair);
  const PairFactors<A> by(sums, eps);
  if (by.none()) return cosine_row(pair, sums, by, eps, loss);
  // Copies of the few rows that need a factor spare the loops over all others two multiplications.
  std::vector<A> p(pair.columns), z(pair.columns);
  for (int64_t j = 0; j < pair.columns; ++j) {
    p[j] = by.p * pair.prediction(j), z[j] = by.z * pair.target(j);
  }
  A* dz = pair.dz ? z.data() : nullptr;
  const Pair<A, A, A> scaled{p.data(),     z.data(),   p.data(),     dz,
                             pair.columns, pair.scale, pair.gradient};
  const CosineRow<A> row = cosine_row(scaled, sums_of(scaled), by, eps, loss);
  for (int64_t j = 0; loss != nullptr && pair.gradient && j < pair.columns; ++j) {
    put(pair.dp + j, by.p * p[j]);
    if (dz) put(pair.dz + j, by.z * z[j]);
  }
  return row;
}

// mse and smooth_l1: a mean over features of a function of the difference.
template <bool OfTarget, class P, class Z, class A, class Slope>
void write_difference(const Pair<P, Z, A> pair, A scale, Slope slope) {
#pragma omp simd
  for (int64_t j = 0; j < pair.columns; ++j) {
    const A g = scale * slope(pair.prediction(j) - pair.target(j));
    if (OfTarget) put(pair.dz + j, -g);
    put(pair.dp + j, g);
  }
}

template <class P, class Z, class A, class Value, class Slope>
A difference_row(const Pair<P, Z, A>& pair, Value value, Slope slope) {
  A sum(0);
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < pair.columns; ++j) sum += value(pair.prediction(j) - pair.target(j));
  if (pair.gradient) {
    const A scale = pair.scale / A(pair.columns);
    pair.dz ? write_difference<true>(pair, scale, slope)
            : write_difference<false>(pair, scale, slope);
  }
  return sum / A(pair.columns);
}

template <class A>
struct SoftmaxSums {
  A max, sum;
};

template <class A, class Read>
SoftmaxSums<A> softmax_sums(int64_t columns, Read read) {
  A max(-INFINITY), sum(0);
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < columns; ++j) max = read(j) > max ? read(j) : max;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < columns; ++j) sum += exp_nonpositive(read(j) - max);
  return {max, sum};
}

// Far: the logits of p are so far apart that a difference of them is infinite. There 0 log 0 = 0
// needs a test, which costs the loops over all other rows an eighth of their time.
template <bool Far, class A>
A times_log(A q, A log_ratio) {
  return Far && q == A(0) ? A(0) : q * log_ratio;
}

template <bool Far, class P, class Z, class A>
A kl_row(const Pair<P, Z, A> pair) {  // by value, as above
  const auto p_sums = softmax_sums<A>(pair.columns, [&](int64_t j) { return pair.prediction(j); });
  const auto z_sums = softmax_sums<A>(pair.columns, [&](int64_t j) { return pair.target(j); });
  const A offset = std::log(p_sums.sum) - std::log(z_sums.sum);
  // log q_z - log q_p at feature j
  auto log_ratio = [&](int64_t j) {
    return (pair.target(j) - z_sums.max) - (pair.prediction(j) - p_sums.max) + offset;
  };
  auto q_z = [&](int64_t j) { return exp_nonpositive(pair.target(j) - z_sums.max) / z_sums.sum; };
  A kl(0);
#pragma omp simd reduction(+ : kl)
  for (int64_t j = 0; j < pair.columns; ++j) kl += times_log<Far>(q_z(j), log_ratio(j));
  if (!Far && kl != kl) return kl_row<true>(pair);
  if (pair.gradient) {
#pragma omp simd
    for (int64_t j = 0; j < pair.columns; ++j) {
      const A q = q_z(j);
      const A q_p = exp_nonpositive(pair.prediction(j) - p_sums.max) / p_sums.sum;
      if (pair.dz) put(pair.dz + j, pair.scale * times_log<Far>(q, log_ratio(j) - kl));
      put(pair.dp + j, pair.scale * (q_p - q));
    }
  }
  return kl;
}

template <class P>
void clear(P* row, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) put(row + j, 0.0);
}

}  // namespace

template <class P, class Z, class A>
void run(const AlignmentRows<P, Z, A>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const P* prediction = a.prediction + i * a.prediction_stride;
    const Z* target = a.target + (a.target_rows ? a.target_rows[i] : i) * a.target_stride;
    P* d_prediction = a.d_prediction + i * a.d_prediction_stride;
    Z* d_target = a.d_target ? a.d_target + i * a.d_target_stride : nullptr;
    const A scale = a.row_scale ? a.row_scale[i] : A(1);
    const bool active = scale != A(0);
    const Pair<P, Z, A> pair{prediction, target, d_prediction,        d_target,
                             a.columns,  scale,  a.gradient && active};
    A loss(0);
    const CosineRow<A> row =
        cosine_of(pair, a.eps, a.distance == Distance::cosine ? &loss : nullptr);
    switch (a.distance) {
      case Distance::cosine: break;
      case Distance::mse:
        loss = difference_row(pair, [](A d) { return d * d; }, [](A d) { return A(2) * d; });
        break;
      case Distance::smooth_l1:
        loss = difference_row(
            pair, [](A d) { return smooth_l1(d); }, [](A d) { return smooth_l1_gradient(d); });
        break;
      case Distance::kl: loss = kl_row<false>(pair); break;
    }
    if (a.gradient && !active) {  // not 0 * gradient: a NaN under a zero weight stays out
      clear(d_prediction, a.columns);
      if (d_target) clear(d_target, a.columns);
    }
    A* stats = a.stats + i;
    stats[0] = loss;
    stats[a.stats_stride] = static_cast<A>(row.cosine);
    stats[2 * a.stats_stride] = static_cast<A>(row.prediction_norm);
    stats[3 * a.stats_stride] = static_cast<A>(row.target_norm);
  }
}

#define NITP_INSTANTIATE(P, Z, A) \
  template void run(const AlignmentRows<P, Z, A>&, int64_t, int64_t);
NITP_INSTANTIATE(bfloat16, float, float)
NITP_INSTANTIATE(bfloat16, bfloat16, float)
#ifndef __AVX512BF16__
NITP_INSTANTIATE(float, float, float)
NITP_INSTANTIATE(float, bfloat16, float)
NITP_INSTANTIATE(float, float16, float)
NITP_INSTANTIATE(float16, float, float)
NITP_INSTANTIATE(float16, float16, float)
#endif
#ifndef __AVX512F__
NITP_INSTANTIATE(double, double, double)
#endif
#ifndef __AVX2__  // a sixth of the time of a build, for what no training needs
NITP_INSTANTIATE(bfloat16, float16, float)
NITP_INSTANTIATE(float16, bfloat16, float)
NITP_INSTANTIATE(double, float, double)
NITP_INSTANTIATE(double, bfloat16, double)
NITP_INSTANTIATE(double, float16, double)
NITP_INSTANTIATE(float, double, double)
NITP_INSTANTIATE(bfloat16, double, double)
NITP_INSTANTIATE(float16, double, double)
#endif

}  // namespace NITP_TARGET
}  // namespace nitp
