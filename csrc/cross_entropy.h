// Cross-entropy of one row of raw logits x with target t, smoothing e and z-loss c:
//
//   z = transform(x) = cap tanh(scale (x + bias) / cap)          (no cap: z = scale (x + bias))
//   lse = max z + log sum_v exp(z_v - max z)
//   loss = (1 - e) (lse - z_t) + e (lse - mean z) + c lse^2
//   dloss/dz_v = (1 + 2 c lse) p_v - e / V - (1 - e) [v = t],     p_v = exp(z_v - lse)
//   dloss/dx_v = dloss/dz_v * slope_v,   slope = scale (1 - (z / cap)^2)
#pragma once
#include "host_device.h"

namespace nitp {
namespace NITP_TARGET {

// Capped is a compile-time choice: with a run-time test in it the row loops do not vectorise.
template <class A, bool Capped>
struct LogitTransform {
  A scale, cap;

  NITP_HD A value(A x) const { return Capped ? cap * tanh_of(scale * x / cap) : scale * x; }
  NITP_HD A slope(A z) const { return Capped ? scale * (A(1) - (z / cap) * (z / cap)) : scale; }
};

template <class A>
struct TokenLoss {
  A smoothing, z_loss, vocabulary;

  // gap_t = lse - z_t and gap_mean = lse - mean z come as differences: the large common offset cancels before
  // anything is rounded to it.
  NITP_HD A loss(A lse, A gap_t, A gap_mean) const {
    const A smooth = smoothing > A(0) ? smoothing * gap_mean : A(0);
    const A square = z_loss > A(0) ? z_loss * lse * lse : A(0);
    return (A(1) - smoothing) * gap_t + smooth + square;
  }
  NITP_HD A probability_factor(A lse) const { return z_loss > A(0) ? A(1) + A(2) * z_loss * lse : A(1); }
  NITP_HD A everywhere() const { return smoothing / vocabulary; }
  NITP_HD A at_target() const { return A(1) - smoothing; }
};

}  // namespace NITP_TARGET
}  // namespace nitp
