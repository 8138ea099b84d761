// Cross-entropy of one row of raw logits x with targets t_k of weight w_k, smoothing e and z-loss c:
//
//   z = transform(x) = cap tanh(scale (x + bias) / cap)          (no cap: z = scale (x + bias))
//   lse = max z + log sum_v exp(z_v - max z),   S = sum_k w_k
//   loss = (1 - e) sum_k w_k (lse - z_k) + e sum_v u_v (lse - z_v) + c lse^2
//   dloss/dz_v = ((1 - e) S + e sum u + 2 c lse) p_v - e u_v - (1 - e) sum_k w_k [v = t_k],     p_v = exp(z_v - lse)
//   dloss/dx_v = dloss/dz_v * slope_v,   slope = scale (1 - (z / cap)^2)
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

  NITP_HD A value(A x) const { return Capped ? cap * tanh_of(quotient(scale * x, cap)) : scale * x; }
  NITP_HD A slope(A z) const { return Capped ? scale * (A(1) - quotient(z, cap) * quotient(z, cap)) : scale; }
};

// What a row's loss and gradient need beside the row itself.
template <class A>
struct TokenLoss {
  A smoothing, z_loss;
  A target_mass, smooth_mass;  // S and sum u

  // target_gap = sum_k w_k (lse - z_k) and smooth_gap = sum_v u_v (lse - z_v) come as differences: the large common
  // offset cancels before anything is rounded to it.
  NITP_HD A loss(A lse, A target_gap, A smooth_gap) const {
    const A smooth = smoothing > A(0) ? smoothing * smooth_gap : A(0);
    const A square = z_loss > A(0) ? z_loss * lse * lse : A(0);
    return (A(1) - smoothing) * target_gap + smooth + square;
  }
  NITP_HD A probability_factor(A lse) const {
    const A mass = smoothing > A(0) ? (A(1) - smoothing) * target_mass + smoothing * smooth_mass : target_mass;
    return z_loss > A(0) ? mass + A(2) * z_loss * lse : mass;
  }
  NITP_HD A at_target() const { return A(1) - smoothing; }
};

// The gradient of a row whose maximum and sum of exponentials are known, w its weight:
//
//   w dloss/dz_v = probability exp(z_v - max) - off u_v - sum_k at_k [v = t_k]
//
// probability = w ((1 - e) S + e sum u + 2 c lse) / sum_v exp(z_v - max), off = w e / V (times S without class
// weights), at_k = w (1 - e) w_k, u_v = 1 or class_weight_v.
template <class A>
struct SoftmaxGradient {
  A max, probability, off;

  NITP_HD bool nothing() const { return probability == A(0) && off == A(0); }
  NITP_HD A at(A z, A weight) const { return probability * exp_nonpositive(z - max) - off * weight; }
};

}  // namespace NITP_TARGET
}  // namespace nitp
