// Cross-entropy of one row of raw logits x with targets t_k of weight w_k, smoothing e and z-loss
// c:
//
//   z = transform(x) = cap tanh(scale (x + bias) / cap)          (no cap: z = scale (x + bias))
//   lse = max z + log sum_v exp(z_v - max z),   S = sum_k w_k
//   loss = (1 - e) sum_k w_k (lse - z_k) + e sum_v u_v (lse - z_v) + c lse^2
//   dloss/dz_v = ((1 - e) S + e sum u + 2 c lse) p_v - e u_v - (1 - e) sum_k w_k [v = t_k],     p_v
//   = exp(z_v - lse) dloss/dx_v = dloss/dz_v * slope_v,   slope = scale (1 - (z / cap)^2)
//
// u_v = S / V, or class_weight_v / V. A plain label is one target of weight 1.
#pragma once
#include "../host_device.h"

namespace nitp {
namespace NITP_TARGET {

// Capped is a compile-time choice: with a run-time test in it the row loops do not vectorise.
template <class A, bool Capped>
struct LogitTransform {
  A scale, cap;

  NITP_HD A value(A x) const {
    return Capped ? cap * tanh_of(quotient(scale * x, cap)) : scale * x;
  }
  NITP_HD A slope(A z) const {
    return Capped ? scale * (A(1) - quotient(z, cap) * quotient(z, cap)) : scale;
  }
};

// What a row's loss and gradient need beside the row itself.
template <class A>
struct TokenLoss {
  A smoothing, z_loss;
  A target_weight_sum, smooth_weight_sum;  // S and sum u

  // target_gap = sum_k w_k (lse - z_k) and smooth_gap = sum_v u_v (lse - z_v) come as differences:
  // the large common offset cancels before anything is rounded to it.
  NITP_HD A loss(A lse, A target_gap, A smooth_gap) const {
    const A smooth = smoothing > A(0) ? smoothing * smooth_gap : A(0);
    const A square = z_loss > A(0) ? z_loss * lse * lse : A(0);
    return (A(1) - smoothing) * target_gap + smooth + square;
  }
  NITP_HD A softmax_weight(A lse) const {
    const A weight_sum =
        smoothing > A(0) ? (A(1) - smoothing) * target_weight_sum + smoothing * smooth_weight_sum
                         : target_weight_sum;
    return z_loss > A(0) ? weight_sum + A(2) * z_loss * lse : weight_sum;
  }
  NITP_HD A target_weight() const { return A(1) - smoothing; }
};

// The same with the options of a kernel's arguments.
template <class Arguments, class A>
NITP_HD TokenLoss<A> token_loss(const Arguments& a, A target_weight_sum, A smooth_weight_sum) {
  return {a.smoothing, a.z_loss, target_weight_sum, smooth_weight_sum};
}

// The gradient of a row whose maximum and sum of exponentials are known, w its weight:
//
//   w dloss/dz_v = softmax_coeff exp(z_v - max) - uniform_coeff u_v - sum_k target_coeff_k [v =
//   t_k]
//
//   softmax_coeff  = w ((1 - e) S + e sum u + 2 c lse) / sum_v exp(z_v - max)
//   uniform_coeff  = w e / V (times S without class weights),   u_v = 1 or class_weight_v
//   target_coeff_k = w (1 - e) w_k
template <class A>
struct SoftmaxGradient {
  A max, softmax_coeff, uniform_coeff;

  NITP_HD bool is_zero() const { return softmax_coeff == A(0) && uniform_coeff == A(0); }
  NITP_HD A at(A z, A weight) const {
    return softmax_coeff * exp_nonpositive(z - max) - uniform_coeff * weight;
  }
};

}  // namespace NITP_TARGET
}  // namespace nitp
