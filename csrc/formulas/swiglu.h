// SwiGLU:  y = silu(g) u = g s u,   s = sigmoid(g)
//          dy/dg = u s (1 + g (1 - s)),   dy/du = g s
#pragma once
#include "../host_device.h"

namespace nitp {
namespace NITP_TARGET {

template <class A>
NITP_HD A swiglu(A g, A u) {
  return g * sigmoid(g) * u;
}

template <class A>
struct SwigluGradient {
  A gate, up;
};

template <class A>
NITP_HD SwigluGradient<A> swiglu_gradient(A g, A u, A upstream) {
  const A s = sigmoid(g), scaled = upstream * s;
  return {scaled * u * (A(1) + g * (A(1) - s)), scaled * g};
}

}  // namespace NITP_TARGET
}  // namespace nitp
