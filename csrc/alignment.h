// Distance between a prediction row p and a target row z of D features, and its gradients.
//
//   cosine:     loss = 1 - c,  c = p.z / (|p| |z|), each norm clamped at eps;  = |p^ - z^|^2 / 2 where c > 1/2;
//               dloss/dp = -(z^ - c p^) / |p|, zero where |p| < eps   (p^ = p/|p|, z^ = z/|z|)
//   mse:        loss = mean (p - z)^2
//   smooth_l1:  loss = mean of d^2/2 where |d| < 1, else |d| - 1/2,  d = p - z
//   kl:         loss = KL(softmax z || softmax p), summed over features
//
// cosine, mse and smooth_l1 are symmetric: swapping the arguments gives the gradient of the target.
#pragma once
#include "host_device.h"

namespace nitp {

enum class Distance : int64_t { cosine = 0, mse = 1, smooth_l1 = 2, kl = 3 };

namespace NITP_TARGET {

// The sums that one pass over a pair of rows yields.
template <class A>
struct PairSums {
  A pp, zz, pz;
};

// One row's scalars, in float64: they are few, and their rounding would show in every feature of the row.
template <class A>
struct CosineRow {
  double cosine, prediction_norm, target_norm;
  A of_prediction, of_target;  // scale * dloss/dp = of_prediction * p + of_target * z
  A unit_prediction;           // p^ = unit_prediction * p
  bool near;                   // 1 - c would lose digits

  NITP_HD CosineRow(PairSums<A> sums, A eps, A scale) {
    prediction_norm = sqrt(static_cast<double>(sums.pp));
    target_norm = sqrt(static_cast<double>(sums.zz));
    // Written so that a NaN norm stays NaN instead of turning into eps.
    const double p = prediction_norm < eps ? eps : prediction_norm;
    const double z = target_norm < eps ? eps : target_norm;
    cosine = sums.pz / (p * z);
    const bool live = !(prediction_norm < eps);
    unit_prediction = static_cast<A>(1 / p);
    near = cosine > 0.5 && live && !(target_norm < eps);
    of_prediction = live ? static_cast<A>(scale * (cosine / (p * p))) : A(0);
    of_target = live ? static_cast<A>(scale * (-1 / (p * z))) : A(0);
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
