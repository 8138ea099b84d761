// Distance between a prediction row p and a target row z of D features, and its gradients.
//
//   cosine:     loss = 1 - c,  c = p.z / (|p| |z|), each norm clamped at eps;  = |p^ - z^|^2 / 2
//   where c > 1/2;
//               dloss/dp = -(z^ - c p^) / |p|, zero where |p| < eps   (p^ = p/|p|, z^ = z/|z|)
//   mse:        loss = mean (p - z)^2
//   smooth_l1:  loss = mean of d^2/2 where |d| < 1, else |d| - 1/2,  d = p - z
//   kl:         loss = KL(softmax z || softmax p), summed over features
//
// cosine, mse and smooth_l1 are symmetric: swapping the arguments gives the gradient of the target.
//
// A cosine does not change when a row is scaled. Where the squares of a row would overflow or
// vanish, its sums and its gradient are those of the row times a power of two, which rounds
// nothing: f p and g z stand for p and z then.
#pragma once
#include "../host_device.h"

namespace nitp {

enum class Distance : int64_t { cosine = 0, mse = 1, smooth_l1 = 2, kl = 3 };

namespace NITP_TARGET {

// The sums that one pass over a pair of rows yields.
template <class A>
struct PairSums {
  A pp, zz, pz;
};

template <class A>
NITP_HD PairSums<A> swap(const PairSums<A>& sums) {
  return {sums.zz, sums.pp, sums.pz};
}

// The factor of a row before it is squared, and the sum of squares, `most`, beyond which it is
// not 1.
template <class A>
struct SquareRange {
  static constexpr bool wide = sizeof(A) == 8;
  static constexpr double most = wide ? 0x1p800 : 0x1p100, shrink = wide ? 0x1p-640 : 0x1p-80;

  // 1 for almost every row; NaN too. Small rows matter where eps is smaller still.
  NITP_HD static A factor(A sum_of_squares, A eps) {
    if (sum_of_squares > A(most)) return A(shrink);
    return sum_of_squares < A(1 / most) && eps < A(shrink) ? A(1 / shrink) : A(1);
  }
};

// f and g.
template <class A>
struct PairFactors {
  A p, z;

  NITP_HD PairFactors(const PairSums<A>& sums, A eps)
      : p(SquareRange<A>::factor(sums.pp, eps)), z(SquareRange<A>::factor(sums.zz, eps)) {}
  NITP_HD PairFactors(A of_p, A of_z) : p(of_p), z(of_z) {}
  NITP_HD bool none() const { return p == A(1) && z == A(1); }
};

// One row's scalars, in float64: they are few, and their rounding would show in every feature of
// the row.
template <class A>
struct CosineRow {
  double cosine, prediction_norm, target_norm;
  A of_prediction, of_target;  // scale * dloss/dp = f (of_prediction * f p + of_target * g z)
  A unit_prediction;           // p^ = unit_prediction * f p
  bool near;                   // 1 - c would lose digits

  // sums: of f p and g z.
  NITP_HD CosineRow(PairSums<A> sums, PairFactors<A> by, A eps, A scale) {
    const double scaled_p = sqrt(static_cast<double>(sums.pp));
    const double scaled_z = sqrt(static_cast<double>(sums.zz));
    // A division costs a short row more than the test.
    prediction_norm = by.p == A(1) ? scaled_p : scaled_p / by.p;
    target_norm = by.z == A(1) ? scaled_z : scaled_z / by.z;
    const bool unclamped = !(prediction_norm < eps), target_unclamped = !(target_norm < eps);
    // Written so that a NaN norm stays NaN instead of turning into eps.
    const double p = unclamped ? scaled_p : static_cast<double>(eps) * by.p;
    const double z = target_unclamped ? scaled_z : static_cast<double>(eps) * by.z;
    cosine = sums.pz / (p * z);
    unit_prediction = static_cast<A>(1 / p);
    near = cosine > 0.5 && unclamped && target_unclamped;
    of_prediction = unclamped ? static_cast<A>(scale * (cosine / (p * p))) : A(0);
    of_target = unclamped ? static_cast<A>(scale * (-1 / (p * z))) : A(0);
  }
};

template <class A>
NITP_HD A smooth_l1(A difference) {
  const A size = difference < A(0) ? -difference : difference;
  return size < A(1) ? A(0.5) * difference * difference : size - A(0.5);
}

template <class A>
NITP_HD A smooth_l1_gradient(A difference) {
  const A low = difference < A(-1) ? A(-1) : difference;
  return low > A(1) ? A(1) : low;
}

}  // namespace NITP_TARGET
}  // namespace nitp
